# SPDX-License-Identifier: Apache-2.0
"""How long an optimizer step's forward and backward take, from operations and rates.

Counted are matrix products with the weights, attention's scores and their values, and copies to and from the host.
A product with a frozen weight costs one more of its kind in the backward pass (the gradient of its input), a trained
one two; a checkpointed layer runs its forward twice.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from frozen_peft.planning.cards import Rates
from frozen_peft.planning.estimating import estimator_of
from frozen_peft.planning.setting import Setting

__all__ = ["StepTime", "estimate_time"]


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of one forward and backward of one batch.

    Attributes:
        compute_seconds: Of matrix products and attention.
        copy_seconds: Of copies between host and device, which are assumed to hide behind nothing.
        flops: Operations.
        host_bytes: Bytes copied.
    """

    compute_seconds: float
    copy_seconds: float
    flops: float
    host_bytes: float

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.compute_seconds + self.copy_seconds


def estimate_time(config: PretrainedConfig, setting: Setting, rates: Rates) -> StepTime:
    """Seconds of one forward and backward of a batch.

    Args:
        config: The model's configuration; its plan must know the cache.
        setting: The way of training.
        rates: Operations and bytes in a second.

    Raises:
        ValueError: The model's layers are not understood.
    """
    shape = estimator_of(config).work(setting)
    frozen, graded = setting.num_frozen, setting.num_graded
    passes = 2 + setting.gradient_checkpointing + setting.in_stretches + (not setting.use_peft)
    # A token attends to those before it: half of a sequence on average, all of the context for what follows it.
    flops = frozen * shape.token_flops + _attended(frozen, 0, shape.windows) * shape.score_flops
    turns = setting.num_boundaries
    forward = graded * shape.token_flops + _attended(graded, frozen, shape.windows) * shape.score_flops
    flops += turns * (passes * forward + 3 * setting.decision_length * shape.head_flops)
    if setting.teacher_length is not None and setting.tier is not None:
        # What it says is kept for later epochs; this is the first.
        before, decision = setting.teacher_length, setting.decision_length
        flops += before * shape.token_flops + _attended(before, 0, shape.windows) * shape.score_flops
        flops += turns * decision * (shape.token_flops + shape.head_flops)
        flops += turns * _attended(decision, before, shape.windows) * shape.score_flops
    host_bytes = 0.0
    if setting.offload_stretches and setting.in_stretches:
        num_stretches = graded / (setting.sequence_chunk_size or graded)
        # Each stretch reads what lies before it, in each of its forwards; each backward writes its gradient.
        reads = 2 + setting.gradient_checkpointing + 2
        host_bytes = reads * shape.cache_token_bytes * graded * num_stretches / 2
    total = setting.batch * flops
    copied = setting.batch * host_bytes
    return StepTime(total / rates.flops_per_second, copied / rates.host_bytes_per_second, total, copied)


def _attended(num_tokens: int, before: int, windows: tuple[int | None, ...]) -> float:
    """Pairs of tokens that attention of all layers looks at."""
    pairs = 0.0
    for window in windows:
        everything = num_tokens * (before + num_tokens / 2)
        pairs += everything if window is None else min(everything, num_tokens * window)
    return pairs

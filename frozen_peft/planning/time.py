# SPDX-License-Identifier: Apache-2.0
"""How long an optimizer step's forward and backward take, from operations and rates.

Counted are matrix products with the weights, attention's scores and their values, and copies to and from the host.
A product with a frozen weight costs one more of its kind in the backward pass (the gradient of its input), a trained
one two; a checkpointed layer runs its forward twice.
"""

import re
from collections.abc import Sequence

from transformers import PretrainedConfig

from frozen_peft.planning.setting import Setting
from frozen_peft.planning.shapes import ModelShape
from frozen_peft.planning.terms import terms_of
from frozen_peft.utils.cards import Rates

__all__ = ["estimate_time"]


def estimate_time(config: PretrainedConfig, setting: Setting, rates: Rates) -> float:
    """Seconds of one forward and backward of a batch, where copies between host and device hide behind nothing.

    Args:
        config: The model's configuration; its plan must know the cache.
        setting: The way of training.
        rates: Operations and bytes in a second.

    Raises:
        ValueError: The model's layers are not understood.
    """
    model = terms_of(config)
    shape, cache = model.shape, model.cache(setting)
    frozen, graded = setting.num_frozen, setting.num_graded
    windows = [layer.sliding_window for layer in cache.layers if layer.keys]
    token_flops, head_flops = 2 * _weights_of_token(shape), 2 * shape.vocabulary * shape.hidden_size
    head_dim = getattr(shape.text, "head_dim", None) or shape.hidden_size // shape.num_heads

    def forward(num_tokens: int, before: int) -> float:
        return num_tokens * token_flops + 4 * shape.num_heads * head_dim * _attended(num_tokens, before, windows)

    passes = 2 + setting.gradient_checkpointing + setting.in_stretches + (not setting.use_peft)
    # What writing answers takes, a token at a time, is not in it.
    turns, decision = setting.num_boundaries * setting.answers, setting.decision_length
    # A branch leaves the longest context somewhere; on average half of that lies before it.
    encoded = forward(frozen, 0) + forward(setting.num_encoded - frozen, frozen // 2)
    flops = encoded + turns * (passes * forward(graded, frozen) + 3 * decision * head_flops)
    if setting.teacher_length is not None and setting.tier is not None:
        # What it says is kept for later epochs; this is the first.
        before = setting.teacher_length
        flops += forward(before, 0) + turns * (forward(decision, before) + decision * head_flops)
    host_bytes = 0.0
    if setting.offload_stretches and setting.in_stretches:
        num_stretches = graded / (setting.sequence_chunk_size or graded)
        # Each stretch reads what lies before it, in each of its forwards; each backward writes its gradient.
        reads = 2 + setting.gradient_checkpointing + 2
        host_bytes = reads * cache.token_bytes * graded * num_stretches / 2
    return setting.batch * (flops / rates.flops_per_second + host_bytes / rates.host_bytes_per_second)


def _weights_of_token(shape: ModelShape) -> float:
    """Weights of the layers that a token is multiplied with; of experts those that it is sent to."""
    num_experts = max(
        (weight.shape[0] for name, weight in shape.model.named_parameters() if ".experts." in name), default=1
    )
    share = shape.num_experts_per_token / num_experts
    return sum(
        size * (share if ".experts." in name else 1.0)
        for name, size in shape.parameters.items()
        if re.search(r"(^|\.)(layers|h)\.\d", name)
    )


def _attended(num_tokens: int, before: int, windows: Sequence[int | None]) -> float:
    """Pairs of tokens that attention of all layers looks at: all before them, of themselves half on average."""
    everything = num_tokens * (before + num_tokens / 2)
    return sum(everything if window is None else min(everything, num_tokens * window) for window in windows)

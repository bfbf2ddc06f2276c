# SPDX-License-Identifier: Apache-2.0
"""From last hidden states to logits, for some tokens at a time."""

from dataclasses import dataclass

import torch
from peft.utils import AuxiliaryTrainingWrapper
from transformers import PretrainedConfig, PreTrainedModel

from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.modes import without_dropout
from frozen_peft.context.verify import has_low_precision
from frozen_peft.errors import ContextMismatchError

__all__ = ["LogitHead", "verify_head"]

# Fields of a configuration that say by what logits are multiplied; `logits_scaling` divides them.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
MULTIPLIED_BY_SCALING = ("hyperclovax",)
# Largest difference of a log-probability, in nats.
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_LOW_PRECISION = 2e-1
NUM_TOKENS_TO_VERIFY = 8


@dataclass(frozen=True)
class LogitHead:
    """The language-model head with what an architecture does to its logits.

    Attributes:
        module: From hidden states to the vocabulary.
        scale: What logits are multiplied by.
        softcap: Where logits are squashed to, by `softcap * tanh(logits / softcap)`; None: they are not.
    """

    module: torch.nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> torch.Tensor:
        """Shape `(vocabulary, hidden size)`; a quantized one is stored otherwise."""
        assert isinstance(self.module.weight, torch.Tensor)
        return self.module.weight

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return self.weight.shape[0]

    @classmethod
    def of(cls, model: PreTrainedModel, *, adapters: bool = True) -> "LogitHead":
        """The head of a model; without adapters, the base model's, where the head is trained as a whole."""
        module = model.get_output_embeddings()
        if not adapters and isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        config = model.config.get_text_config()
        return cls(module, _scale(config), getattr(config, "final_logit_softcapping", None))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `(tokens, vocabulary)` in float32 or more, of hidden states `(tokens, hidden size)`."""
        weight = self.weight
        dtype = weight.dtype if weight.is_floating_point() else hidden.dtype
        logits = self.module(hidden.to(weight.device, dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@torch.no_grad()
def verify_head(model: torch.nn.Module, input_ids: torch.Tensor) -> float:
    """Compares `LogitHead` with the logits that the model itself computes.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.
        input_ids: Some tokens, shape `(tokens,)`, int64; the first few are used.

    Returns:
        The largest difference of a log-probability, in nats.

    Raises:
        ContextMismatchError: It is beyond tolerance (1e-3 in float32, 0.2 in 16 bit or on a 4-bit base).
    """
    pretrained = get_pretrained_model(model)
    states: list[torch.Tensor] = []
    handle = pretrained.base_model.register_forward_hook(
        lambda module, args, output: states.append(output.last_hidden_state)
    )
    try:
        with without_dropout(model):
            expected = pretrained(input_ids=input_ids[None, :NUM_TOKENS_TO_VERIFY], use_cache=False).logits[0]
    finally:
        handle.remove()
    found = LogitHead.of(pretrained)(states[0][0])
    difference = found.log_softmax(-1) - expected.to(found).log_softmax(-1)
    error = difference.abs().max().item()
    tolerance = TOLERANCE_LOW_PRECISION if has_low_precision(pretrained) else TOLERANCE_FLOAT32
    # Negated, so that a NaN is an error as well.
    if not error <= tolerance:
        model_type = pretrained.config.get_text_config().model_type
        raise ContextMismatchError(
            f"`loss_type='distill'` computes logits from hidden states, and for `{model_type}` they are not those of "
            f"the model itself: log-probabilities are off by {error:.2e}, where {tolerance:.0e} is allowed. The "
            "architecture does something to its logits that is not known here; train it with `loss_type: nll`."
        )
    return error


def _scale(config: PretrainedConfig) -> float:
    for name in MULTIPLIERS:
        if (value := getattr(config, name, None)) is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type in MULTIPLIED_BY_SCALING else 1.0 / scaling

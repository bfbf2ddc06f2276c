# SPDX-License-Identifier: Apache-2.0
"""Runs samples through the package's frozen contexts, for comparison with `tests.reference`."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from frozen_peft.context import FrozenContext, decision_forward, encode_context
from tests.reference import CACHE, Sample, negative_log_likelihood, num_labels, token_logprobs
from tests.tiny_models import STATES

# Padding is an ordinary token: were it attended to or trained on, the result would be another.
PADDING = 7
MIN_DECISION_TOKENS = 2


def encode(
    model: nn.Module, samples: Sequence[Sample], *, chunk_size: int = 2048, adapters: bool = True
) -> FrozenContext | None:
    """The samples' contexts, one row each; None where no sample has any."""
    contexts = [sample.context for sample in samples]
    if not any(len(context) for context in contexts):
        return None
    return encode_context(model, contexts, chunk_size=chunk_size, adapters=adapters)


def decision_logits(
    model: nn.Module, samples: Sequence[Sample], frozen: FrozenContext | None, *, extra_padding: int = 0
) -> list[torch.Tensor]:
    """Logits of each sample's decision, `[decision tokens, V]`, from one right-padded batch."""
    lengths = [len(sample.decision) for sample in samples]
    width = max(*lengths, MIN_DECISION_TOKENS) + extra_padding
    input_ids = torch.full((len(samples), width), PADDING)
    mask = torch.zeros(len(samples), width, dtype=torch.long)
    for row, sample in enumerate(samples):
        input_ids[row, : lengths[row]] = sample.decision
        mask[row, : lengths[row]] = 1
    starts = torch.tensor([sample.boundary for sample in samples])
    if frozen is not None:
        assert frozen.lengths == starts.tolist()
    device = next(model.parameters()).device
    with decision_forward(model):
        logits = model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(starts[:, None] + torch.arange(width)).to(device),
            **{CACHE: frozen},
            use_cache=False,
        ).logits
    return [logits[row, :length] for row, length in enumerate(lengths)]


@torch.no_grad()
def frozen_logprobs(
    model: nn.Module, samples: Sequence[Sample], frozen: FrozenContext | None, *, extra_padding: int = 0
) -> torch.Tensor:
    """Log-probabilities of all samples' decision tokens but the first, one after the other, float64."""
    logits = decision_logits(model, samples, frozen, extra_padding=extra_padding)
    return torch.cat([token_logprobs(part, sample.decision) for part, sample in zip(logits, samples, strict=True)])


def frozen_gradients(
    model: nn.Module,
    samples: Sequence[Sample],
    frozen: FrozenContext | None,
    *,
    extra_padding: int = 0,
    reduction: Literal["sum", "mean"] = "mean",
) -> dict[str, torch.Tensor]:
    """Gradient of every trainable weight by an ordinary backward, as `reference_gradients` returns it."""
    model.zero_grad(set_to_none=True)
    logits = decision_logits(model, samples, frozen, extra_padding=extra_padding)
    loss = sum(
        negative_log_likelihood(part, sample.decision_labels) for part, sample in zip(logits, samples, strict=True)
    )
    (loss / num_labels(samples) if reduction == "mean" else loss).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return gradients


def checkpoint_layers(model: nn.Module, *, use_reentrant: bool = False) -> None:
    """Turn gradient checkpointing on, as a trainer does."""
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()


def states(frozen: FrozenContext, kind: str) -> list[torch.Tensor]:
    """Every state tensor of one kind, not copied, in a fixed order."""
    collected: list[torch.Tensor] = []

    def collect(state: torch.Tensor) -> torch.Tensor:
        collected.append(state)
        return state

    frozen.mutated(kind, collect)
    return collected


def fingerprint(frozen: FrozenContext, name: str) -> list[bytes]:
    """The bytes of every state of a frozen context of architecture `name`."""
    return [state.numpy().tobytes() for kind in STATES[name] for state in states(frozen, kind)]


def replaced(frozen: FrozenContext, kind: str, other: FrozenContext) -> FrozenContext:
    """`frozen` with every state of one kind taken from `other`, whose contexts are as long."""
    replacements = iter(states(other, kind))
    return frozen.mutated(kind, lambda state: next(replacements))


DAMAGES: dict[str, Callable[[FrozenContext, str, FrozenContext, FrozenContext], FrozenContext]] = {
    "zeroed": lambda frozen, kind, shifted, other: frozen.mutated(kind, torch.zeros_like),
    "shifted": lambda frozen, kind, shifted, other: replaced(frozen, kind, shifted),
    "another sample's": lambda frozen, kind, shifted, other: replaced(frozen, kind, other),
}

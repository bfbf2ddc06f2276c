# SPDX-License-Identifier: Apache-2.0
"""Runs samples one at a time and adds up the gradients that `flow` compares.

Of a decision, for each horizon: the context before it is encoded without gradient (what contexts of a batch begin
with, once), and what is behind it runs forward and backward over that, which gives the frozen gradient of `lora_B`.
The whole sample without a context gives the full one. What is longer than a stretch runs in stretches.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer

from frozen_peft.adapters import ROLES, adapted_projections
from frozen_peft.adapters.roles import rows_of_roles
from frozen_peft.context import (
    ContextEncoder,
    Cut,
    Decision,
    FrozenContext,
    cut_batch,
    decision_forward,
    use_segmented_attention,
)
from frozen_peft.context.boundary import IGNORED_LABEL
from frozen_peft.context.branches import BRANCHES
from frozen_peft.context.dropout import has_dropout
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.modes import without_dropout
from frozen_peft.gradient.stretches import stretched_forward
from frozen_peft.utils.cache_argument import as_cache_argument

__all__ = ["FlowMeter", "Part"]

FULL = -1
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Part:
    """One role of one adapted projection.

    Attributes:
        layer: Index of its layer; outside of all layers, one past the last.
        role: Its role, or `other`.
        module: Name of the linear module, without PEFT's wrapping.
        weight: Index of its `lora_B`.
        rows: bool[rows of `lora_B`], those that hold the role and are adapted.
    """

    layer: int
    role: str
    module: str
    weight: int
    rows: torch.Tensor


class FlowMeter:
    """Sums over samples, of which results are made.

    Args:
        model: A causal language model of transformers with LoRA adapters.
        horizons: Context tokens that each gradient reaches.
        prefill_chunk_size: Context tokens per forward without gradient.
        sequence_chunk_size: Tokens per stretch.

    Raises:
        ValueError: The model has no active LoRA adapter, or an argument is out of range.
    """

    def __init__(
        self, model: torch.nn.Module, horizons: Sequence[int], *, prefill_chunk_size: int, sequence_chunk_size: int
    ):
        if not horizons or min(horizons) < 0:
            raise ValueError(f"`horizons` must be 0 or more context tokens each, at least one, found {horizons!r}.")
        if sequence_chunk_size < 1:
            raise ValueError(f"`sequence_chunk_size` must be 1 token or more, found {sequence_chunk_size}.")
        self.model, self.pretrained = model, get_pretrained_model(model)
        self.prefill_chunk_size, self.sequence_chunk_size = prefill_chunk_size, sequence_chunk_size
        # The longest first: its context is a prefix of those of the others.
        self.horizons = sorted(set(horizons), reverse=True)
        self.weights, self.adapted, self.parts = _adapted_parts(model)
        self._sums = {
            horizon: [
                torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
                for weight in self.weights
            ]
            for horizon in [FULL, *self.horizons]
        }
        self._num_labels, self._loss = 0, 0.0
        use_segmented_attention(model)

    def cut(self, batch: Mapping[str, torch.Tensor], cut: Cut) -> list[Decision]:
        """The decisions of a batch, on the model's device.

        Raises:
            ValueError: A sample has no supervised label.
        """
        device = self.pretrained.get_input_embeddings().weight.device
        mask = batch.get("attention_mask")
        samples = cut_batch(
            batch["input_ids"].to(device),
            batch["labels"].to(device),
            None if mask is None else mask.to(device),
            replace(cut, gradient_horizon=0),
            batch.get(BRANCHES),
        )
        for index, sample in enumerate(samples):
            if not all(map(_num_labels, sample)):
                raise ValueError(
                    f"Sample {index} of the batch has no supervised label in its {len(sample[0].labels)} tokens, so "
                    "it has no decision to measure. Drop it, or check its labels."
                )
        return [decision for sample in samples for decision in sample]

    def measure(self, decisions: Sequence[Decision], on_done: Callable[[], object]) -> None:
        """Adds decisions to the sums."""
        encoder = ContextEncoder(self.model, chunk_size=self.prefill_chunk_size)
        encoder.expect([_longer(one, horizon).to_encode for one in decisions for horizon in self.horizons])
        for decision in decisions:
            whole = _longer(decision, len(decision.context))
            loss, full = self._gradient(whole, None)
            self._loss += loss
            self._num_labels += _num_labels(whole)
            self._add(FULL, full)
            for horizon in self.horizons:
                longer = _longer(decision, horizon)
                own = full
                if len(longer.context):
                    _, own = self._gradient(longer, encoder.encode([longer.to_encode]))
                self._add(horizon, own)
            on_done()

    def loss(self) -> float:
        """Mean negative log-likelihood of a label."""
        return self._loss / self._num_labels

    def gradients(self, horizon: int, weight: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of a horizon and the full one, of some rows of a `lora_B`."""
        own, full = (self._sums[kind][weight] for kind in (horizon, FULL))
        rows = rows.to(own.device)
        return own[rows] / self._num_labels, full[rows] / self._num_labels

    def _add(self, kind: int, gradients: Sequence[torch.Tensor | None]) -> None:
        for total, gradient in zip(self._sums[kind], gradients, strict=True):
            if gradient is not None:
                total += gradient

    def _gradient(
        self, decision: Decision, frozen: FrozenContext | None
    ) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        """The sum of a decision's losses, and its gradient in each `lora_B`."""
        mode: AbstractContextManager[object] = decision_forward(self.model)
        if len(decision.input_ids) > self.sequence_chunk_size:
            mode = stretched_forward(self.model, self.sequence_chunk_size)
        plain = without_dropout(self.model, keep_checkpointing=not has_dropout(self.pretrained))
        with plain, self._trains_adapters_only(), torch.enable_grad(), mode:
            loss = self._loss_of(decision, frozen)
            # Layers under activation checkpoints run again in here.
            return float(loss.detach()), torch.autograd.grad(loss, self.weights, allow_unused=True)

    def _loss_of(self, decision: Decision, frozen: FrozenContext | None) -> torch.Tensor:
        """Sum of the negative log-likelihoods of a decision's labels; logits before the first are not computed."""
        first = 1 + int((decision.labels[1:] != IGNORED_LABEL).nonzero()[0])
        num_before = frozen.lengths[0] if frozen is not None else 0
        input_ids = decision.input_ids[None]
        positions = torch.arange(num_before, num_before + input_ids.shape[1], device=input_ids.device)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            position_ids=positions[None],
            **as_cache_argument(self.pretrained, frozen),
            use_cache=False,
            logits_to_keep=len(decision.labels) - first + 1,
        ).logits[0, first - len(decision.labels) - 1 : -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = decision.labels[first:].to(logits.device)
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")

    @contextmanager
    def _trains_adapters_only(self) -> Iterator[None]:
        """Lets `lora_B` and nothing else have a gradient."""
        own = set(self.weights)
        changed = [weight for weight in self.model.parameters() if weight.requires_grad != (weight in own)]
        with ExitStack() as stack:
            for weight in changed:
                stack.callback(weight.requires_grad_, weight.requires_grad)
                weight.requires_grad_(weight in own)
            yield


def _adapted_parts(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.Tensor], list[Part]]:
    """Every active `lora_B`, its rows that are adapted, and the roles that they hold, of which a row may have two."""
    weights: list[torch.nn.Parameter] = []
    adapted: list[torch.Tensor] = []
    parts: list[Part] = []
    layers = set()
    for projection in adapted_projections(model):
        if projection.name not in projection.layer.active_adapters:
            continue
        layers.add(projection.layer)
        rest = projection.adapted
        for match in projection.matches:
            rows = rows_of_roles([match], [match.role]) & projection.adapted
            if rows.any():
                parts.append(Part(projection.index, match.role, projection.module, len(weights), rows))
        if projection.matches:
            rest = rest & ~rows_of_roles(projection.matches, ROLES)
        if rest.any():
            parts.append(Part(projection.index, "other", projection.module, len(weights), rest))
        weights.append(projection.weight)
        adapted.append(projection.adapted)
    # Routed experts, a head: what is no linear module of a layer.
    pretrained = get_pretrained_model(model)
    for name, module in pretrained.named_modules():
        # AdaLoRA's layers derive from LoRA's and keep their weights otherwise.
        if not isinstance(module, LoraLayer) or isinstance(module, AdaLoraLayer) or module in layers:
            continue
        found = _LAYER.search(f".{name}.")
        layer = int(found[1]) if found else pretrained.config.get_text_config().num_hidden_layers
        for adapter in module.active_adapters:
            if adapter in module.lora_B:
                weight = module.lora_B[adapter].weight
                rows = torch.ones(weight.shape[0], dtype=torch.bool)
                parts.append(Part(layer, "other", name, len(weights), rows))
                weights.append(weight)
                adapted.append(rows)
    if not weights:
        raise ValueError(
            f"The {type(model).__name__} has no active LoRA adapter on a linear module, and what is measured is the "
            "gradient of adapters. Give it some (`lora_config`, `use_peft: true`)."
        )
    return weights, adapted, parts


def _num_labels(decision: Decision) -> int:
    return int((decision.labels[1:] != IGNORED_LABEL).sum())


def _longer(decision: Decision, horizon: int) -> Decision:
    """The decision with the last `horizon` tokens of its context, or all there are, put in front of it."""
    num_frozen = max(len(decision.context) - horizon, 0)
    moved = decision.context[num_frozen:]
    ignored = torch.full_like(moved, IGNORED_LABEL)
    return Decision(
        decision.context[:num_frozen],
        torch.cat([moved, decision.input_ids]),
        torch.cat([ignored, decision.labels]),
    )

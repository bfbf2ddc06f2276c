# SPDX-License-Identifier: Apache-2.0
"""Runs samples one at a time and adds up what `flow` compares.

Of a decision, in this order:

1. Its context is encoded without gradient; what contexts of a batch begin with is encoded once.
2. The decision runs over it without gradient, and attention and recurrent rules are read as they run.
3. It runs again, forward and backward: the frozen gradient of `lora_B`, and that of the recurrent states.
4. With a horizon, a shorter context and a longer decision do the same; without context, the full gradient, in
   stretches of the sequence.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer

from frozen_peft.adapters import ROLES, adapted_projections
from frozen_peft.adapters.roles import rows_of_roles
from frozen_peft.context import (
    ContextEncoder,
    ContextTokens,
    Cut,
    Decision,
    FrozenContext,
    cut_batch,
    decision_forward,
    use_segmented_attention,
)
from frozen_peft.context.boundary import IGNORED_LABEL
from frozen_peft.context.dropout import has_dropout
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.modes import without_dropout
from frozen_peft.gradient.attention_mass import observed_attention
from frozen_peft.gradient.state_reads import observed_rules
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
        sequence_chunk_size: Tokens per stretch of the full gradient.

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
        # Tier 2 is always among them. The longest first: its context is a prefix of those of the others.
        self.horizons = sorted({0, *horizons}, reverse=True)
        self.weights, self.parts = _adapted_parts(model)
        # Rows that are adapted, by weight, in the shape of `lora_B` or one that is broadcast to it.
        self._adapted = [
            _union(part.rows for part in self.parts if part.weight == i) for i in range(len(self.weights))
        ]
        self._sums = {horizon: [_zeros_like(weight) for weight in self.weights] for horizon in [FULL, *self.horizons]}
        self._num_labels, self._loss = 0, 0.0
        self._mass: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._reads: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._state_gradients: dict[int, list[float]] = defaultdict(list)
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
        )
        for index, sample in enumerate(samples):
            if not all(bool((decision.labels[1:] != IGNORED_LABEL).any()) for decision in sample):
                raise ValueError(
                    f"Sample {index} of the batch has no supervised label in its {len(sample[0].labels)} tokens, so "
                    "it has no decision to measure. Drop it, or check its labels."
                )
        return [decision for sample in samples for decision in sample]

    def measure(self, decisions: Sequence[Decision], on_done: Callable[[], object]) -> None:
        """Adds decisions to the sums."""
        encoder = self._encoder([_longer(one, horizon).to_encode for one in decisions for horizon in self.horizons])
        for decision in decisions:
            full = self._full_gradient(decision)
            for horizon in self.horizons:
                longer = _longer(decision, horizon)
                gradient = self._frozen_gradient(longer, encoder, horizon) if len(longer.context) else full
                _add(self._sums[horizon], gradient)
            _add(self._sums[FULL], full)
            if not len(decision.context):
                self._observe(decision, None)
            on_done()

    def measure_attention(self, decisions: Sequence[Decision], on_done: Callable[[], object]) -> None:
        """Reads the attention of decisions, and nothing else."""
        encoder = self._encoder([decision.to_encode for decision in decisions])
        for decision in decisions:
            frozen = encoder.encode([decision.to_encode]) if len(decision.context) else None
            with self._observed_attention():
                self._forward(decision, frozen)
            on_done()

    @contextmanager
    def after_step(self, learning_rate: float) -> Iterator[None]:
        """One step along the negative frozen gradient, taken back at the end; forgets what was read of attention."""
        gradients = [total * rows.to(total.device) for total, rows in zip(self._sums[0], self._adapted, strict=True)]
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        num_weights = sum(
            int(rows.sum()) * (weight.numel() // rows.numel())
            for rows, weight in zip(self._adapted, self.weights, strict=True)
        )
        scale = learning_rate * math.sqrt(num_weights) / norm if norm > 0.0 else 0.0
        before = [weight.detach().clone() for weight in self.weights]
        self._mass.clear()
        try:
            with torch.no_grad():
                for weight, gradient in zip(self.weights, gradients, strict=True):
                    weight.sub_((scale * gradient).to(weight.dtype))
            yield
        finally:
            with torch.no_grad():
                for weight, kept in zip(self.weights, before, strict=True):
                    weight.copy_(kept)

    def loss(self) -> float:
        """Mean negative log-likelihood of a label."""
        return self._loss / self._num_labels

    def total(self, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of a horizon and the full one, of all adapted rows, as vectors."""
        pairs = [
            (own[rows[:, 0].to(own.device)].flatten().cpu(), full[rows[:, 0].to(own.device)].flatten().cpu())
            for own, full, rows in zip(self._sums[horizon], self._sums[FULL], self._adapted, strict=True)
        ]
        own, full = (torch.cat(vectors) / self._num_labels for vectors in zip(*pairs, strict=True))
        return own, full

    def of_part(self, part: Part, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of a horizon and the full one, of the rows of a role."""
        own, full = (self._sums[h][part.weight] for h in (horizon, FULL))
        rows = part.rows.to(own.device)
        return own[rows] / self._num_labels, full[rows] / self._num_labels

    def attention_mass(self) -> dict[int, float]:
        """Mean share of attention that goes to the context, by layer."""
        return {layer: total / count for layer, (total, count) in self._mass.items()}

    def states(self) -> dict[int, tuple[float, float]]:
        """By layer, the share of the state in the output, and the mean norm of its gradient."""
        return {
            layer: (
                math.sqrt(of_state / whole) if whole > 0.0 else 0.0,
                sum(norms) / len(norms) if (norms := self._state_gradients.get(layer)) else 0.0,
            )
            for layer, (of_state, whole) in self._reads.items()
        }

    def _encoder(self, contexts: Sequence[ContextTokens]) -> ContextEncoder:
        encoder = ContextEncoder(self.model, chunk_size=self.prefill_chunk_size)
        encoder.expect(contexts)
        return encoder

    def _frozen_gradient(self, decision: Decision, encoder: ContextEncoder, horizon: int) -> list[torch.Tensor | None]:
        """Gradient of each `lora_B`, of the loss of all labels; of horizon 0, what else there is to see is added."""
        frozen = encoder.encode([decision.to_encode])
        if horizon == 0:
            self._observe(decision, frozen)
            return self._with_state_gradients(decision, frozen)
        return self._gradients(decision, frozen, [])

    def _full_gradient(self, decision: Decision) -> list[torch.Tensor | None]:
        whole = _longer(decision, len(decision.context))
        num_labels = int((whole.labels[1:] != IGNORED_LABEL).sum())
        self._num_labels += num_labels
        return self._gradients(whole, None, [], note_loss=True)

    def _with_state_gradients(self, decision: Decision, frozen: FrozenContext) -> list[torch.Tensor | None]:
        frozen = frozen.mutated("recurrent", lambda state: state.detach().requires_grad_(True))
        places, states = [], []
        for layer, kept in enumerate(frozen.rows[0].layers):
            for state in kept.linear.recurrent.values() if kept.linear is not None else ():
                places.append(layer)
                states.append(state)
        gradients = self._gradients(decision, frozen, states)
        num_labels = int((decision.labels[1:] != IGNORED_LABEL).sum())
        squares: dict[int, float] = defaultdict(float)
        for layer, gradient in zip(places, gradients[len(self.weights) :], strict=True):
            squares[layer] += 0.0 if gradient is None else float(gradient.double().square().sum())
        for layer, square in squares.items():
            self._state_gradients[layer].append(math.sqrt(square) / num_labels)
        return gradients[: len(self.weights)]

    def _gradients(
        self,
        decision: Decision,
        frozen: FrozenContext | None,
        states: Sequence[torch.Tensor],
        *,
        note_loss: bool = False,
    ) -> list[torch.Tensor | None]:
        """Gradient of each `lora_B` and of each state, of the sum of a decision's losses."""
        # The states of a frozen context are constants to stretches.
        in_stretches = not states and len(decision.input_ids) > self.sequence_chunk_size
        mode = (
            stretched_forward(self.model, self.sequence_chunk_size) if in_stretches else decision_forward(self.model)
        )
        with self._ready(), self._trains_adapters_only(), torch.enable_grad(), mode:
            loss = self._loss_of(decision, frozen)
            if note_loss:
                self._loss += float(loss.detach())
            # Layers under activation checkpoints run again in here.
            return list(torch.autograd.grad(loss, [*self.weights, *states], allow_unused=True))

    def _loss_of(self, decision: Decision, frozen: FrozenContext | None) -> torch.Tensor:
        """Sum of the negative log-likelihoods of a decision's labels."""
        first = 1 + int((decision.labels[1:] != IGNORED_LABEL).nonzero()[0])
        logits = self._logits(decision, frozen, keep=len(decision.labels) - first + 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = decision.labels[first:].to(logits.device)
        return torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=IGNORED_LABEL, reduction="sum")

    def _logits(self, decision: Decision, frozen: FrozenContext | None, keep: int) -> torch.Tensor:
        """Logits of a decision's last `keep` tokens, shape `(keep, vocabulary)`; the others are not computed."""
        num_before = frozen.lengths[0] if frozen is not None else 0
        input_ids = decision.input_ids[None]
        positions = torch.arange(num_before, num_before + input_ids.shape[1], device=input_ids.device)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            position_ids=positions[None],
            **as_cache_argument(get_pretrained_model(self.model), frozen),
            use_cache=False,
            logits_to_keep=keep,
        )
        return outputs.logits[0, -keep:]

    def _forward(self, decision: Decision, frozen: FrozenContext | None) -> None:
        with self._ready(), torch.no_grad(), decision_forward(self.model):
            self._logits(decision, frozen, keep=1)

    def _observe(self, decision: Decision, frozen: FrozenContext | None) -> None:
        """Adds what attention and recurrent rules of a decision do with the context."""

        def note_reads(layer: int, output: torch.Tensor, of_state: torch.Tensor) -> None:
            self._reads[layer][0] += float(of_state.double().square().sum())
            self._reads[layer][1] += float(output.double().square().sum())

        with self._observed_attention(), observed_rules(self.pretrained, note_reads):
            self._forward(decision, frozen)

    @contextmanager
    def _observed_attention(self) -> Iterator[None]:
        def note_mass(layer: int, mass: torch.Tensor) -> None:
            self._mass[layer][0] += float(mass.double().sum())
            self._mass[layer][1] += mass.numel()

        with observed_attention(note_mass):
            yield

    @contextmanager
    def _ready(self) -> Iterator[None]:
        with without_dropout(self.model, keep_checkpointing=not has_dropout(self.pretrained)):
            yield

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


def _adapted_parts(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[Part]]:
    """Every active `lora_B`, and the roles that its rows hold."""
    weights: list[torch.nn.Parameter] = []
    parts: list[Part] = []
    layers = {}
    for projection in adapted_projections(model):
        if projection.name not in projection.layer.active_adapters:
            continue
        layers[id(projection.layer)] = projection.layer
        for match in projection.matches:
            rows = rows_of_roles([match], [match.role]) & projection.adapted
            if rows.any():
                parts.append(Part(projection.index, match.role, projection.module, len(weights), rows))
        without_role = projection.adapted & ~rows_of_roles(projection.matches, ROLES) if projection.matches else None
        if without_role is None or without_role.any():
            rows = projection.adapted if without_role is None else without_role
            parts.append(Part(projection.index, "other", projection.module, len(weights), rows))
        weights.append(projection.weight)
    # Routed experts, a head: what is no linear module of a layer.
    pretrained = get_pretrained_model(model)
    for name, module in pretrained.named_modules():
        # AdaLoRA's layers derive from LoRA's and keep their weights otherwise.
        if not isinstance(module, LoraLayer) or isinstance(module, AdaLoraLayer) or id(module) in layers:
            continue
        for adapter in module.active_adapters:
            if adapter in module.lora_B:
                found = _LAYER.search(f".{name}.")
                weight = module.lora_B[adapter].weight
                rows = torch.ones(weight.shape[0], dtype=torch.bool)
                layer = int(found[1]) if found else pretrained.config.get_text_config().num_hidden_layers
                parts.append(Part(layer, "other", name, len(weights), rows))
                weights.append(weight)
    if not weights:
        raise ValueError(
            f"The {type(model).__name__} has no active LoRA adapter on a linear module, and what is measured is the "
            "gradient of adapters. Give it some (`lora_config`, `use_peft: true`)."
        )
    return weights, parts


def _union(rows: Iterator[torch.Tensor]) -> torch.Tensor:
    """bool[rows, 1]: those that any of these mark."""
    return torch.stack(list(rows)).any(0)[:, None]


def _zeros_like(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _add(sums: list[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            total += gradient


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

# SPDX-License-Identifier: Apache-2.0
"""Trainings that several processes run, and what one process computes for them by plain forwards.

Sample `n * index + rank` of a list is what rank `rank` of `n` has in its micro-batch `index`. All of it is in float64:
rounding, which several steps add up, is another on each kind of processor.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

from tests.reference import (
    Sample,
    negative_log_likelihood,
    no_adapters_at_context,
    random_sample,
    stop_gradient_at_context,
)
from tests.reference import num_labels as count_labels
from tests.training.runs import LEARNING_RATE, adapted, in_float64, samples
from tests.training.test_activated import invoked
from tests.training.test_turns import conversation, per_span

Engine = Literal["ddp", "fsdp2"]
ENGINES: tuple[Engine, ...] = ("ddp", "fsdp2")
LAYER_CLASSES = {
    "llama": "LlamaDecoderLayer",
    "qwen3_5_text": "Qwen3_5DecoderLayer",
    "qwen3_5_moe_text": "Qwen3_5MoeDecoderLayer",
}

# Boundaries and decision lengths: from nothing to eight chunks of prefill. The second rank of two has no context in
# the second step, the third rank of three never has one.
TWO = samples(((30, 7), (9, 2), (63, 10), (0, 11), (20, 3), (53, 5)))
THREE = samples(((30, 7), (9, 2), (0, 11), (63, 10), (20, 3), (0, 5)))
# One conversation has four decisions, the other a single one, and one has no context at all.
TURNS_TWO = [
    conversation(spans, seed)
    for seed, spans in enumerate(
        (((30, 7), (9, 1), (1, 5), (27, 4)), ((63, 3),), ((0, 4),), ((20, 6), (5, 2), (9, 3)))
    )
]
TURNS_THREE = [TURNS_TWO[0], TURNS_TWO[2], TURNS_TWO[1], TURNS_TWO[3], TURNS_TWO[1], TURNS_TWO[2]]


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        rows: Samples, in the order of the global batches.
        model: Of `LAYER_CLASSES`.
        overrides: Fields of the model's configuration.
        fields: Of the training's configuration, besides those of `tests.training.runs.config`.
        steps: Optimizer steps.
        horizon: The gradient horizon, which the reference stops the gradient by.
        turns: Each supervised span is a decision.
        adapters: Whether LoRA acts at context positions.
        accumulation: Micro-batches of a step.
        learning_rate: Of SGD.
        shards: Of `fsdp_config`, besides those of `engine_fields`.
        engines: What runs it.
    """

    rows: Sequence[Sample]
    model: str = "qwen3_5_text"
    overrides: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    horizon: int = 0
    turns: bool = False
    adapters: bool = True
    accumulation: int = 1
    learning_rate: float = LEARNING_RATE
    shards: dict[str, Any] = field(default_factory=dict)
    engines: tuple[Engine, ...] = ENGINES

    def make_model(self) -> PeftModel:
        """The same model for every process, and for the reference."""
        return adapted(self.model, **self.overrides)

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Fields of the configuration; what begins with `{folder}` lies there."""
        given = {
            name: value.replace("{folder}", str(folder)) if isinstance(value, str) else value
            for name, value in self.fields.items()
        }
        return {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "gradient_horizon": self.horizon,
            "decision_mode": "turns" if self.turns else "tail",
            "context_adapters": self.adapters,
            "prefill_chunk_size": 8,
            **given,
        }

    def batches(self, num_processes: int) -> list[list[Sample]]:
        """Decisions of each step, of all processes."""
        size = num_processes * self.accumulation
        rows = [self.rows[index % len(self.rows)] for index in range(size * self.steps)]
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [self.decisions(group) for group in groups]

    def decisions(self, rows: Sequence[Sample]) -> list[Sample]:
        """Samples with one decision each."""
        return per_span(list(rows)) if self.turns else list(rows)


@dataclass(frozen=True)
class Reference:
    """What one process computes.

    Attributes:
        losses: Mean negative log-likelihood of the labels of each step.
        gradients: Of the first step, by name.
        eval_loss: Mean over all rows of the mean over a row's labels, after the last step.
        weights: After the last step.
    """

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    eval_loss: float
    weights: dict[str, torch.Tensor]


def reference(case: Case, num_processes: int) -> Reference:
    """Plain SGD of plain forwards, with a stop-gradient on what is computed at frozen positions."""
    with in_float64(case.make_model()) as model:
        return _reference(model, case, num_processes)


def _reference(model: nn.Module, case: Case, num_processes: int) -> Reference:
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    losses, first = [], None
    for batch in case.batches(num_processes):
        loss, gradients = _loss_and_gradients(model, parameters, batch, case)
        losses.append(loss)
        first = gradients if first is None else first
        with torch.no_grad():
            for name, weight in parameters.items():
                weight -= case.learning_rate * gradients[name]
    assert first is not None
    of_rows = [_loss_and_gradients(model, parameters, case.decisions([row]), case)[0] for row in case.rows]
    return Reference(
        losses,
        first,
        sum(of_rows) / len(of_rows),
        {name: weight.detach().clone() for name, weight in parameters.items()},
    )


def _loss_and_gradients(
    model: nn.Module, parameters: dict[str, torch.Tensor], batch: Sequence[Sample], case: Case
) -> tuple[float, dict[str, torch.Tensor]]:
    total, num_labels = 0.0, count_labels(batch)
    gradients = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
    for sample in batch:
        length = len(sample.input_ids)
        num_frozen = 0 if case.horizon == -1 else max(sample.boundary - case.horizon, 0)
        with stop_gradient_at_context(model, num_frozen, length):
            if case.adapters or not num_frozen:
                logits = model(input_ids=sample.input_ids[None], use_cache=False).logits[0]
            else:
                with no_adapters_at_context(model, num_frozen, length):
                    logits = model(input_ids=sample.input_ids[None], use_cache=False).logits[0]
        loss = negative_log_likelihood(logits, sample.labels) / num_labels
        total += loss.item()
        for name, gradient in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True
        ):
            if gradient is not None:
                gradients[name] += gradient
    return total, gradients


# In the test of every change; the long one runs 200.
NUM_RAGGED_BATCHES = 12
WITHOUT_AUXILIARY_LOSS = {"router_aux_loss_coef": 0.0}
STORE = {"context_cache_size": "64MiB", "context_cache_dir": "{folder}/contexts"}


def cases(num_processes: int, *, all_engines: bool = False) -> dict[str, Case]:
    """Trainings by name: pairs of what is trained and of the engine, or with each engine what both can run."""
    rows, turns = (TWO, TURNS_TWO) if num_processes == 2 else (THREE, TURNS_THREE)
    # With adapters off in contexts, what begins a decision switches them on, and the first row has no more before it.
    off = [invoked(*shape, seed) for seed, shape in enumerate(((0, 6), (66, 2), (41, 12), (9, 3), (17, 5), (63, 10)))]
    every = {
        "tier2": Case(rows, fields={"verify_context": "always"}),
        "tier1": Case(rows, horizon=-1, steps=1, engines=("ddp",)),
        "tier3_checkpoints": Case(
            rows,
            horizon=-1,
            fields={"activation_checkpointing": True, "checkpoint_every": 2},
            steps=1,
            engines=("ddp",),
        ),
        "tier3_stretches": Case(rows, horizon=-1, fields={"sequence_chunk_size": 9}),
        "horizon": Case(rows, horizon=12, fields={"activation_checkpointing": True}, engines=("fsdp2",)),
        "stretches_over_contexts": Case(rows, horizon=25, fields={"sequence_chunk_size": 8}, engines=("fsdp2",)),
        "turns": Case(
            turns, turns=True, accumulation=2, fields={"max_decisions_per_forward": 2, **STORE}, model="llama"
        ),
        # Two epochs over the same rows, of which some find in the store what others have to encode.
        "store": Case(off, adapters=False, fields=STORE, steps=2 * len(off) // num_processes),
        "experts": Case(
            rows,
            model="qwen3_5_moe_text",
            overrides=WITHOUT_AUXILIARY_LOSS,
            steps=1,
            engines=("fsdp2",),
            fields={"activation_checkpointing": True},
        ),
        "accumulation": Case(
            rows,
            accumulation=2,
            steps=1,
            model="llama",
            shards={"cpu_ram_efficient_loading": True},
            engines=("fsdp2",),
        ),
    }
    if all_engines:
        # Several layers computed again in one go are refused over weights in shards.
        return {name: replace(case, engines=ENGINES) for name, case in every.items() if name != "tier3_checkpoints"}
    if num_processes == 2:
        return every | ragged_cases(2, NUM_RAGGED_BATCHES)
    # Each engine with a third process, and each kind of training.
    with_three: dict[str, Engine] = {"tier2": "fsdp2", "tier3_stretches": "ddp", "turns": "ddp", "store": "fsdp2"}
    return {name: replace(every[name], engines=(engine,)) for name, engine in with_three.items()}


def ragged_cases(num_processes: int, num_batches: int) -> dict[str, Case]:
    """Random batches over weights in shards: every process has other lengths in each, and now and then no context."""
    generator = random.Random(0)
    num_steps = [num_batches // 3, num_batches // 3, num_batches - 2 * (num_batches // 3)]

    def length(longest: int) -> int:
        """0 in one of four, otherwise anything."""
        return 0 if generator.random() < 0.25 else generator.randrange(1, longest)

    def tails(steps: int) -> list[Sample]:
        made = []
        for seed in range(steps * num_processes):
            boundary, decision = length(60), generator.randrange(2, 12)
            # Odd in all: the reference tells positions from the sizes of weights, which are even.
            sample = random_sample(boundary, decision + (boundary + decision + 1) % 2, seed=seed)
            made.append(sample if boundary else Sample(sample.input_ids, sample.input_ids.clone()))
        return made

    def conversations(steps: int) -> list[Sample]:
        made = []
        for seed in range(steps * num_processes):
            spans: list[tuple[int, int]] = []
            total = 0
            for index in range(generator.randrange(1, 5)):
                before, supervised = max(length(25), min(index, 1)), generator.randrange(1, 7)
                # A token that nothing comes before is predicted by nothing.
                supervised = max(supervised, 2 - total - before)
                supervised += (total + before + supervised + 1) % 2
                total += before + supervised
                spans.append((before, supervised))
            made.append(conversation(tuple(spans), seed))
        return made

    common: dict[str, Any] = {"learning_rate": 1e-2, "engines": ("fsdp2",)}
    kept = {"context_cache_size": "200KiB"}
    return {
        "ragged_contexts": Case(tails(num_steps[0]), fields=kept, steps=num_steps[0], **common),
        "ragged_turns": Case(
            conversations(num_steps[1]),
            model="llama",
            fields={"max_decisions_per_forward": 2, **kept},
            turns=True,
            steps=num_steps[1],
            **common,
        ),
        "ragged_stretches": Case(
            tails(num_steps[2]),
            model="llama",
            fields={"sequence_chunk_size": 7},
            horizon=20,
            steps=num_steps[2],
            **common,
        ),
    }

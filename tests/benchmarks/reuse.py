# SPDX-License-Identifier: Apache-2.0
"""Measures training on contexts that come again, in a process of its own, and prints the figures as JSON.

    python -m tests.benchmarks.reuse --scenario conversation --method turns

Scenarios, with the methods that are compared beside `sft` (SFTTrainer with gradient checkpointing, its default):

- `conversation`: 16 turns of 512 tokens, of which the last 63 are the assistant's. `turns`: all spans over one pass
  through the conversation. `naive`: one sample per span with its whole context, one sample per step, nothing shared.
  A sample is a conversation, with `naive` too.
- `document`: eight decisions of 64 tokens on one document, a micro-batch each, in one optimizer step. `shared`: the
  document is encoded once a step.
- `epochs`: samples of a context and a decision each, several times over. `store`: contexts are encoded by the base
  model and kept. Time counts from the second epoch on, and the first apart.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.training import (
    VOCABULARY,
    Timing,
    Training,
    baseline_bytes,
    build_model,
    cache_bytes,
    resident_bytes,
    settle_allocator,
    train,
)

# Tokens of a decision: the one that predicts its first label, and its labels.
DECISION = 64
# The token that decisions begin with, for adapters that it switches on; it is nowhere else.
INVOCATION = 2
SUMS = ("tokens_encoded", "tokens_reused", "prefill_seconds", "decision_seconds")

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Sizes:
    """How large a scenario is.

    Attributes:
        context: Context tokens; in a conversation, tokens of all turns.
        decisions: Decisions on one context: turns of a conversation, samples of a document.
        repeats: How often the sample is measured, the first time not counted; different samples in `epochs`.
    """

    context: int
    decisions: int
    repeats: int


@dataclass(frozen=True)
class Case:
    """A training to measure.

    Attributes:
        rows: The dataset.
        fields: Configuration of the trainer.
        steps_per_sample: Optimizer steps that a sample takes.
        samples_per_step: Samples that a step takes.
        num_uncounted: Steps whose time is not counted.
        num_epochs: Passes over the dataset.
    """

    rows: list[Row]
    fields: dict[str, Any] = field(default_factory=dict)
    steps_per_sample: int = 1
    samples_per_step: int = 1
    num_uncounted: int = 1
    num_epochs: int = 1


def conversation(method: str, sizes: Sizes) -> Case:
    """Conversations of equal turns, each with a supervised span at its end."""
    turn = sizes.context // sizes.decisions
    labelled = [position % turn > turn - DECISION for position in range(turn * sizes.decisions)]
    rows = [_row(_tokens(len(labelled)), labelled) for _ in range(sizes.repeats)]
    if method != "naive":
        return Case(rows, {"decision_mode": "turns"} if method == "turns" else {})
    spans = [_first_turns(row, turn, number + 1) for row in rows[1:] for number in range(sizes.decisions)]
    return Case([spans[0], *spans], steps_per_sample=sizes.decisions)


def document(method: str, sizes: Sizes) -> Case:
    """Documents with several decisions each, one micro-batch per decision and one step per document."""
    rows = []
    for _ in range(sizes.repeats):
        context = _tokens(sizes.context)
        rows += [_decided(context) for _ in range(sizes.decisions)]
    return Case(rows, {"gradient_accumulation_steps": sizes.decisions}, samples_per_step=sizes.decisions)


def epochs(method: str, sizes: Sizes) -> Case:
    """Samples with a context of their own, in three epochs (one for `sft`, to which they are all the same)."""
    rows = [_decided(_tokens(sizes.context)) for _ in range(sizes.repeats)]
    if method == "sft":
        return Case(rows)
    fields = {"context_adapters": False, "invocation": f"w{INVOCATION}", "context_cache_size": "8GiB"}
    return Case(rows, fields, num_uncounted=len(rows), num_epochs=3)


SCENARIOS: dict[str, tuple[Callable[[str, Sizes], Case], Sizes, tuple[str, ...]]] = {
    "conversation": (conversation, Sizes(context=8192, decisions=16, repeats=3), ("sft", "naive", "turns")),
    "document": (document, Sizes(context=4096, decisions=8, repeats=3), ("sft", "shared")),
    "epochs": (epochs, Sizes(context=4096, decisions=1, repeats=4), ("sft", "store")),
}


def run(method: str, model: Any, case: Case) -> Training:
    """Trains a case."""
    from datasets import Dataset

    fields = case.fields | {"num_train_epochs": case.num_epochs}
    return train(method, model, Dataset.from_list(case.rows), **fields)


def summary(case: Case, training: Training) -> dict[str, Any]:
    """Time per sample, the median over those that count, and what was encoded for each; the first epoch apart."""
    num_uncounted = min(case.num_uncounted, len(training.steps) - 1)
    figures = _summary(case, training, slice(num_uncounted, None))
    if case.num_epochs > 1:
        figures["first_epoch"] = _summary(case, training, slice(1, num_uncounted))
    return figures


def _summary(case: Case, training: Training, counted: slice) -> dict[str, Any]:
    seconds, cpu_seconds = per_sample(training.steps[counted], case)
    figures: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    logs = training.logs[counted]
    if "context/hit_rate" in logs[0]:
        num_samples = len(logs) * case.samples_per_step / case.steps_per_sample
        figures |= {name: sum(log[f"context/{name}"] for log in logs) / num_samples for name in SUMS}
        figures["hit_rate"] = figures["tokens_reused"] / (figures["tokens_encoded"] + figures["tokens_reused"])
        figures["store_bytes"] = logs[-1].get("context/memory_bytes", 0.0)
    return figures


def per_sample(steps: list[Timing], case: Case) -> Timing:
    """Median time per sample, of steps of whole samples."""
    size = case.steps_per_sample
    samples = [steps[start : start + size] for start in range(0, len(steps), size)]
    wall, cpu = (
        statistics.median(sum(step[clock] for step in sample) / case.samples_per_step for sample in samples)
        for clock in (0, 1)
    )
    return wall, cpu


def _tokens(count: int) -> list[int]:
    import torch

    return torch.randint(INVOCATION + 1, VOCABULARY, (count,)).tolist()


def _row(tokens: list[int], labelled: list[bool]) -> Row:
    return {
        "input_ids": tokens,
        "labels": [token if is_label else -100 for token, is_label in zip(tokens, labelled, strict=True)],
    }


def _decided(context: list[int]) -> Row:
    """A context with a decision behind it, which begins with the invocation."""
    labelled = [False] * (len(context) + 1) + [True] * (DECISION - 1)
    return _row([*context, INVOCATION, *_tokens(DECISION - 1)], labelled)


def _first_turns(row: Row, turn: int, num_turns: int) -> Row:
    """The first turns of a conversation, with labels on the last of them only."""
    length = turn * num_turns
    first = length - turn
    labels = [-100] * first + row["labels"][first:length]
    return {"input_ids": row["input_ids"][:length], "labels": labels}


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", choices=SCENARIOS, required=True)
    parser.add_argument("--method", required=True)
    for name, text in (
        ("context", "context tokens; of a conversation, all its tokens"),
        ("decisions", "decisions on one context"),
        ("repeats", "samples, conversations or documents to measure"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{text} (default: the scenario's)")
    arguments = parser.parse_args()
    build, defaults, methods = SCENARIOS[arguments.scenario]
    if arguments.method not in methods:
        parser.error(f"argument --method: {arguments.scenario} compares {', '.join(methods)}")
    if arguments.method != "sft" and arguments.repeats == 1:
        parser.error("argument --repeats: 2 or more, since the first is not counted")
    settle_allocator("tests.benchmarks.reuse")

    import torch

    warnings.simplefilter("ignore")
    given = {name: getattr(arguments, name) or getattr(defaults, name) for name in ("context", "decisions", "repeats")}
    sizes = Sizes(**given)
    model = build_model()
    case = build(arguments.method, sizes)
    # A short run first: libraries, kernels and thread pools are loaded before the baseline is read.
    run(arguments.method, build_model(), build(arguments.method, Sizes(256, min(sizes.decisions, 2), 2)))
    baseline = baseline_bytes()
    training = run(arguments.method, model, case)
    figures = {
        "scenario": arguments.scenario,
        "method": arguments.method,
        **given,
        **summary(case, training),
        "peak_bytes": resident_bytes("VmHWM") - baseline,
        "steps": training.steps,
        "threads": torch.get_num_threads(),
    }
    figures["cache_bytes"] = cache_bytes(build_model(), sizes.context)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Writes the study's page; every number in its text comes from the results."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from tests.benchmarks.enough.report import (
    COMPARED,
    LABELS,
    at_equal_steps,
    at_equal_time,
    curves_of,
    gradient_figure,
    parts_in_order,
    shortest_seconds,
)
from tests.benchmarks.enough.study import CONTEXT_TOKENS, TASKS, TRAINED_HORIZONS
from tests.benchmarks.tables import filled

GRADIENT_TASKS = ("habit", "new form")


def write_page(results: dict[str, Any], path: Path) -> None:
    """Writes the page from the results of the study."""
    path.write_text(filled(_page(results)))


def _page(results: dict[str, Any]) -> str:
    before, size = results["before"], results["size"]
    seeds = len(results["seeds"])
    facts = "\n".join(f"- {name}: {text}" for name, text in results["machine"].items())
    return f"""\
# Is the frozen gradient enough?

Made by `python -m tests.benchmarks.enough`; do not edit.

A hybrid of one Gated DeltaNet and one attention layer (hidden size 64) is pretrained for
{results["pretraining_steps"]} steps on a world of a hundred words, until it uses its context: it recalls
{before["old_form"]["accuracy"]:.0%} of facts from contexts of {CONTEXT_TOKENS[0]} to {CONTEXT_TOKENS[1]} tokens, and
answers {before["lesson"]["accuracy"]:.0%} of lessons with eight questions without one mistake, accepting a direction
where the context holds an instruction and offering an alternative where it does not. LoRA then teaches it two things:

- **habit** (response): accept the direction although the instruction is not there. Before:
  {before["habit"]["accuracy"]:.0%} right.
- **new form** (encoding): facts are written `also red ada` instead of `note ada red`. The model was never taught
  where a name's colour is when it comes first, and what a later question can find is written while the context is
  encoded. Before: {before["new_form"]["accuracy"]:.0%} right, and one in ten is luck.

*Frozen* is tier 2, *full* is the gradient through the whole context (tier 3 without recomputation, which changes
cost and not the gradient), and a horizon lets gradient into the last tokens of the context. Contexts are
{CONTEXT_TOKENS[0]} to {CONTEXT_TOKENS[1]} tokens, so that 256 reaches nearly all of most of them, 128 half, and 1024
would be the full gradient. Adapters of rank {size["rank"]}, AdamW at {size["learning_rate"]:g}, {size["steps"]} steps
(habit: {round(size["steps"] * TASKS[0].length)}) of {size["batch_size"]} new samples; {size["held_out"]} held-out
samples. Figures are means over {seeds} {_plural("seed", seeds)} of adapters and samples, on one pretrained model:
differences of a few percent mean nothing.

![Cosines of gradients, and accuracy against steps and time](enough.png)

## Gradients at the start

Cosine with the full gradient, and in brackets the norm relative to it, of {size["gradient_samples"]} samples in one
batch, all linear layers adapted. LoRA starts with `lora_B` at zero, where `lora_A` has no gradient, so this is the
gradient of `lora_B`, the rows of each role. The preset `response` adapts query, output, gate, beta, decay and
gdn_output.

{_gradient_table(results)}

## Held-out results

Loss and accuracy on new samples of the task after equal steps, and accuracy after equal time: the processor time of
the quickest of the three trainings. The last column is what is left of recall of facts in their usual form.

{_result_table(results)}

{_conclusions(results)}

{facts}
"""


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _gradient_table(results: dict[str, Any]) -> str:
    header = ["part", *(f"{task}, {LABELS[horizon]}" for task in GRADIENT_TASKS for horizon in COMPARED)]
    rows = [
        [part, *(_gradient_cell(results, task, part, horizon) for task in GRADIENT_TASKS for horizon in COMPARED)]
        for part in parts_in_order(results)
    ]
    return _table(header, rows)


def _gradient_cell(results: dict[str, Any], task: str, part: str, horizon: str) -> str:
    cosine, norm = (gradient_figure(results, task, part, horizon, name) for name in ("cosine", "norm"))
    return "none" if math.isnan(cosine) else f"{cosine:.2f} ({norm:.2f})"


def _result_table(results: dict[str, Any]) -> str:
    header = ["task", "preset", "gradient", "loss", "accuracy", "at equal time", "seconds", "usual form"]
    rows = []
    for task in TASKS:
        seconds = shortest_seconds(results, task.name, task.preset)
        for horizon in TRAINED_HORIZONS:
            curves = curves_of(results, task.name, task.preset, horizon)
            rows.append(
                [
                    task.name,
                    task.preset,
                    LABELS[horizon],
                    f"{at_equal_steps(curves, 'losses'):.3f}",
                    f"{at_equal_steps(curves, 'accuracy'):.0%}",
                    f"{at_equal_time(curves, 'accuracy', seconds):.0%}",
                    f"{at_equal_steps(curves, 'seconds'):.0f}",
                    f"{mean(curve['old_accuracy'] for curve in curves):.0%}",
                ]
            )
    return _table(header, rows)


def _conclusions(results: dict[str, Any]) -> str:
    def cosine(task: str, part: str, horizon: str = "frozen", name: str = "cosine") -> str:
        return f"{gradient_figure(results, task, part, horizon, name):.2f}"

    def reached(preset: str, horizon: str, name: str = "accuracy") -> str:
        value = at_equal_steps(curves_of(results, "new form", preset, horizon), name)
        return f"{value:.0%}" if name == "accuracy" else f"{value:.2f}"

    def seconds(horizon: str) -> float:
        return at_equal_steps(curves_of(results, "new form", "all-linear", horizon), "seconds")

    habit_steps = max(_first_step_above(curve, 0.95) for curve in curves_of(results, "habit", "response", "frozen"))
    full_steps = max(_first_step_above(curve, 0.95) for curve in curves_of(results, "habit", "response", "full"))
    return f"""\
## What holds here

*In the last layer, query, gate, output and MLP get the full gradient from a frozen context*, cosine and norm 1: what
these do at context positions reaches no decision. That is so in every model, for its last layer. One layer below, the
same roles agree to a large part (habit: gdn_output {cosine("habit", "layer 0 gdn_output")}, gate
{cosine("habit", "layer 0 gate")}; new form: {cosine("new form", "layer 0 gdn_output")},
{cosine("new form", "layer 0 gate")}), and gdn_query, which the presets leave alone, does not
({cosine("habit", "layer 0 gdn_query")}; {cosine("new form", "layer 0 gdn_query")}).

*What writes the context gets next to nothing*: keys of attention {cosine("new form", "layer 1 key", name="norm")} and
values {cosine("new form", "layer 1 value", name="norm")} of the full gradient's norm in the new form, and what they
get points elsewhere (cosines {cosine("new form", "layer 1 key")} and {cosine("new form", "layer 1 value")}). beta and
decay, which the preset `response` does adapt, also write: {cosine("new form", "layer 0 beta")} and
{cosine("new form", "layer 0 decay")} in the new form. A horizon of 128, half of the context, brings keys and values to
{cosine("new form", "layer 1 key", "128")} and {cosine("new form", "layer 1 value", "128")}.

*The habit needs no more than the frozen gradient*: over all adapters its cosine is {cosine("habit", "all")}, and 95%
of held-out samples are right after {habit_steps} steps, with the full gradient after {full_steps}.

*The new form is learned in part.* Over all adapters the cosine is {cosine("new form", "all")}. With every linear layer
adapted, tier 2 comes from {results["before"]["new_form"]["accuracy"]:.0%} to {reached("all-linear", "frozen")} (loss
{reached("all-linear", "frozen", "losses")}), the horizon of 128 to {reached("all-linear", "128")}
({reached("all-linear", "128", "losses")}), the full gradient to {reached("all-linear", "full")}
({reached("all-linear", "full", "losses")}). With the preset `response`: {reached("response", "frozen")},
{reached("response", "128")} and {reached("response", "full")}. Naming one of the five colours in the context at random
would be right in about one of five, so tier 2 did learn to read something of the new form, out of what the pretrained
model writes of any words that stand together; how they could be written better, its gradient does not say. Its curve
is level where the other two still rise, so more steps would hardly close the gap. And the gradient alone is not
enough: where adapters may not change keys and values (`response`), the full gradient is little better
than the frozen one.

*At equal time the order is the same here*, because contexts are short: a training of the new form took
{seconds("frozen"):.0f} s of processor time with a frozen context and {seconds("full"):.0f} s with the full gradient.
Neither time is exact on a shared machine. At thousands of tokens the ratio is another (`step.md`), and so is this
comparison.

*How it was run.* The new form was trained for 100 steps first; the differences were within the noise, and the runs
were lengthened to what is shown. The world and its lessons were changed three times until pretraining learned recall.

## What it cannot show

Two layers are not sixty-four: here one layer lies below the last, and how cosines fall with depth is not seen.
Contexts are random words, the tasks are pure cases, and a real one is of both kinds. Cosines are of the first step, on
one pretrained model; where they are low, training may still arrive, and accuracy after some hundred steps is not where
it ends. No task rehearses the usual form, and what is left of it (last column) is no figure of merit of any method.
No learning rate was tuned for any of them."""


def _first_step_above(curve: dict[str, Any], accuracy: float) -> int:
    """First evaluation with at least this accuracy, in steps; the last one where there is none."""
    above = (step for step, reached in zip(curve["steps"], curve["accuracy"], strict=True) if reached >= accuracy)
    return next(above, curve["steps"][-1])

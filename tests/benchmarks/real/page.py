# SPDX-License-Identifier: Apache-2.0
"""Writes page, figures and plot of the study from the cells that are there, and says which are not."""

import json
from collections.abc import Sequence
from pathlib import Path

from frozen_peft.evaluation.intervals import Mean, Proportion, bootstrap_mean
from tests.benchmarks.real.advice import advice_table
from tests.benchmarks.real.cells import Cell, CellFiles
from tests.benchmarks.real.cost_cells import COMPARED, COST, LENGTHS, NF4_TRAINING
from tests.benchmarks.real.methods import BASE, TIER_2, TIER_3, Size
from tests.benchmarks.real.plot import draw_figure
from tests.benchmarks.real.report import READING, Reader, groups, hours, per_row, preferred, share
from tests.benchmarks.tables import filled, markdown_table

NAME = "real"
TARGET, CONTROL = ("target",), ("control",)
INTRODUCTION = """\
# A real model, real text

Made by `python -m tests.benchmarks.real`; do not edit. SmolLM2-135M-Instruct, in float32; pages of the Debian
Administrator's Handbook and conversations that people wrote (`chitchat-dataset`), {low} to {high} tokens of one of
them before each direction or question. Held-out samples share no document, person, direction, thing or wording with
training, nor with the dev part by which learning rates were chosen.

- **accept**: take up a direction ("I will ...") instead of what the base makes of it behind so much text.
- **conditional**: take up the directions of the person whom the text names as responsible, and answer those of others
  as the base does. Only the text tells which of the two a direction is.
- **encoding**: two words have changed places, says the first line of the text; what a crate holds, which later lines
  say, has to be read that way. Who names one of the two words at random meets half of the targets.

*Targets* are what training is to bring about; their *margin* is the log-probability per token of the wanted decision
less that of what the base says instead (encoding: of the word as it is written), and their *drift* by how much the
log-probability of the whole wanted decision has risen from the base's. *Text read* are directions of others
(conditional) and crates whose word kept its place (encoding): the share whose own decision is more likely, per token,
than the one that is right elsewhere. *Controls* are questions whose answer is to stay the base's own, token by token
as far as {answer} tokens; *KL* is KL(base || trained) per token of those answers. *Examples* are two requests with
good answers before the text; every method but the base with examples is measured without them. What distils, on
policy or not, has them before its teacher's text, but for directions of others and questions: there the base teaches
itself, as its answers are what the other methods train on. Adapters of rank
{rank}; AdamW at a constant learning rate, for each method the best of {rates} on the dev part, tried for half the
steps; tier 2 for fewer or for more steps has the rate of tier 2. {steps} steps of {batch} samples, every sample seen
once. {held_out} held-out samples per task. Intervals are
of 95 % and are of these samples: seeds are averaged and do not narrow them."""


def write_results(results: Path, pages: Path, size: Size) -> None:
    """Gathers the cells of a folder with those gathered before, and writes page, figures and plot."""
    path = pages / f"{NAME}.json"
    cells = CellFiles(results / "cells", path).all()
    path.write_text(json.dumps({"cells": cells}, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    reader = Reader(cells, size)
    draw_figure(reader, pages / f"{NAME}.png")
    path.with_suffix(".md").write_text(filled(render_page(reader)))


def render_page(reader: Reader) -> str:
    """The page."""
    size = reader.size
    introduction = INTRODUCTION.format(
        low=size.num_tokens[0],
        high=size.num_tokens[1],
        answer=size.answer_tokens,
        rank=size.rank,
        rates=", ".join(f"{rate:g}" for rate in size.rates),
        steps=size.steps,
        batch=size.batch_size,
        held_out=size.num_held_out,
    )
    parts = [introduction, _cut(size), _missing(reader), f"![Held-out targets against processor time]({NAME}.png)"]
    for task in size.tasks:
        parts += [f"## Task: {task}", _results(reader, task), _contexts(reader, task), _equal_time(reader, task)]
    parts += ["## Where tier 2 loses", _losses(reader), advice_table(reader)]
    parts += ["## What it costs", _costs(reader), _facts(reader)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cut(size: Size) -> str:
    """What was not planned to begin with."""
    cut = {task: size.cut[task] for task in size.tasks if size.cut.get(task)}
    lines = "\n".join(f"- {task}: {'; '.join(f'*{name}*' for name in names)}" for task, names in cut.items())
    return f"Cut for want of time, methods before seeds (`--whole` measures them too):\n\n{lines}" if cut else ""


def _missing(reader: Reader) -> str:
    missing = reader.missing()
    if not missing:
        return "Every cell that was planned is measured."
    lines = "\n".join(f"- {what}: {', '.join(which)}" for what, which in groups(missing).items())
    return (
        f"**{len(missing)} of the planned measurements are missing.** Tables and plot show what is there, which may "
        "be of fewer seeds for some methods than for others.\n\n"
        f"<details><summary>What is missing</summary>\n\n{lines}\n\n</details>"
    )


def _results(reader: Reader, task: str) -> str:
    """The table at equal steps."""
    rows = []
    for method, condition in [
        (BASE, "given"),
        (BASE, "examples"),
        *((m, "given") for m in reader.measured_methods(task)),
    ]:
        seeds = reader.scores(task, method, condition)
        if not seeds:
            continue
        runs = reader.runs(task, method)
        is_base = method == BASE
        rows.append(
            (
                method if condition == "given" else f"{method}, examples",
                "" if is_base else f"{len(seeds)}",
                "" if is_base else f"{runs[0]['rate']:g}",
                "" if is_base else f"{runs[0]['steps']}",
                _percent(share(per_row(seeds, TARGET, "exact"))),
                _nats(per_row(seeds, TARGET, "margin"), digits=2),
                "" if is_base else _nats(reader.drift(task, method)),
                _percent(share(preferred(seeds, READING))),
                _percent(share(per_row(seeds, CONTROL, "exact"))),
                "" if is_base else _nats(per_row(seeds, CONTROL, "kl"), digits=3),
                "" if is_base else f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
            )
        )
    if not rows:
        return "Nothing measured yet."
    header = (
        "method",
        "seeds",
        "rate",
        "steps",
        "targets exact",
        "margin, nats",
        "drift, nats",
        "text read",
        "controls kept",
        "KL",
        "s",
    )
    return markdown_table(header, rows, 1)


def _contexts(reader: Reader, task: str) -> str:
    """Whether the text is used, and what the gradient knows about it."""
    rows = []
    for method in [BASE, *reader.measured_methods(task)]:
        cosines = [run for run in reader.runs(task, method) if "cosine_at_start" in run]
        cells = []
        for condition in ("given", "shuffled", "empty", "long"):
            seeds = reader.scores(task, method, condition)
            cells.append(_percent(share(per_row(seeds, TARGET, "exact"))) if seeds else "")
        ahead = [reader.own_text_ahead(task, method, other) for other in ("shuffled", "empty")]
        both = [f"{run[name]:.2f}" for run in cosines for name in ("cosine_at_start", "cosine_at_end") if run[name]]
        if any(cells):
            told = (_points(found) if found else "" for found in ahead)
            rows.append((method, *cells, *told, *(both if len(both) == 2 else ("", ""))))
    if not rows:
        return ""
    places = ("own text", "text of another", "no text", "long text", "ahead of another's", "ahead of none")
    header = ("method", *places, "cosine, start", "end")
    low, high = reader.size.long_tokens
    return (
        f"Targets exact with another sample's text before the same request, with none, and with {low:,} to {high:,} "
        "tokens; by how many points of the same targets the own text is ahead; cosine of the frozen with the full "
        "gradient of the method's adapters, before and after training.\n\n" + markdown_table(header, rows, 1)
    )


def _equal_time(reader: Reader, task: str) -> str:
    """Targets exact within the processor time that a whole training of tier 2, and of tier 3, takes."""
    limits = {name: reader.points(task, name)[-1][1] for name in (TIER_2, TIER_3) if reader.runs(task, name)}
    if not limits:
        return ""
    rows = []
    for method in reader.measured_methods(task):
        cells = []
        for seconds in limits.values():
            within = [(step, rate) for step, spent, rate in reader.points(task, method) if spent <= seconds * 1.02]
            cells.append(f"{within[-1][1]:.0%} ({within[-1][0]:.0f} steps)" if within else "none measured so early")
        rows.append((method, *cells))
    header = ("method", *(f"in the {seconds:.0f} s of {name}" for name, seconds in limits.items()))
    return (
        "At equal processor time: targets exact at the last measurement within it, and its steps.\n\n"
        + markdown_table(header, rows, 1)
    )


def _losses(reader: Reader) -> str:
    """For each task the methods that met more of the targets than tier 2, and those that changed less of the rest."""
    lines = []
    for task in reader.size.tasks:
        others = [method for method in reader.measured_methods(task) if method != TIER_2]
        ahead = {method: reader.beside_tier_2(task, method, TARGET, "exact") for method in others}
        if not any(ahead.values()):
            lines.append(f"- {task}: not known yet, as tier 2 or all it is to be compared with is missing.")
            continue
        told = [f"*{method}* by {_points(found)}" for method, found in ahead.items() if found and found.mean > 0]
        lines.append(
            f"- {task}: behind {'; '.join(told)}."
            if told
            else f"- {task}: nowhere; it met at least as many targets as every other method."
        )
        change = {method: reader.beside_tier_2(task, method, CONTROL, "kl") for method in others}
        nearer = [f"*{method}* by {_lower(found)}" for method, found in change.items() if found and found.mean < 0]
        if nearer:
            lines[-1] += f" KL to the base on questions is lower with {'; '.join(nearer)}."
    return (
        "By how many points of targets met exactly tier 2 is behind, each method at its own learning rate and for as "
        "many steps as the tables say, and by how many nats its KL is higher; in brackets the interval over held-out "
        "samples. One that holds 0 tells no difference.\n\n" + "\n".join(lines)
    )


def _costs(reader: Reader) -> str:
    """Processor time and memory by length."""
    rows = []
    for method in (*COMPARED, "nf4"):
        cells = []
        for tokens in LENGTHS:
            found = reader.cells.get(Cell(COST, f"{method} {tokens}").name)
            shown = "" if found is None else f"{found['cpu_seconds']:.1f} s, {found['peak_bytes'] / 2**20:,.0f} MiB"
            cells.append(shown)
        if any(cells):
            rows.append(("SFTTrainer" if method == "sft" else method, *cells))
    if not rows:
        return _nf4(reader) or "Not measured yet."
    return (
        "Processor time of one thread per decision of 48 tokens, and the peak with the weights. `SFTTrainer` "
        "with its defaults; `tier-3`: without `sequence_chunk_size`; `turns`: four decisions in a sample; "
        "`shared`: four samples of a step in one document; "
        "`store`: adapters off in contexts, found in the store from the second step on; `nf4`: over a 4-bit base, "
        "whose weights are read in float32 first. Empty: not measured. That the peak of `SFTTrainer` rises less from "
        "4,096 to 8,192 tokens than from 2,048 to 4,096 came out twice, and is not explained.\n\n"
        + markdown_table(("method", *(f"{tokens:,} tokens" for tokens in LENGTHS)), rows, 1)
        + _nf4(reader)
    )


def _nf4(reader: Reader) -> str:
    """What training over a 4-bit base gains and loses."""
    found = reader.cells.get(NF4_TRAINING.name)
    if found is None:
        return ""
    rows = [
        (
            f"{name}, {which}",
            f"{figures['model_bytes'] / 2**20:,.0f}",
            f"{figures['seconds']:.0f}" if which == "adapted" else "",
            f"{figures[f'{which}_loss']:.3f}",
            f"{figures[f'{which}_exact']:.0%}",
        )
        for name, figures in found["precisions"].items()
        for which in ("base", "adapted")
    ]
    steps = found["precisions"]["nf4"]["steps"]
    return (
        f"\n\nThe task accept by tier 2 over a 4-bit base and over the whole one, {steps:.0f} steps on the same "
        "samples; held-out loss per token is of the same decisions.\n\n"
        + markdown_table(("base", "weights, MiB", "s of all steps", "held-out loss", "targets exact"), rows, 1)
    )


def _facts(reader: Reader) -> str:
    """The machines that the figures are from, which may be several, and the time it took."""
    found: dict[str, set[str]] = {}
    for figures in reader.cells.values():
        for name, text in figures["machine"].items():
            found.setdefault(name, set()).add(text)
    facts = {name: "; ".join(sorted(texts)) for name, texts in found.items()}
    facts["processor time"] = f"{hours(reader.cells):.1f} h for what is there, costs apart; other work ran beside it"
    return "\n".join(f"- {name}: {text}" for name, text in facts.items())


def _percent(found: Proportion | None) -> str:
    return "" if found is None else f"{found.rate:.0%} ({found.low:.0%} to {found.high:.0%})"


def _nats(values: Sequence[float], digits: int = 1) -> str:
    return "" if not values else _interval(bootstrap_mean(values), digits)


def _points(found: Mean) -> str:
    scaled = Mean(
        *(None if value is None else 100 * value for value in (found.mean, found.low, found.high)), found.total
    )
    return _interval(scaled, 0)


def _lower(found: Mean) -> str:
    """A difference below 0, in nats, as what it is lower by."""
    ends = (None if value is None else -value for value in (found.mean, found.high, found.low))
    return _interval(Mean(*ends, found.total), 2)


def _interval(found: Mean, digits: int) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"

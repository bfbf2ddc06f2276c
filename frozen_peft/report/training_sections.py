# SPDX-License-Identifier: Apache-2.0
"""The sections on training itself: loss, time, context tokens and memory, and what of the run's log they show."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from frozen_peft.report.blocks import Plot, Section, Table, Tile
from frozen_peft.report.formats import loss_text, seconds_text
from frozen_peft.report.plots import MAX_POINTS, Point, lines_plot
from frozen_peft.report.run_folder import RunFolder
from frozen_peft.utils.sizes import format_size

__all__ = ["loss_section", "memory_section", "read_history", "time_section", "tokens_section"]

# What a plan counts that is there before training begins, so before the measured peak.
_LOADED_TERMS = ("weights", "adapters")
_EVAL_LOSS = re.compile(r"eval_(?:(?P<name>.+)_)?loss")
# Parts of the time by the figures that are logged of them, in the order in which they are shown. `compute` is the
# first three together, and counts where a log has none of those.
_TIME_PARTS = {
    "context/prefill_seconds": ("prefill", "encoding contexts, or finding them encoded"),
    "context/decision_seconds": ("decision", "forward and backward of decisions over their contexts"),
    "distill/teacher_seconds": ("teacher", "what the teacher says to decisions"),
    "distill/writing_seconds": ("writing", "what the model answers to its samples"),
    "time/compute_seconds": ("forward, backward", "forward and backward of whole samples"),
    "time/data_seconds": ("data", "waiting for the samples of a step"),
    "time/evaluation_seconds": ("held-out loss", "evaluation between steps"),
    "time/saving_seconds": ("checkpoints", "saving between steps"),
}
_OTHER = "the rest"
# What each of them is, for the page's table.
_TIME_PARTS_EXPLAINED = dict(_TIME_PARTS.values()) | {_OTHER: "optimizer, logs, setting up"}


@dataclass
class History:
    """What was logged.

    Attributes:
        losses: Training loss by step.
        held_out: Held-out losses by step, for each set of held-out samples by its name.
        seconds: Seconds of each part of the time, in order; without what was not logged.
        wall_seconds: All of the time; None where it was not logged.
        encoded: Context tokens encoded since the last log, by step.
        reused: Context tokens reused, likewise.
        num_tokens: Tokens trained on; None where they were not counted.
        margins: Of preferences, by how much the reward of chosen answers is above that of rejected ones, by step.
    """

    losses: list[Point] = field(default_factory=list)
    held_out: dict[str, list[Point]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    wall_seconds: float | None = None
    encoded: list[Point] = field(default_factory=list)
    reused: list[Point] = field(default_factory=list)
    num_tokens: float | None = None
    margins: list[Point] = field(default_factory=list)


def read_history(run: RunFolder) -> History:
    """Reads the trainer's log and the held-out results; an error of a look-up or a type where they are malformed."""
    state = run.files.get("trainer_state.json", {"global_step": 1, "log_history": []})
    results = [(0, run.files.get("eval_before_results.json", {}))]
    results += [(entry["step"], entry) for entry in state["log_history"]]
    results.append((state["global_step"], run.files.get("eval_results.json", {})))
    history = History()
    held_out: dict[str, dict[float, float]] = defaultdict(dict)
    seconds: dict[str, float] = defaultdict(float)
    for step, entry in results:
        for key, value in entry.items():
            if match := _EVAL_LOSS.fullmatch(key):
                held_out[match["name"] or "held-out"][step] = value
    for entry in state["log_history"]:
        step = entry["step"]
        if "loss" in entry:
            history.losses.append((step, entry["loss"]))
        if "rewards/margins" in entry:
            history.margins.append((step, entry["rewards/margins"]))
        if "context/tokens_encoded" in entry:
            history.encoded.append((step, entry["context/tokens_encoded"]))
            history.reused.append((step, entry["context/tokens_reused"]))
        history.num_tokens = entry.get("num_tokens", history.num_tokens)
        if "time/wall_seconds" in entry:
            history.wall_seconds = (history.wall_seconds or 0.0) + entry["time/wall_seconds"]
        for key in _times_of(entry):
            seconds[key] += entry[key]
    history.held_out = {name: sorted(points.items()) for name, points in held_out.items()}
    history.seconds = {title: seconds[key] for key, (title, _) in _TIME_PARTS.items() if key in seconds}
    if history.wall_seconds is not None:
        history.seconds[_OTHER] = max(history.wall_seconds - sum(history.seconds.values()), 0.0)
    return history


def _times_of(entry: Mapping[str, Any]) -> list[str]:
    """Figures of time in a log, each second in one of them."""
    has_contexts = "context/prefill_seconds" in entry
    return [key for key in _TIME_PARTS if key in entry and not (key == "time/compute_seconds" and has_contexts)]


def loss_section(run: RunFolder, section: Section) -> None:
    """Training loss between logs, and held-out losses before, during and after."""
    history, state = read_history(run), run.files.get("trainer_state.json", {})
    method = run.files.get("recipe.yaml", {}).get("method", "sft")
    unit = "nats per token" if method == "sft" else f"that of {method.upper()}"
    drawn, rows = {}, []
    for name, points in {"training": history.losses, **history.held_out}.items():
        finite = [point for point in points if math.isfinite(point[1])]
        if not points:
            continue
        first, last = loss_text(points[0][1]), loss_text(points[-1][1])
        lowest = "-"
        if finite:
            drawn[name] = finite
            step, loss = min(finite, key=lambda point: point[1])
            lowest = f"{loss_text(loss)} at step {step:,.0f}"
        rows.append((name, f"{len(points)}", first, last, lowest))
        if len(points) == 1:
            section.tiles.append(Tile(f"{name} loss", first, f"at step {points[0][0]:,.0f}"))
        else:
            steps = f"steps {points[0][0]:,.0f} to {points[-1][0]:,.0f}"
            section.tiles.append(Tile(f"{name} loss", f"{first} → {last}", steps))
    if history.margins:
        first, last = (f"{margin:+.3f}" for _, margin in (history.margins[0], history.margins[-1]))
        section.tiles.append(
            Tile("reward margin", f"{first} → {last}", "of chosen over rejected answers, in training")
        )
    if drawn:
        caption = "Training loss, a mean between logs, and that of samples held out from training."
        if len(history.losses) > MAX_POINTS:
            caption += f" Of {len(history.losses):,} logs, means over {-(-len(history.losses) // MAX_POINTS)} each."
        section.plots.append(Plot(lines_plot("plot-loss", drawn, f"loss, {unit}"), caption))
        section.tables.append(Table(f"Loss, {unit}", ("samples", "values", "first", "last", "lowest"), rows))
    else:
        section.absent.append("No loss was logged that is a number.")
    num_bad = len(history.losses) - len(drawn.get("training", ()))
    if num_bad:
        section.notes.append(f"The training loss was not a finite number in {num_bad} of {len(history.losses)} logs.")
    if "global_step" in state:
        detail = "" if state.get("epoch") is None else f"{state['epoch']:.2f} epochs"
        if state["global_step"] < state.get("max_steps", 0):
            detail = f"of {state['max_steps']:,}: not at its end"
        section.tiles.append(Tile("steps", f"{state['global_step']:,}", detail))


def time_section(run: RunFolder, section: Section) -> None:
    """What the time was spent on."""
    history, steps = read_history(run), run.files["trainer_state.json"]["global_step"]
    if not history.seconds:
        section.absent.append("No times were logged.")
        return
    total = history.wall_seconds if history.wall_seconds is not None else sum(history.seconds.values())
    parts = {title: seconds for title, seconds in history.seconds.items() if seconds > 0}

    def row(title: str, seconds: float, what: str) -> tuple[str, ...]:
        per_step = seconds_text(seconds / steps) if steps else "-"
        return title, seconds_text(seconds), f"{seconds / (total or 1):.1%}", per_step, what

    rows = [row(title, seconds, _TIME_PARTS_EXPLAINED[title]) for title, seconds in parts.items()]
    rows.append(row("all", total, ""))
    columns = ("part", "time", "share", "per step", "what it is")
    bars = [seconds / (max(parts.values()) if parts else 1) for seconds in parts.values()]
    section.tables.append(Table("Time of training, on the main process", columns, rows, has_words=True, bars=bars))
    if history.wall_seconds is None:
        section.notes.append(
            "The whole time was not logged, so that of the optimizer and whatever else there was is not known."
        )
    else:
        section.tiles.append(Tile("time of training", seconds_text(total), f"{rows[-1][3]} per step"))
    for name, when in (("eval_before_results.json", "before"), ("eval_results.json", "after")):
        runtime = run.files.get(name, {}).get("eval_runtime")
        if runtime is not None:
            section.notes.append(f"Beside it, the held-out loss {when} training took {seconds_text(runtime)}.")


def tokens_section(run: RunFolder, section: Section) -> None:
    """Context tokens that were encoded and reused."""
    history = read_history(run)
    if not history.encoded:
        section.absent.append(
            "No contexts were encoded apart from their decisions: all tokens carried gradient (tiers 1 and 3)."
        )
        if history.num_tokens is not None:
            section.notes.append(f"{history.num_tokens:,.0f} tokens were trained on.")
        return
    encoded, reused = (sum(number for _, number in points) for points in (history.encoded, history.reused))
    read = encoded + reused
    caption = "Context tokens that ran through the model, and those that decisions read without: encoded before."
    svg = lines_plot("plot-tokens", {"encoded": history.encoded, "reused": history.reused}, "context tokens")
    section.plots.append(Plot(svg, caption))
    rows = [
        (name, f"{number:,.0f}", f"{number / (read or 1):.1%}")
        for name, number in (("context tokens that decisions read", read), ("encoded", encoded), ("reused", reused))
    ]
    if history.num_tokens is not None:
        rows.append(("tokens of all samples, decisions included", f"{history.num_tokens:,.0f}", ""))
    section.tables.append(Table("Context tokens of training", ("what", "tokens", "share"), rows))
    section.tiles.append(Tile("context tokens reused", rows[2][2], f"of {read:,.0f}"))


def memory_section(run: RunFolder, section: Section) -> None:
    """The peak that was measured against the one that was planned."""
    plan, measured = run.files.get("plan.json"), run.files.get("memory.json")
    peaks: list[tuple[str, int | None, int]] = []
    if measured is not None:
        above, total = measured["peak_bytes_above_model"], measured["peak_bytes"]
        peaks.append(("measured", above, total))
        what = "resident in memory, the interpreter and its libraries included"
        if measured["how"] == "cuda":
            what = "allocated on the GPU"
        section.notes.append(f"Measured is the peak of what was {what}; above the model, from where training began.")
        detail = "" if above is None else f"{format_size(above)} above the model"
        section.tiles.append(Tile("peak memory", format_size(total), detail))
    if plan is not None:
        total = plan["total_bytes"]
        terms = {name: size for name, size in plan["terms"].items() if size is not None}
        peaks.append(("planned", total - sum(terms.get(name, 0) for name in _LOADED_TERMS), total))
    rows = [
        (f"{name}, {where}", format_size(size))
        for name, above, total in peaks
        for where, size in (("above the model", above), ("in all", total))
        if size is not None
    ]
    sizes = [size for _, above, total in peaks for size in (above, total) if size is not None]
    bars = [max(size, 0) / (max(sizes) or 1) for size in sizes]
    section.tables.append(Table("Peak memory", ("", "size"), rows, bars=bars))
    if plan is not None:
        shares = [
            (name.replace("_", " "), format_size(size), f"{size / (total or 1):.1%}") for name, size in terms.items()
        ]
        section.tables.append(Table("The plan's terms", ("term", "size", "share"), shares))
        if plan.get("memory_limit_bytes") is not None:
            section.notes.append(f"The plan was held against a limit of {format_size(plan['memory_limit_bytes'])}.")
        if plan.get("unknown"):
            section.notes.append(f"The plan could not know: {', '.join(plan['unknown'])}.")
        section.notes += plan.get("advice") or ()

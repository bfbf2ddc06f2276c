# SPDX-License-Identifier: Apache-2.0
"""The numbers to read first."""

from collections.abc import Iterator

from frozen_peft.report.blocks import Section, Tile
from frozen_peft.report.formats import bytes_text, count_text, loss_text, seconds_text, share_text
from frozen_peft.report.history import HELD_OUT, History, read_history
from frozen_peft.report.run_folder import RunFolder
from frozen_peft.report.values import MalformedError

__all__ = ["summary_section"]


def summary_section(run: RunFolder, section: Section) -> None:
    """Fills the section with what can be had; what is malformed is named in the section that it belongs to."""
    try:
        history = read_history(run)
    except MalformedError:
        history = History()
    for tiles in (_losses(history), _course(history), _memory(run), _contexts(history), _gradient(run), _probes(run)):
        try:
            section.tiles += tiles
        except MalformedError:
            continue
    if not section.tiles:
        section.absent.append("None of the files that a run leaves behind could be read; what is missing is below.")


def _losses(history: History) -> Iterator[Tile]:
    for name, points in history.held_out.items():
        title = "held-out loss" if name == HELD_OUT else f"held-out loss, {name}"
        if len(points) > 1:
            yield Tile(title, f"{loss_text(points[0][1])} → {loss_text(points[-1][1])}", _span(points))
        else:
            yield Tile(title, loss_text(points[0][1]), _span(points))
    if history.losses:
        first, last = loss_text(history.losses[0][1]), loss_text(history.losses[-1][1])
        yield Tile("training loss", f"{first} → {last}", "first log and last")


def _span(points: list[tuple[float, float]]) -> str:
    if len(points) == 1:
        return f"at step {count_text(points[0][0])}"
    first = "before training" if points[0][0] == 0 else f"step {count_text(points[0][0])}"
    return f"{first}, and step {count_text(points[-1][0])}"


def _course(history: History) -> Iterator[Tile]:
    if history.global_step is not None:
        detail = "" if history.epoch is None else f"{history.epoch:.2f} epochs"
        if history.max_steps is not None and history.global_step < history.max_steps:
            detail = f"of {count_text(history.max_steps)}: not at its end"
        yield Tile("steps", count_text(history.global_step), detail)
    if history.wall_seconds is not None:
        steps = history.global_step
        yield Tile(
            "time of training",
            seconds_text(history.wall_seconds),
            f"{seconds_text(history.wall_seconds / steps)} per step" if steps else "",
        )


def _memory(run: RunFolder) -> Iterator[Tile]:
    if "memory.json" in run.files:
        measured = run.files["memory.json"]
        above = measured.get("peak_bytes_above_model")
        detail = "" if above is None else f"{bytes_text(above.number())} above the model"
        yield Tile("peak memory", bytes_text(measured["peak_bytes"].number()), detail)


def _contexts(history: History) -> Iterator[Tile]:
    encoded, reused = (sum(window[column] for window in history.tokens) for column in (1, 2))
    if encoded + reused:
        yield Tile(
            "context tokens reused", share_text(reused / (encoded + reused)), f"of {count_text(encoded + reused)}"
        )


def _gradient(run: RunFolder) -> Iterator[Tile]:
    if "gradient_flow.json" in run.files:
        total = run.files["gradient_flow.json"]["total"]
        share, cosine = total.get("context_share"), total.get("cosine")
        if share is not None and cosine is not None:
            detail = f"cosine of frozen and full: {cosine.number():.3f}"
            yield Tile("gradient through context", share_text(share.number()), detail)


def _probes(run: RunFolder) -> Iterator[Tile]:
    for report in list(run.evaluations.values())[:1]:
        rates: dict[tuple[str, str], float] = {}
        for row in report["results"].rows():
            if row["condition"].text() == "given":
                rates[row["kind"].text(), row["model"].text()] = row["preference"]["rate"].number()
        for kind in dict.fromkeys(kind for kind, _ in rates):
            before, after = rates.get((kind, "base")), rates.get((kind, "adapted"))
            texts = [f"{rate:.0%}" for rate in (before, after) if rate is not None]
            yield Tile(f"{kind} probes preferred", " → ".join(texts), "before and after" if len(texts) == 2 else "")

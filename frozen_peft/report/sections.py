# SPDX-License-Identifier: Apache-2.0
"""The sections of the page, but for those on behaviour (`behavior_sections`)."""

import math
from collections.abc import Callable

from frozen_peft.report.behavior_sections import examples_section, merged_section, probes_section
from frozen_peft.report.blocks import Plot, Section, Table
from frozen_peft.report.formats import bytes_text, count_text, loss_text, seconds_text, share_text, visible
from frozen_peft.report.gradient_section import gradient_section
from frozen_peft.report.history import TIME_PARTS_EXPLAINED, read_history
from frozen_peft.report.plots import MAX_POINTS, Bar, bars_plot, loss_plot, tokens_plot
from frozen_peft.report.run_folder import EXPECTED, RunFolder
from frozen_peft.report.summary import summary_section
from frozen_peft.report.values import Found, MalformedError

__all__ = ["build_sections"]

# What a plan counts that is there before training begins, so before the measured peak.
_LOADED_TERMS = ("weights", "adapters")


def build_sections(run: RunFolder) -> list[Section]:
    """All sections in their order, each of them there whatever is missing; adds to the run's problems."""
    builders: tuple[tuple[Section, Callable[[RunFolder, Section], None]], ...] = (
        (Section("summary", "Summary", ()), summary_section),
        (Section("loss", "Loss", ("trainer_state.json", "eval_before_results.json", "eval_results.json")), _loss),
        (Section("time", "Where the time went", ("trainer_state.json",)), _time),
        (Section("tokens", "Context tokens", ("trainer_state.json",)), _tokens),
        (Section("memory", "Memory against plan", ("memory.json", "plan.json")), _memory),
        (Section("gradient-flow", "Gradient flow", ("gradient_flow.json",)), gradient_section),
        (Section("probes", "Probes before and after", ("evaluation.json",)), probes_section),
        (Section("merged", "The merged model", ("merge_report.json",)), merged_section),
        (Section("examples", "Decisions side by side", ("examples.json",)), examples_section),
        (Section("recipe", "Recipe", ("recipe.yaml",)), _recipe),
        (Section("versions", "Versions", ("versions.json",)), _versions),
    )
    for section, build in builders:
        try:
            build(run, section)
        except MalformedError as error:
            section.absent.append(f"Not all can be shown: {error}.")
            run.problems.append(str(error))
    files = Section("files", "What is missing", ())
    _files(run, files)
    return [section for section, _ in builders] + [files]


def _loss(run: RunFolder, section: Section) -> None:
    history = read_history(run)
    points = {name: [p for p in own if math.isfinite(p[1])] for name, own in history.held_out.items()}
    finite = [point for point in history.losses if math.isfinite(point[1])]
    if not finite and not any(points.values()):
        section.absent += _why_absent(run, section.files[0], "No loss was logged.")
        return
    held_out = {visible(name): own for name, own in points.items() if own}
    caption = "Training loss, a mean between logs, and that of samples held out from training."
    if len(history.losses) > MAX_POINTS:
        caption += f" Of {len(history.losses):,} logs, means over {-(-len(history.losses) // MAX_POINTS)} each."
    section.plots.append(Plot(loss_plot(finite, held_out), caption))
    rows = []
    for name, own in {"training": history.losses, **history.held_out}.items():
        if own:
            best = min((p for p in own if math.isfinite(p[1])), key=lambda p: p[1], default=None)
            least = "-" if best is None else f"{loss_text(best[1])} at step {count_text(best[0])}"
            rows.append((name, str(len(own)), loss_text(own[0][1]), loss_text(own[-1][1]), least))
    section.tables.append(Table("Loss, nats per token", ("samples", "values", "first", "last", "lowest"), rows))
    num_bad = len(history.losses) - len(finite)
    if num_bad:
        section.notes.append(f"The training loss was not a finite number in {num_bad} of {len(history.losses)} logs.")
    if not history.held_out:
        section.notes.append("There is no held-out loss: the run had no held-out samples, or was stopped before it.")


def _time(run: RunFolder, section: Section) -> None:
    history = read_history(run)
    if not history.seconds:
        section.absent += _why_absent(run, section.files[0], "No times were logged.")
        return
    total = history.wall_seconds if history.wall_seconds is not None else sum(history.seconds.values())
    parts = {title: seconds for title, seconds in history.seconds.items() if seconds > 0}
    share = {title: seconds / total if total else 0.0 for title, seconds in parts.items()}
    bars = [Bar(title, seconds, share_text(share[title])) for title, seconds in parts.items()]
    caption = f"{seconds_text(total)} of training on the main process, by what they were spent on."
    if bars:
        section.plots.append(Plot(bars_plot("plot-time", bars, "Share of training time"), caption))
    steps = history.global_step
    rows = [
        (
            title,
            seconds_text(seconds),
            share_text(share[title]),
            seconds_text(seconds / steps) if steps else "-",
            TIME_PARTS_EXPLAINED[title],
        )
        for title, seconds in parts.items()
    ]
    rows.append(("all", seconds_text(total), "100.0%", seconds_text(total / steps) if steps else "-", ""))
    columns = ("part", "time", "share", "per step", "what it is")
    section.tables.append(Table("Time of training", columns, rows, has_words=True))
    if history.wall_seconds is None:
        section.notes.append(
            "The whole time was not logged, so that of the optimizer and whatever else there was is not known."
        )
    for name, when in (("eval_before_results.json", "before"), ("eval_results.json", "after")):
        if name in run.files and (runtime := run.files[name].get("eval_runtime")) is not None:
            section.notes.append(
                f"Beside it, the held-out loss {when} training took {seconds_text(runtime.number())}."
            )


def _tokens(run: RunFolder, section: Section) -> None:
    history = read_history(run)
    if not history.tokens:
        reason = "No contexts were encoded apart from their decisions: all tokens carried gradient (tiers 1 and 3)."
        section.absent += _why_absent(run, section.files[0], reason)
        if history.num_tokens is not None:
            section.notes.append(f"{count_text(history.num_tokens)} tokens were trained on.")
        return
    encoded, reused = (sum(window[column] for window in history.tokens) for column in (1, 2))
    asked = encoded + reused
    caption = "Context tokens that ran through the model, and those that decisions read without: encoded before."
    section.plots.append(Plot(tokens_plot(history.tokens), caption))
    rows = [
        ("context tokens that decisions read", count_text(asked), "100.0%" if asked else "-"),
        ("encoded", count_text(encoded), share_text(encoded / asked) if asked else "-"),
        ("reused", count_text(reused), share_text(reused / asked) if asked else "-"),
    ]
    if history.num_tokens is not None:
        rows.append(("tokens of all samples, decisions included", count_text(history.num_tokens), ""))
    section.tables.append(Table("Context tokens of training", ("what", "tokens", "share"), rows))


def _memory(run: RunFolder, section: Section) -> None:
    plan, measured = run.files.get("plan.json"), run.files.get("memory.json")
    if plan is None and measured is None:
        section.absent.append(_missing(run, "memory.json") + " " + _missing(run, "plan.json"))
        return
    peaks: list[tuple[str, float | None, float]] = []
    if measured is not None:
        above = measured.get("peak_bytes_above_model")
        total = measured["peak_bytes"].number()
        peaks.append(("measured", None if above is None else above.number(), total))
        cuda = measured["how"].text() == "cuda"
        what = "allocated on the GPU" if cuda else "resident in memory, the interpreter and its libraries included"
        section.notes.append(f"Measured is the peak of what was {what}; above the model, from where training began.")
    else:
        section.absent.append(_missing(run, "memory.json"))
    if plan is not None:
        peaks.append(_planned(plan, section))
    else:
        section.absent.append(_missing(run, "plan.json"))
    rows = [(name, "-" if above is None else bytes_text(above), bytes_text(total)) for name, above, total in peaks]
    section.tables.insert(0, Table("Peak memory", ("", "above the model", "in all"), rows))
    bars = [
        Bar(f"{name}, {where}", max(value, 0.0), bytes_text(value), outlined=name == "planned")
        for name, above, total in peaks
        for where, value in (("above model", above), ("in all", total))
        if value is not None
    ]
    caption = "Peak memory above the loaded model, and in all."
    if plan is not None:
        caption += " Hatched bars are planned, not measured."
    section.plots.append(Plot(bars_plot("plot-memory", bars, "Peak memory"), caption))


def _planned(plan: Found, section: Section) -> tuple[str, float, float]:
    """Adds what the plan says to the section; returns its name, what is above the model, and all."""
    terms = {name: value.number() for name, value in plan["terms"].items() if value.value is not None}
    total = plan["total_bytes"].number()
    rows = [
        (name.replace("_", " "), bytes_text(value), share_text(value / total if total else 0.0))
        for name, value in terms.items()
    ]
    rows.append(("all", bytes_text(total), "100.0%"))
    section.tables.append(Table("The plan's terms", ("term", "bytes", "share"), rows))
    if (limit := plan.get("memory_limit_bytes")) is not None:
        section.notes.append(f"The plan was held against a limit of {bytes_text(limit.number())}.")
    unknown = [item.text() for item in plan.rows_of("unknown")]
    if unknown:
        section.notes.append(f"The plan could not know: {', '.join(unknown)}.")
    section.notes += [item.text() for item in plan.rows_of("advice")]
    return "planned", total - sum(terms.get(name, 0.0) for name in _LOADED_TERMS), total


def _recipe(run: RunFolder, section: Section) -> None:
    section.text = run.recipe
    if run.recipe is None:
        section.absent.append(_missing(run, "recipe.yaml"))
    else:
        section.notes.append(
            "`frozen-peft train recipe.yaml` runs it again. Fields that are not there had their defaults; secrets are "
            "never written."
        )


def _versions(run: RunFolder, section: Section) -> None:
    if "versions.json" not in run.files:
        section.absent.append(_missing(run, "versions.json"))
        return
    rows = [
        (name, "not installed" if value.value is None else value.text())
        for name, value in run.files["versions.json"].items()
    ]
    section.tables.append(Table("What it ran with", ("what", "version"), rows, num_names=2))


def _files(run: RunFolder, section: Section) -> None:
    if run.missing:
        rows = [(name, EXPECTED[name]) for name in run.missing]
        section.tables.append(Table("Files that are not in the folder", ("file", "written by"), rows, num_names=2))
    else:
        section.notes.append("Nothing: every file is there.")
    section.notes += run.problems


def _why_absent(run: RunFolder, name: str, reason: str) -> list[str]:
    return [reason if name in run.files else _missing(run, name)]


def _missing(run: RunFolder, name: str) -> str:
    state = "is not there" if name in run.missing else "cannot be read"
    return f"{name} {state}. It is written by {EXPECTED[name]}."

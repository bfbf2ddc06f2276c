# SPDX-License-Identifier: Apache-2.0
"""The sections on behaviour: probes before and after, the merged model's, and decisions side by side."""

from collections.abc import Sequence

from frozen_peft.report.blocks import Plot, Section, Table
from frozen_peft.report.formats import bytes_text, count_text, interval_text, loss_text, share_text, visible
from frozen_peft.report.plots import Interval, intervals_plot
from frozen_peft.report.run_folder import EXPECTED, RunFolder
from frozen_peft.report.values import Found

__all__ = ["examples_section", "merged_section", "probes_section"]

_MODELS = {"base": "before", "adapted": "after"}
_VARIANT_TITLES = {"base": "base", "base_instructed": "base, with its instructions", "trained": "trained"}
# More would be a page of its own.
_MAX_EXAMPLES = 20


def probes_section(run: RunFolder, section: Section) -> None:
    """Shares, margins, exact matches and KL of every evaluation, with their intervals."""
    if not run.evaluations:
        section.absent.append(f"No evaluation is there. It is written by {EXPECTED['evaluation.json']}.")
        return
    for number, (name, report) in enumerate(run.evaluations.items()):
        confidence = report["confidence"].number()
        rows = report["results"].rows()
        cases: dict[tuple[str, str], dict[str, Found]] = {}
        for row in rows:
            cases.setdefault((row["kind"].text(), row["condition"].text()), {})[row["model"].text()] = row
        intervals = [
            Interval(
                visible(f"{kind}, {condition}"), *(_proportion(models.get(model), "preference") for model in _MODELS)
            )
            for (kind, condition), models in cases.items()
        ]
        if intervals:
            caption = f"Share of probes whose preferred decision is the more likely one ({name})."
            svg = intervals_plot(f"plot-probes-{number}", intervals, confidence)
            section.plots.append(Plot(svg, caption))
        table = [
            _probe_row(kind, condition, _MODELS.get(model, model), row)
            for (kind, condition), models in cases.items()
            for model, row in models.items()
        ]
        columns = ("probes", "context", "training", "number", "preferred", "margin, nats", "exact", "KL to base, nats")
        caption = f"{name}: [ ] are {confidence:.0%} intervals"
        section.tables.append(Table(caption, columns, table, num_names=3))
        section.notes += [note.text() for note in report.rows_of("notes")]


def merged_section(run: RunFolder, section: Section) -> None:
    """What the merged model is made of, how it was verified, and its probes."""
    if not run.merges:
        section.absent.append(f"No merge report is there. It is written by {EXPECTED['merge_report.json']}.")
        return
    for name, report in run.merges.items():
        facts = [("base", report["base"].text())]
        if (tensors := report.get("tensors")) is not None:
            facts.append(
                ("weights", f"{count_text(tensors.number())} tensors, {bytes_text(report['bytes'].number())}")
            )
        if (changed := report.get("merged_parameters")) is not None:
            facts.append(("changed", f"{count_text(changed.number())} parameters"))
        facts += _verification(report.get("verification"))
        section.tables.append(Table(name, ("what", "merged model"), facts, num_names=2))
        probes = report.get("probes")
        rows = [
            (file, kind, *_figures(figures)[:3])
            for file, kinds in ([] if probes is None else probes.items())
            for kind, figures in kinds.items()
        ]
        if rows:
            columns = ("file", "probes", "preferred", "margin, nats", "exact")
            section.tables.append(Table(f"{name}: probes of the merged model", columns, rows, num_names=2))
        else:
            section.notes.append(
                f"{name} has no probes of the merged model; `frozen-peft merge --probes FILE` adds them."
            )


def examples_section(run: RunFolder, section: Section) -> None:
    """Decisions on the same contexts, next to each other."""
    if "examples.json" not in run.files:
        section.absent.append(f"examples.json is not there. It is written by {EXPECTED['examples.json']}.")
        return
    found = run.files["examples.json"]
    examples = found["examples"].rows()
    for example in examples[:_MAX_EXAMPLES]:
        decisions = example["decisions"]
        section.examples.append(
            {
                "title": f"Held-out sample {example['sample'].count()}",
                "tokens": count_text(example["context_tokens"].number()),
                "context": example["context_end"].text(),
                "instructions": _optional_text(example, "instructions"),
                "expected": _optional_text(example, "expected"),
                "decisions": [_decision(title, decisions.get(name)) for name, title in _VARIANT_TITLES.items()],
            }
        )
    if len(examples) > _MAX_EXAMPLES:
        section.notes.append(f"{len(examples) - _MAX_EXAMPLES} more are in examples.json.")
    limit = count_text(found["max_new_tokens"].number())
    section.notes.append(f"Decoding: {found['decoding'].text()}, at most {limit} tokens.")
    section.notes += [note.text() for note in found.rows_of("notes")]


def _probe_row(kind: str, condition: str, when: str, row: Found) -> Sequence[str]:
    return (kind, condition, when, count_text(row["num_probes"].number()), *_figures(row))


def _figures(row: Found) -> tuple[str, str, str, str]:
    """Preferred, margin, exact matches and KL, each with its interval."""
    return (
        _share(row, "preference"),
        _mean(row, "margin"),
        _share(row, "exact_match"),
        _mean(row, "kl_to_base"),
    )


def _proportion(row: Found | None, name: str) -> tuple[float, float, float] | None:
    figure = None if row is None else row.get(name)
    return None if figure is None else (figure["rate"].number(), figure["low"].number(), figure["high"].number())


def _share(row: Found, name: str) -> str:
    figure = _proportion(row, name)
    return "-" if figure is None else interval_text(f"{figure[0]:.1%}", figure[1], figure[2], percent=True)


def _mean(row: Found, name: str) -> str:
    figure = row.get(name)
    if figure is None:
        return "-"
    ends = [None if (end := figure.get(name)) is None else end.number() for name in ("low", "high")]
    return interval_text(f"{figure['mean'].number():.3g}", ends[0], ends[1], percent=False)


def _verification(found: Found | None) -> list[tuple[str, str]]:
    if found is None:
        return [("verified", "no")]
    facts = []
    if (difference := found.get("log_probability_difference")) is not None:
        mean, effect = difference["mean"].number(), found["adapter_effect"]["mean"].number()
        facts.append(
            ("verified", f"log-probabilities differ by {mean:.2g} nats; the adapter changes them by {effect:.2g}")
        )
        equal, prompts = found["equal_greedy_decisions"].number(), found["prompts"].number()
        facts.append(("greedy decisions", f"{count_text(equal)} of {count_text(prompts)} equal"))
    if (loss := found.get("loss")) is not None:
        texts = [f"{loss_text(loss[name].number_or_nan())} {name}" for name in ("base", "adapter", "merged")]
        facts.append(("loss", ", ".join(texts)))
    if (recovery := found.get("recovery")) is not None:
        facts.append(("recovery", share_text(recovery.number())))
    return facts


def _decision(title: str, found: Found | None) -> dict[str, str]:
    if found is None:
        return {"title": title, "text": "", "state": "not there"}
    return {
        "title": title,
        "text": found["text"].text().strip(),
        "state": "" if found["finished"].flag() else "cut off",
    }


def _optional_text(found: Found, name: str) -> str | None:
    value = found.get(name)
    return None if value is None else value.text()

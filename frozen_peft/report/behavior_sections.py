# SPDX-License-Identifier: Apache-2.0
"""The sections on behaviour: gradient flow, probes before and after, the merged model's, decisions side by side."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from frozen_peft.report.blocks import Plot, Section, Table, Tile
from frozen_peft.report.plots import as_svg, draw_heatmap
from frozen_peft.report.run_folder import RunFolder

__all__ = ["examples_section", "gradient_section", "merged_section", "probes_section"]

_MODELS = {"base": "before", "adapted": "after"}
_FIGURES = ("preferred", "margin, nats", "exact", "KL to base, nats")
_VARIANT_TITLES = {"base": "base", "base_instructed": "base, with its instructions", "trained": "trained"}
# More would be a page of its own.
_MAX_EXAMPLES = 20


def gradient_section(run: RunFolder, section: Section) -> None:
    """A heat map of the gradient flow, and figures by role."""
    found = run.files["gradient_flow.json"]
    total, tokens = found["total"], found["tokens"]
    roles: dict[str, list[dict[str, Any]]] = {}
    for row in found["gradient"]:
        roles.setdefault(row["role"], []).append(row)
    rows = [
        (
            role,
            f"{len(parts)}",
            *(f"{sum(part[name] ** 2 for part in parts) ** 0.5:.3g}" for name in ("frozen_norm", "full_norm")),
            *(_range(part[name] for part in parts) for name in ("cosine", "context_share")),
        )
        for role, parts in roles.items()
    ]
    caption = (
        "By layer and role: the share of the full gradient that passes through context positions, which a frozen "
        "context leaves out, and the cosine of the two gradients. White cells have no adapter or no gradient."
    )
    svg = as_svg(draw_heatmap(found), "plot-gradient", f"{caption} The figures by role are in the table.")
    section.plots.append(Plot(svg, caption, is_paper=True))
    columns = ("role", "projections", "frozen norm", "full norm", "cosine", "share through context")
    title = "Gradient by role: norms over all layers, and the least and the most of a layer"
    section.tables.append(Table(title, columns, rows))
    section.notes.append(
        f"Measured on {found['samples']:,} samples with {tokens['context']:,} tokens of context and "
        f"{tokens['decision']:,} of decisions."
    )
    if total["context_share"] is not None and total["cosine"] is not None:
        detail = f"cosine of frozen and full: {total['cosine']:.3f}"
        section.tiles.append(Tile("gradient through context", f"{total['context_share']:.1%}", detail))


def probes_section(run: RunFolder, section: Section) -> None:
    """Shares, margins, exact matches and KL of every evaluation, with their intervals."""
    for number, (name, report) in enumerate(run.files["evaluation.json"].items()):
        results: list[dict[str, Any]] = report["results"]
        names = [(row["kind"], row["condition"], _MODELS.get(row["model"], row["model"])) for row in results]
        table = [(*own, f"{row['num_probes']:,}", *_figures(row)) for own, row in zip(names, results, strict=True)]
        columns = ("probes", "context", "training", "number", *_FIGURES)
        caption = f"{name}: bars are the share preferred, [ ] are {report['confidence']:.0%} intervals"
        bars = [row["preference"]["rate"] if row["preference"] else 0.0 for row in results]
        section.tables.append(Table(caption, columns, table, num_names=3, bars=bars))
        section.notes += report.get("notes") or ()
        if number == 0:
            section.tiles += _tiles(results)


def _tiles(results: list[dict[str, Any]]) -> Iterator[Tile]:
    rates: dict[tuple[str, str], dict[str, str]] = {}
    for row in results:
        # What is said word for word first: of two decisions the shorter one may be preferred for that alone.
        for figure, title in (("exact_match", "exact"), ("preference", "preferred")):
            if row["condition"] == "given" and row[figure]:
                rates.setdefault((row["kind"], title), {})[row["model"]] = f"{row[figure]['rate']:.0%}"
    for (kind, title), by_model in rates.items():
        texts = [by_model[model] for model in _MODELS if model in by_model]
        yield Tile(f"{kind} probes {title}", " → ".join(texts), "before and after" if len(texts) == 2 else "")


def merged_section(run: RunFolder, section: Section) -> None:
    """What the merged model is made of, how it was verified, and its probes."""
    for name, report in run.files["merge_report.json"].items():
        facts = {key: value for key, value in report.items() if not isinstance(value, dict | list) and key != "format"}
        verification = report.get("verification")
        rows = [*_facts(facts), *(_facts(verification, "verification") if verification else [("verified", "no")])]
        section.tables.append(Table(name, ("what", "merged model"), rows, num_names=2))
        probes = [
            (file, kind, *_figures(figures)[:3])
            for file, kinds in (report.get("probes") or {}).items()
            for kind, figures in kinds.items()
        ]
        if probes:
            title = f"{name}: probes of the merged model"
            section.tables.append(Table(title, ("file", "probes", *_FIGURES[:3]), probes, num_names=2))
        else:
            section.notes.append(
                f"{name} has no probes of the merged model; `frozen-peft merge --probes FILE` adds them."
            )


def examples_section(run: RunFolder, section: Section) -> None:
    """Decisions on the same contexts, next to each other."""
    found = run.files["examples.json"]
    for example in found["examples"][:_MAX_EXAMPLES]:
        decisions = []
        for name, title in _VARIANT_TITLES.items():
            decision = example["decisions"].get(name)
            if decision is None:
                decisions.append({"title": title, "text": "", "state": "not there"})
            else:
                state = "" if decision["finished"] else "cut off"
                decisions.append({"title": title, "text": decision["text"].strip(), "state": state})
        texts = {key: example[key] for key in ("context_end", "instructions", "expected")}
        section.examples.append(
            {"title": f"Held-out sample {example['sample']}", "tokens": f"{example['context_tokens']:,}"}
            | texts
            | {"decisions": decisions}
        )
    if len(found["examples"]) > _MAX_EXAMPLES:
        section.notes.append(f"{len(found['examples']) - _MAX_EXAMPLES} more are in examples.json.")
    for answer in found.get("own_answers", ()):
        state = "" if answer["finished"] else "cut off"
        section.examples.append(
            {
                "title": f"Written in training, after {answer['step']:,} steps",
                "tokens": f"{answer['context_tokens']:,}",
                "context_end": answer["context_end"],
                "instructions": None,
                "expected": None,
                "decisions": [{"title": "own answer", "text": answer["text"].strip(), "state": state}],
            }
        )
    section.notes.append(f"Decoding: {found['decoding']}, at most {found['max_new_tokens']:,} tokens.")
    section.notes += found["notes"]


def _figures(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Preferred, margin, exact matches and KL, each with its interval."""

    def text(name: str, value: str, form: str, interval_form: str) -> str:
        figure = row.get(name)
        if figure is None:
            return "-"
        low, high = figure["low"], figure["high"]
        interval = "" if low is None or high is None else f" [{low:{interval_form}}, {high:{interval_form}}]"
        return f"{figure[value]:{form}}{interval}"

    return (
        text("preference", "rate", ".1%", ".0%"),
        text("margin", "mean", ".3g", ".3g"),
        text("exact_match", "rate", ".1%", ".0%"),
        text("kl_to_base", "mean", ".3g", ".3g"),
    )


def _facts(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of an object, those of objects within it under names of both."""
    for key, value in values.items():
        name = f"{place} {key}".strip().replace("_", " ")
        if isinstance(value, dict):
            yield from _facts(value, name)
        elif value is not None:
            yield name, f"{value:,.6g}" if isinstance(value, int | float) else str(value)


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{known[0]:.3f}" if len(known) == 1 else f"{min(known):.3f} to {max(known):.3f}"

# SPDX-License-Identifier: Apache-2.0
"""The results as a page, with what they were to show and whether they do."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu.device import GIBIBYTE
from tests.benchmarks.tables import markdown_table

Figures = Mapping[str, Any]


def write(results: Mapping[str, Any], folder: Path, name: str) -> None:
    """Writes `NAME.json` and `NAME.md`, each under its name only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in (("json", json.dumps(results, indent=2) + "\n"), ("md", markdown(results))):
        part = folder / f".{name}.{ending}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / f"{name}.{ending}")


def markdown(results: Mapping[str, Any]) -> str:
    """The page."""
    sections = [
        "# Models of true shape on one GPU",
        f"Made by `{results['command']}`; do not edit. "
        + ("**A smoke run on a CPU with tiny models: no figure here means anything.** " if results["smoke"] else "")
        + "Random weights of the published sizes, one sample per step, LoRA on the response projections, 16-bit "
        "autocast. Seconds are those of the last of two optimizer steps, of a single one for contexts above 100,000 "
        "tokens. Memory is the peak of what tensors take, the model included. *Cap*: what the process may use, as a "
        "card of that size would let it.",
        "\n".join(f"- {name}: {text}" for name, text in results["facts"].items()),
        "## What it was to show",
        _goals(results),
        "## Parity",
        "Decisions over frozen contexts on this device against plain forwards in float32 on a CPU, tiny model. Errors "
        "of loss and gradients are relative.",
        _parity(results["parity"]),
        "## Steps",
        _steps(results["measurements"]),
    ]
    if results["profiles"]:
        sections += ["## Where the time goes", _profiles(results["profiles"])]
    if results["chunks"]:
        sections += ["## Prefill by chunk size", _chunks(results["chunks"])]
    failures = [
        f"- {row['model']}, {row['method']}, {row['context']:,} tokens: {row['note']}"
        for row in results["measurements"]
        if row["outcome"] == "failed"
    ]
    if failures:
        sections += ["## Failures", "\n".join(failures)]
    sections += ["## Kernels", _kernels(results["kernels"])]
    if results["skipped"]:
        sections += ["## Not run", "\n".join(f"- {line}" for line in results["skipped"])]
    return "\n\n".join(sections) + "\n"


def goals(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What was to be shown of the first model, what was found, and whether that is enough."""
    if not results["models"]:
        return []
    name = results["models"][0]["name"]
    found = {(row["method"], row["context"], row["cap_gib"]): row for row in results["measurements"]
             if row["model"] == name and row["outcome"] == "measured"}  # fmt: skip
    at = results["goal_context"]

    def of(method: str, field: str) -> float | None:
        # Of what was measured under different caps, the one with the least.
        rows = [row for (kind, context, _), row in found.items() if kind == method and context == at]
        values = [row[field] for row in rows if row[field] is not None]
        return min(values) if values else None

    def ratio(over: str, field: str) -> float | None:
        above, below = of(over, field), of("SFTTrainer", field)
        return above / below if above is not None and below else None

    rows = [
        _goal(f"step of tier 2 at {at:,} tokens, of SFTTrainer's", ratio("tier 2", "step_seconds"), 0.36),
        _goal(f"memory of tier 2 at {at:,} tokens, of SFTTrainer's", ratio("tier 2", "peak_bytes"), 0.5),
        _goal(f"step with the context reused at {at:,} tokens", ratio("tier 2, reused", "step_seconds"), 0.05),
    ]
    utilisations = [row["utilisation"] for row in results["measurements"]
                    if row["model"] == name and row["context"] == at and row["utilisation"] is not None]  # fmt: skip
    rows.append(
        _goal("prefill, of the card's measured matmul rate", max(utilisations, default=None), 0.55, least=True)
    )
    for cap, context in results["caps"]:
        tried = [row for row in results["measurements"]
                 if row["model"] == name and row["cap_gib"] == cap and row["context"] == context]  # fmt: skip
        outcome = tried[0]["outcome"] if tried else "not run"
        holds = {"measured": "yes", "out of memory": "no"}.get(outcome, "not measured")
        rows.append((f"{context:,} tokens in {cap} GiB", "", outcome, holds if results["on_gpu"] else "not measured"))
    worst = [row["peak_over_plan"] for row in results["measurements"] if row.get("peak_over_plan") is not None]
    rows.append(
        _goal("peak against the planner, largest deviation", max((abs(w - 1) for w in worst), default=None), 0.1)
    )
    return rows


def _goal(what: str, value: float | None, bound: float, *, least: bool = False) -> tuple[str, str, str, str]:
    wanted = f"{'at least' if least else 'at most'} {bound:g}"
    if value is None:
        return what, wanted, "", "not measured"
    return what, wanted, f"{value:.3f}", "yes" if (value >= bound if least else value <= bound) else "no"


def _goals(results: Mapping[str, Any]) -> str:
    rows = goals(results)
    return markdown_table(("what", "wanted", "found", "holds"), rows, 4) if rows else "Nothing was measured."


def _parity(rows: Sequence[Figures]) -> str:
    header = ("type", "log-prob error", "loss error", "gradient error", "worst cosine", "allowed", "holds")
    lines = [
        (
            row["dtype"],
            f"{row['logprob_error']:.1e}",
            f"{row['loss_error']:.1e}",
            f"{row['gradient_error']:.1e}",
            f"{row['worst_cosine']:.5f}",
            f"{row['tolerance']:.0e}",
            "yes" if row["holds"] else "NO",
        )
        for row in rows
    ]
    return markdown_table(header, lines, 1)


def _steps(rows: Sequence[Figures]) -> str:
    header = ("model", "method", "context", "cap GiB", "step s", "prefill tokens/s", "of matmul", "decision tokens/s",
              "peak GiB", "peak/plan", "outcome")  # fmt: skip
    lines = [
        (
            row["model"],
            row["method"],
            f"{row['context']:,}",
            _shown(row["cap_gib"], "{}"),
            _shown(row["step_seconds"], "{:.2f}"),
            _shown(row["prefill_tokens_per_second"], "{:,.0f}"),
            _shown(row["utilisation"], "{:.2f}"),
            _shown(row["decision_tokens_per_second"], "{:,.0f}"),
            _shown(row["peak_bytes"], "{:.1f}", lambda value: value / GIBIBYTE),
            _shown(row.get("peak_over_plan"), "{:.2f}"),
            row["outcome"],
        )
        for row in rows
    ]
    return markdown_table(header, lines, 2) if lines else "Nothing was measured."


def _profiles(profiles: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    blocks = []
    for model, parts in profiles.items():
        kinds = sorted({kind for shares in parts.values() for kind in shares})
        rows = [(kind, *(f"{shares.get(kind, 0.0):.1%}" for shares in parts.values())) for kind in kinds]
        blocks.append(f"{model}:\n\n{markdown_table(('kernels', *parts), rows, 1)}")
    return "\n\n".join(blocks)


def _chunks(chunks: Mapping[str, Sequence[Figures]]) -> str:
    rows = [
        (model, f"{row['chunk_size']:,}", _shown(row["tokens_per_second"], "{:,.0f}") or "out of memory")
        for model, found in chunks.items()
        for row in found
    ]
    return markdown_table(("model", "prefill_chunk_size", "tokens/s"), rows, 1)


def _kernels(rows: Sequence[Figures]) -> str:
    lines = [(row["purpose"], row["kernel"], row["reason"]) for row in rows]
    return markdown_table(("for", "runs", "because"), lines, 3)


def _shown(value: Any, form: str, convert: Callable[[Any], Any] = lambda value: value) -> str:
    return "" if value is None else form.format(convert(value))

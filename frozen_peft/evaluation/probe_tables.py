# SPDX-License-Identifier: Apache-2.0
"""The report on probes: one JSON object, and the table of its figures.

| key | what it holds |
| --- | --- |
| `probes` | how many of each kind were given |
| `measures` | what each figure is, in words |
| `confidence` | the level of all intervals |
| `results` | figures: one object per kind, condition and model |
| `notes` | what was left out, and why |
| `scores` | one object per probe, condition and model |

A figure that was not measured is null; so are the ends of an interval around a single value.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from frozen_peft.evaluation.intervals import CONFIDENCE, NUM_RESAMPLES
from frozen_peft.evaluation.probe_scores import ProbeScore, ProbeScores, summarize
from frozen_peft.evaluation.probes import KINDS
from frozen_peft.utils.tables import aligned

__all__ = ["MEASURES", "probe_report", "probe_table"]

MEASURES = {
    "preference": "Share of probes whose preferred decision is the more likely one, by the sum of its tokens' "
    "log-probabilities; a tie is not. Wilson score interval.",
    "margin": "Mean of log p(preferred) - log p(rejected), sums over the decisions' tokens to the end of the turn, in "
    f"nats. Bootstrap percentile interval of {NUM_RESAMPLES} resamples.",
    "margin_per_token": "The same between means per token, in nats.",
    "exact_match": "Share of the probes with `expected` of which greedy decoding gives just that. Wilson score "
    "interval.",
    "kl_to_base": "KL(base || adapted) in nats, mean over the preferred decision's tokens, then over control probes; "
    "each in the same context. Bootstrap percentile interval.",
}
_COLUMNS = ("probes", "context", "model", "n", "preferred", "margin", "margin/token", "exact match", "KL to base")


def probe_report(results: Sequence[ProbeScores], *, seed: int = 0, **origin: Any) -> dict[str, Any]:
    """The report as JSON can hold it.

    Args:
        results: What `compare_probes` gave.
        seed: Decides the resamples of bootstrap intervals.
        origin: What else to say of where it comes from: model, adapter, file. Stands first.
    """
    summaries = {(result.model, result.condition): summarize(result, seed=seed) for result in results}
    probes = {score.probe.id: score.probe for result in results for score in result.scores}
    figures = [
        {"kind": kind, "condition": condition, "model": model, "num_probes": summary[kind].margin.total}
        | asdict(summary[kind])
        for kind in KINDS
        # Before and after, side by side.
        for condition in dict.fromkeys(result.condition for result in results)
        for (model, own), summary in summaries.items()
        if own == condition and kind in summary
    ]
    return {
        **origin,
        "seed": seed,
        "probes": {kind: sum(probe.kind == kind for probe in probes.values()) for kind in KINDS},
        "confidence": CONFIDENCE,
        "measures": MEASURES,
        "results": figures,
        "notes": list(dict.fromkeys(note for result in results for note in result.notes)),
        "scores": [
            {"id": score.probe.id, "kind": score.probe.kind, "condition": result.condition, "model": result.model}
            | _score_values(score)
            for result in results
            for score in result.scores
        ],
    }


def probe_table(results: Sequence[ProbeScores], *, seed: int = 0) -> str:
    """The figures as an aligned table, with what its columns mean and the notes below.

    Args:
        results: What `compare_probes` gave.
        seed: Decides the resamples of bootstrap intervals.
    """
    report = probe_report(results, seed=seed)
    rows = [
        (
            row["kind"],
            row["condition"],
            row["model"],
            str(row["num_probes"]),
            _percent(row["preference"]),
            _nats(row["margin"]),
            _nats(row["margin_per_token"]),
            _percent(row["exact_match"]),
            _nats(row["kl_to_base"]),
        )
        for row in report["results"]
    ]
    lines = aligned([_COLUMNS, *rows], indent="")
    legend = (
        f"[ ]: {report['confidence']:.0%} intervals. margin: log p(preferred) - log p(rejected), summed over tokens, "
        "in nats. KL: in nats per token."
    )
    return "\n".join([*lines, "", legend, *report["notes"]])


def _score_values(score: ProbeScore) -> dict[str, Any]:
    return {
        "preferred_logprob": score.preferred.logprob,
        "preferred_tokens": score.preferred.num_tokens,
        "rejected_logprob": score.rejected.logprob,
        "rejected_tokens": score.rejected.num_tokens,
        "is_preferred": score.is_preferred,
        "is_exact": score.is_exact,
        "kl_to_base": score.kl_to_base,
    }


def _percent(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['rate']:6.1%} [{figure['low']:.1%}, {figure['high']:.1%}]"


def _nats(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    interval = "" if figure["low"] is None else f" [{figure['low']:.3g}, {figure['high']:.3g}]"
    return f"{figure['mean']:.3g}{interval}"

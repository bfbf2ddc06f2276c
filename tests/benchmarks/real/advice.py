# SPDX-License-Identifier: Apache-2.0
"""What `frozen-peft inspect --advise` would have said before the trainings, beside how they ended."""

from frozen_peft.evaluation.intervals import Mean
from frozen_peft.planning.tiers import DataFigures, GradientFigures, advise_tier
from tests.benchmarks.real.methods import METHODS, TIER_2, TIER_3
from tests.benchmarks.real.report import Reader, paired, per_row
from tests.benchmarks.tables import markdown_table

# Adapters, and what trains them by the frozen and by the full gradient.
PAIRS = {"response": (TIER_2, TIER_3), "all-linear": ("tier 2, all-linear", "tier 3, all-linear")}
assert {name for pair in PAIRS.values() for name in pair} <= {method.name for method in METHODS}
# Of a direction that is taken up; what a crate holds is as long.
DECISION_TOKENS = 16.0
HEADER = ("task", "adapters", "cosine", "advice", "tier 3 ahead, points of targets", "advice held")


def advice_table(reader: Reader) -> str:
    """The advice by each cosine that was measured, and whether it held; empty where nothing was."""
    context = sum(reader.size.num_tokens) / 2
    data = DataFigures(context, round(context), DECISION_TOKENS, round(DECISION_TOKENS))
    rows = []
    for task in reader.size.tasks:
        for preset, (frozen, full) in PAIRS.items():
            cosine = next((run["cosine_at_start"] for run in reader.runs(task, frozen) if "cosine_at_start" in run), 0)
            if cosine:
                # The share goes into the words alone.
                tier = advise_tier(GradientFigures(cosine, 1.0), data).tier
                ahead = _ahead(reader, task, full, frozen)
                rows.append((task, preset, f"{cosine:.2f}", f"tier {tier}", _points(ahead), _verdict(tier, ahead)))
    if not rows:
        return ""
    return (
        "The advice of `frozen-peft inspect --advise` by the cosine before training, without the horizons that it "
        "would measure as well, and how much more of the targets the full gradient met with the same adapters at "
        "equal steps; the interval is over held-out samples.\n\n" + markdown_table(HEADER, rows, 2)
    )


def _ahead(reader: Reader, task: str, full: str, frozen: str) -> Mean | None:
    """Paired sample by sample; None: one of the two was not trained."""
    own, other = (per_row(reader.scores(task, name), ("target",), "exact") for name in (full, frozen))
    return paired(own, other)


def _points(ahead: Mean | None) -> str:
    if ahead is None or ahead.low is None or ahead.high is None:
        return "not trained yet"
    return f"{100 * ahead.mean:.0f} ({100 * ahead.low:.0f} to {100 * ahead.high:.0f})"


def _verdict(tier: int, ahead: Mean | None) -> str:
    if ahead is None or ahead.low is None:
        return ""
    is_behind = ahead.low > 0
    return "yes" if is_behind == (tier != 2) else "no" if is_behind else "tier 2 was enough"

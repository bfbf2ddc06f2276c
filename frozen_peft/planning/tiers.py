# SPDX-License-Identifier: Apache-2.0
"""Which tier, horizon and store setting to train with, from what was measured: a function of numbers.

What it goes by, each explained in `docs/inspection.md` with the study that it was drawn from:

1. *The cosine* c of the frozen gradient with the full one. To first order, a step of a given length along a gradient
   at that cosine lowers the loss by c times what the same step along the full gradient does.
2. *The cost* r of a step of tier 2, as a share of a full one. A token that carries gradient costs three forwards: the
   forward, its recomputation, and the gradient of activations; a frozen one costs one, and only where it is encoded.
3. From `ENOUGH` on tier 2 ended where the full gradient did. Below `TOO_LITTLE` nothing was trained, so nothing is
   known. Between, both was seen, and c / r decides: what a unit of time is worth, relative to the full gradient.
4. *The plan*: a gradient that does not fit is not advised where another one does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from frozen_peft.planning.plan import Plan
from frozen_peft.utils.sizes import format_size

__all__ = ["ENOUGH", "TOO_LITTLE", "DataFigures", "GradientFigures", "TierAdvice", "advise_tier"]

ENOUGH = 0.8
TOO_LITTLE = 0.35
# Forwards that a token with gradient costs.
GRADED_COST = 3.0
# Contexts no longer than decisions: a step of tier 2 would save less than a third of a full one.
SHORT_CONTEXT = 1.0
# Of context tokens that another context begins with; below, grouping samples saves less than it mixes them less.
WORTH_GROUPING = 0.1
# Decisions of a sample, on average, from which on a sample is a conversation.
SEVERAL_DECISIONS = 1.5

FULL = -1


@dataclass(frozen=True)
class GradientFigures:
    """What inspection found.

    Attributes:
        cosine: Of the frozen gradient with the full one; None where one of them is zero.
        context_share: Share of the full gradient that passes through the context; None where it is zero.
        horizons: Horizons that were measured beside tier 2, in context tokens, ascending, each with its cosine.
    """

    cosine: float | None
    context_share: float | None
    horizons: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class DataFigures:
    """What the data is like, of the samples as they will be cut.

    Attributes:
        context_tokens: Context tokens of a decision, on average.
        longest_context: Of the decision that has most.
        decision_tokens: Tokens of a decision, on average.
        longest_decision: Of the decision that has most.
        decisions_per_sample: Supervised spans of a sample, on average.
        decisions_per_context: Decisions for each distinct context.
        shared: Share of all context tokens that need not be encoded where every common beginning is encoded once.
        samples_per_step: Samples of an optimizer step.
    """

    context_tokens: float
    longest_context: int
    decision_tokens: float
    longest_decision: int
    decisions_per_sample: float = 1.0
    decisions_per_context: float = 1.0
    shared: float = 0.0
    samples_per_step: int = 1

    @property
    def in_turns(self) -> bool:
        """Whether samples are conversations of several decisions."""
        return self.decisions_per_sample >= SEVERAL_DECISIONS

    @property
    def grouped(self) -> bool:
        """Whether bringing samples together saves anything: beyond what a conversation shares with itself."""
        return not self.in_turns and self.shared >= WORTH_GROUPING and self.samples_per_step > 1

    @property
    def reused(self) -> float:
        """Share of context tokens that need not be encoded again within a step."""
        if self.in_turns:
            return self.shared
        # At best a step encodes one context for all of its samples.
        return min(self.shared, 1.0 - 1.0 / self.samples_per_step) if self.grouped else 0.0

    def cost(self, horizon: int) -> float:
        """Forwards per decision, in tokens.

        Args:
            horizon: Context tokens that carry gradient; 0: tier 2, -1: all of them.
        """
        if horizon == FULL:
            # One pass over a conversation has the gradients of all its decisions.
            whole = self.context_tokens + self.decision_tokens
            return GRADED_COST * whole / (self.decisions_per_sample if self.in_turns else 1.0)
        graded = min(horizon, self.context_tokens)
        frozen = (self.context_tokens - graded) * (1.0 - self.reused)
        return frozen + GRADED_COST * (graded + self.decision_tokens)


@dataclass(frozen=True)
class TierAdvice:
    """What to train with, and why.

    Attributes:
        tier: 1, 2 or 3.
        gradient_horizon: Context tokens that carry gradient; 0: none, -1: all.
        decision_mode: `tail` or `turns`.
        group_by_context: Whether samples whose contexts begin alike come together.
        sentences: Why: the gradient, the cost, the store.
    """

    tier: int
    gradient_horizon: int
    decision_mode: Literal["tail", "turns"]
    group_by_context: bool
    sentences: tuple[str, str, str]

    @property
    def fields(self) -> dict[str, object]:
        """Fields of a recipe, only those that differ from what the tier presets."""
        found: dict[str, object] = {"tier": self.tier}
        if self.tier == 2 and self.gradient_horizon:
            found["gradient_horizon"] = self.gradient_horizon
        if self.decision_mode == "turns":
            found["decision_mode"] = "turns"
        if self.group_by_context:
            found["group_by_context"] = True
        return found


def advise_tier(
    gradient: GradientFigures,
    data: DataFigures,
    frozen_plan: Plan | None = None,
    full_plan: Plan | None = None,
) -> TierAdvice:
    """Advises a tier, a horizon and a store setting.

    Args:
        gradient: What inspection found.
        data: What the data is like.
        frozen_plan: Of tier 2 at the longest context of the data; None: not planned.
        full_plan: Of tier 3; None: not planned.
    """
    horizon, because = _horizon(gradient, data, full_plan)
    tier = 2 if horizon != FULL else 1 if _is_short(data) else 3
    in_turns = data.in_turns and horizon != FULL
    grouped = data.grouped and horizon != FULL
    return TierAdvice(
        tier,
        horizon,
        "turns" if in_turns else "tail",
        grouped,
        (because, _cost_sentence(horizon, data, frozen_plan, full_plan), _store_sentence(horizon, data)),
    )


def _is_short(data: DataFigures) -> bool:
    return data.context_tokens <= SHORT_CONTEXT * data.decision_tokens


def _horizon(gradient: GradientFigures, data: DataFigures, full_plan: Plan | None) -> tuple[int, str]:
    """The horizon to train with, and why, in one sentence."""
    if data.context_tokens == 0 or gradient.cosine is None or gradient.context_share is None:
        reason = "no sample has a context" if data.context_tokens == 0 else "one of the gradients is zero"
        return FULL, f"There is no frozen gradient to compare, since {reason}: train with the full one."
    if _is_short(data):
        return FULL, (
            f"Contexts of {data.context_tokens:,.0f} tokens before decisions of {data.decision_tokens:,.0f} are too "
            "short for freezing to save a third of a step: train with the full gradient."
        )
    found = (
        f"The frozen gradient has a cosine of {gradient.cosine:.2f} with the full one, of which "
        f"{gradient.context_share:.0%} passes through the context"
    )
    if gradient.cosine >= ENOUGH:
        return 0, f"{found}; at {ENOUGH} or more tier 2 ended where the full gradient did: train tier 2."
    full_fits = full_plan is None or full_plan.fits is not False
    reach = _smallest_reach(gradient.horizons)
    if gradient.cosine >= TOO_LITTLE:
        worth = _worth(gradient.cosine, 0, data)
        trial = f"`gradient_horizon: {reach[0]}` (cosine {reach[1]:.2f})" if reach else "tier 3" if full_fits else ""
        check = f", and hold its loss on held-out samples against a short run of {trial}" if trial else ""
        if worth >= 1.0:
            return 0, (
                f"{found}: between {TOO_LITTLE} and {ENOUGH} tier 2 went as far as the full gradient in one study and "
                f"not in another; a unit of its time is worth {worth:.1f} of the full gradient's: train tier 2{check}."
            )
        found += f", and a unit of its time is worth {worth:.1f} of the full gradient's"
    else:
        found += f"; nothing was seen to learn at less than {TOO_LITTLE}"
    best = _best_of(gradient.horizons, data, full_fits=full_fits)
    if best == FULL:
        return FULL, f"{found}: train with the full gradient."
    cosine = dict(gradient.horizons).get(best, gradient.cosine)
    note = "" if full_fits else ", as the full gradient does not fit"
    if best == 0:
        return 0, f"{found}{note} and no horizon was measured: train tier 2, and trust held-out loss alone."
    return best, f"{found}: train the last {best} context tokens too, where the cosine is {cosine:.2f}{note}."


def _smallest_reach(horizons: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    """The shortest horizon whose cosine is enough."""
    return next(((horizon, cosine) for horizon, cosine in horizons if cosine >= ENOUGH), None)


def _worth(cosine: float, horizon: int, data: DataFigures) -> float:
    """Descent per unit of time, relative to the full gradient's."""
    return cosine * data.cost(FULL) / data.cost(horizon)


def _best_of(horizons: Sequence[tuple[int, float]], data: DataFigures, *, full_fits: bool) -> int:
    """The horizon to take where tier 2 is not enough: one whose cosine is, if it is worth it; else the full gradient.

    Where the full one does not fit, the shortest horizon that is enough, or the longest measured.
    """
    reach = _smallest_reach(horizons)
    if full_fits:
        return reach[0] if reach and _worth(reach[1], reach[0], data) > 1.0 else FULL
    if reach:
        return reach[0]
    return horizons[-1][0] if horizons else 0


def _cost_sentence(horizon: int, data: DataFigures, frozen_plan: Plan | None, full_plan: Plan | None) -> str:
    share = data.cost(0) / data.cost(FULL)
    text = (
        f"With {data.context_tokens:,.0f} tokens of context before {data.decision_tokens:,.0f} of decision, a step of "
        f"tier 2 costs about {share:.2f} of a full one"
    )
    if data.reused:
        text += f", where the {data.reused:.0%} of context tokens that repeat are encoded once"
    if horizon > 0:
        text += f", and one of this horizon {data.cost(horizon) / data.cost(FULL):.2f}"
    plans = [
        f"{name} takes {format_size(plan.total_bytes)}{_fitting(plan)}"
        for name, plan in (("tier 2", frozen_plan), ("tier 3", full_plan))
        if plan is not None
    ]
    if plans:
        text += f"; at the longest context, {data.longest_context:,} tokens, by the plan {' and '.join(plans)}"
    return text + "."


def _fitting(plan: Plan) -> str:
    if plan.fits is None:
        return ""
    if plan.fits:
        return ", which fits"
    # Tries many lengths, and is of use where this one is too long.
    longest = plan.longest_context()
    return ", which does not fit" + ("" if longest is None else f" (up to {longest:,} tokens would)")


def _store_sentence(horizon: int, data: DataFigures) -> str:
    found = (
        f"There are {data.decisions_per_context:.1f} decisions for each context, and {data.shared:.0%} of context "
        "tokens repeat the beginning of another one"
    )
    if horizon == FULL:
        return f"{found}; with the full gradient nothing is encoded once, so leave the store off."
    if data.in_turns:
        return (
            f"{found}: `decision_mode: turns` encodes a conversation once for its {data.decisions_per_sample:.1f} "
            "decisions, and adapters that learn change contexts in every step, so leave the store off."
        )
    if data.grouped:
        return (
            f"{found}: `group_by_context: true` encodes them once in a step of {data.samples_per_step} samples, and "
            "adapters that learn change contexts in every step, so leave the store off."
        )
    if data.shared >= WORTH_GROUPING:
        alone = replace(data, samples_per_step=max(data.samples_per_step, 8))
        return (
            f"{found}, which a step of one sample cannot use: with `gradient_accumulation_steps: 8` and "
            f"`group_by_context: true` a step would encode up to {alone.reused:.0%} less."
        )
    return (
        f"{found}, too few to group samples by, and adapters that learn change contexts in every step: leave the "
        "store off, unless `context_adapters: false` keeps contexts good for ever."
    )

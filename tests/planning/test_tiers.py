# SPDX-License-Identifier: Apache-2.0
"""Advice on the tier: what each figure does to it, and that the sentences say the figures."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frozen_peft.context import Decision
from frozen_peft.planning import DataFigures, GradientFigures, Plan, Setting, advise_tier, measure_data
from frozen_peft.planning.tiers import ENOUGH, TOO_LITTLE

GIB = 2**30
# Contexts of 4,000 tokens, each with one decision of 60.
DATA = DataFigures(4_000, 9_000, 60, 80)
BETWEEN = (ENOUGH + TOO_LITTLE) / 2


def plan_of(token_bytes: int, context_length: int = 9_000) -> Plan:
    """The plan of a training that takes so much for every context token, on a card of 30 GiB."""
    setting = Setting(2, context_length, 80)
    return Plan(
        "model",
        setting,
        30 * GIB,
        lambda other: plan_of(token_bytes, other.context_length),
        {"cache": token_bytes * context_length},
    )


def gradient(cosine: float, *horizons: tuple[int, float]) -> GradientFigures:
    return GradientFigures(cosine, 0.7, horizons)


def test_at_a_high_cosine_tier_2() -> None:
    advice = advise_tier(gradient(0.93), DATA)
    assert advice.fields == {"tier": 2}
    assert re.match(r"The frozen gradient has a cosine of 0.93 .* 70% passes through the context", advice.sentences[0])


def test_between_what_a_unit_of_time_is_worth_decides() -> None:
    assert advise_tier(gradient(BETWEEN), DATA).tier == 2
    # Contexts as short as this make a frozen step cost two thirds of a full one.
    short = replace(DATA, context_tokens=70, longest_context=90)
    assert advise_tier(gradient(BETWEEN), short).tier == 3
    # A conversation of twelve decisions is one pass with the full gradient, and twelve contexts without turns.
    turns = replace(DATA, decisions_per_sample=12.0, shared=0.0)
    assert advise_tier(gradient(BETWEEN), turns).tier == 3


def test_at_a_low_cosine_the_horizon_that_is_enough_or_the_full_gradient() -> None:
    low = TOO_LITTLE - 0.1
    assert advise_tier(gradient(low), DATA).fields == {"tier": 3}
    assert advise_tier(gradient(low, (64, 0.5), (256, 0.85)), DATA).fields == {"tier": 2, "gradient_horizon": 256}
    # A horizon of nearly the whole context costs as much as all of it, and has less.
    assert advise_tier(gradient(low, (3_990, 0.85)), DATA).fields == {"tier": 3}


def test_what_does_not_fit_is_not_advised() -> None:
    low = TOO_LITTLE - 0.1
    full, frozen = plan_of(10 << 20), plan_of(1 << 20)
    advice = advise_tier(gradient(low, (64, 0.5), (256, 0.85)), DATA, frozen, full)
    assert advice.fields == {"tier": 2, "gradient_horizon": 256}
    assert advise_tier(gradient(low, (64, 0.5)), DATA, frozen, full).gradient_horizon == 64
    assert advise_tier(gradient(low), DATA, frozen, full).gradient_horizon == 0
    assert advise_tier(gradient(low), DATA, frozen, plan_of(2 << 20)).tier == 3
    assert (
        "tier 2 takes 8.79 GiB, which fits and tier 3 takes 87.89 GiB, which does not fit (up to "
        f"{full.longest_context():,} tokens would)"
    ) in advice.sentences[1]
    assert "9,000 tokens" in advice.sentences[1]


def test_without_contexts_or_with_short_ones_tier_1() -> None:
    nothing = replace(DATA, context_tokens=0, longest_context=0)
    assert advise_tier(gradient(1.0), nothing).fields == {"tier": 1}
    assert advise_tier(gradient(1.0), replace(DATA, context_tokens=50)).fields == {"tier": 1}
    zero = advise_tier(GradientFigures(None, None), DATA)
    assert zero.tier == 3
    assert "one of the gradients is zero" in zero.sentences[0]


def test_what_contexts_have_in_common_decides_the_store() -> None:
    shared = replace(DATA, shared=0.6, decisions_per_context=3.0, samples_per_step=8)
    assert advise_tier(gradient(0.9), shared).fields == {"tier": 2, "group_by_context": True}
    turns = replace(shared, decisions_per_sample=5.0)
    assert advise_tier(gradient(0.9), turns).fields == {"tier": 2, "decision_mode": "turns"}
    alone = advise_tier(gradient(0.9), replace(shared, samples_per_step=1))
    assert alone.fields == {"tier": 2}
    assert "gradient_accumulation_steps: 8" in alone.sentences[2]
    # With the full gradient nothing is encoded once.
    full = advise_tier(gradient(0.1), replace(shared, context_tokens=70))
    assert full.fields == {"tier": 3}


def test_costs_count_tokens() -> None:
    data = replace(DATA, context_tokens=1_000, decision_tokens=100)
    assert data.cost(-1) == 3 * 1_100
    assert data.cost(0) == 1_000 + 3 * 100
    assert data.cost(400) == 600 + 3 * 500
    assert data.cost(5_000) == data.cost(-1)
    # Half of the context tokens are another's too; two samples share at best half of what they encode.
    assert replace(data, shared=0.5, samples_per_step=8).cost(0) == 500 + 300
    assert replace(data, shared=0.9, samples_per_step=2).cost(0) == 500 + 300


COSINES = st.floats(-1, 1)


@given(COSINES, st.floats(0, 2), st.integers(0, 50_000), st.integers(1, 500), st.floats(0, 1), st.integers(1, 64))
def test_advice_is_three_sentences_and_never_worse_at_a_higher_cosine(
    cosine: float, share: float, context: int, decision: int, shared: float, step: int
) -> None:
    data = DataFigures(context, context, decision, decision, shared=shared, samples_per_step=step)
    advice = advise_tier(GradientFigures(cosine, share), data)
    assert len(advice.sentences) == 3
    for sentence in advice.sentences:
        assert sentence.endswith(".")
        assert not re.search(r"\. [A-Z]", sentence)
    if advice.tier == 2:
        assert advise_tier(GradientFigures(min(1.0, cosine + 0.2), share), data).tier == 2


def decision(*tokens: int, length: int = 2) -> Decision:
    return Decision(torch.tensor(tokens, dtype=torch.long), torch.ones(length, dtype=torch.long), torch.ones(length))


def test_data_is_measured_as_it_is_cut() -> None:
    conversation = [decision(1, 2), decision(1, 2, 3, 4, length=4)]
    figures = measure_data([conversation, [decision(1, 2, 3, 9)], [decision()]], samples_per_step=4)
    assert figures == DataFigures(
        context_tokens=10 / 4,
        longest_context=4,
        decision_tokens=10 / 4,
        longest_decision=4,
        decisions_per_sample=4 / 3,
        decisions_per_context=1.0,
        shared=5 / 10,
        samples_per_step=4,
    )
    with pytest.raises(ValueError, match="dataset is empty"):
        measure_data([])


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=8))
def test_what_is_shared_equals_the_nodes_of_the_tree_of_prefixes(contexts: list[list[int]]) -> None:
    figures = measure_data([[decision(*context)] for context in contexts])
    nodes = {tuple(context[:length]) for context in contexts for length in range(1, len(context) + 1)}
    total = sum(map(len, contexts))
    assert figures.shared == pytest.approx(1 - len(nodes) / total if total else 0.0)
    assert figures.decisions_per_context == pytest.approx(len(contexts) / len(set(map(tuple, contexts))))

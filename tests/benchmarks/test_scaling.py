# SPDX-License-Identifier: Apache-2.0
"""The computed costs: sums by hand, what must hold of any rates, and the page that is kept."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.gpu.flops import linear_weights_per_token, prefill_flops
from tests.benchmarks.gpu.shapes import qwen3_5_27b, tiny
from tests.benchmarks.scaling import (
    ARRANGEMENTS,
    Machine,
    Workload,
    checked,
    cost,
    decision_seconds,
    dequantization_seconds,
    gpus_that_the_store_feeds,
    prefill_seconds,
    sft_seconds,
)
from tests.benchmarks.scaling_page import RESULTS, page
from tests.benchmarks.training import build_model

WORK, MACHINE = Workload(qwen3_5_27b()), Machine()


def test_bytes_of_a_context() -> None:
    """64 KiB a token in 16 attention layers, and the states of 48 layers of Gated DeltaNet."""
    assert WORK.context_bytes == 16 * 2 * 4 * 256 * 2 * WORK.context + 48 * (48 * 128**2 * 4 + 10240 * 4 * 2)


def test_times_by_hand() -> None:
    """A machine of round rates: each time is the operations and bytes that the formulas name."""
    machine = Machine(2e12, 0.5, 1e12, 1e9, 1e10)
    work = Workload(tiny(), context=640, decision=64, chunk=128)
    weights = linear_weights_per_token(work.config)
    dequantization = weights * (4.127 / 8 + 4) / 1e12
    assert dequantization_seconds(work, machine) == pytest.approx(dequantization)
    assert dequantization_seconds(replace(work, is_quantized=False), machine) == 0.0
    expected = prefill_flops(work.config, 640).total / 1e12 + 5 * dequantization
    assert prefill_seconds(work, machine) == pytest.approx(expected)
    # One attention layer of two heads of 32; three of GDN with two value heads, 64 tokens each a chunk.
    pairs = 64 * 640 + 64 * 65 / 2
    delta = 2 * (2 * (2 * 64**2 * 32 + 64**2 * 32 + 3 * 64 * 32 * 32) + 64**2 * 64)
    flops = 3 * 2 * 64 * weights + 3.5 * 4 * pairs * 64 + 4 * 3 * delta
    assert decision_seconds(work, machine) == pytest.approx(flops / 1e12 + 3 * dequantization)


@settings(max_examples=60)
@given(
    gpus=st.integers(1, 2048),
    reuse=st.integers(1, 200),
    context=st.integers(64, 1 << 18),
    network=st.floats(1e8, 1e12),
    store=st.floats(1e9, 1e13),
)
def test_what_holds_of_any_rates(gpus: int, reuse: int, context: int, network: float, store: float) -> None:
    machine = replace(MACHINE, network_bytes_per_second=network, store_bytes_per_second=store)
    work = replace(WORK, context=context)
    costs = {name: cost(name, work, machine, gpus, reuse) for name in ARRANGEMENTS}
    # No arrangement is cheaper than all decisions and one encoding of each context.
    least = prefill_seconds(work, machine) / reuse + decision_seconds(work, machine)
    for name in ARRANGEMENTS[:3]:
        assert costs[name] >= least * (1 - 1e-12)
        assert cost(name, work, machine, gpus, reuse + 1) <= costs[name] * (1 + 1e-12) or name == ARRANGEMENTS[0]
    assert costs["own contexts, samples grouped"] <= costs["own contexts, samples scattered"] * (1 + 1e-12)
    assert costs["SFTTrainer"] >= sft_seconds(work, machine)
    if gpus == 1:
        assert costs["shared store"] == pytest.approx(least)
    if reuse <= gpus:
        # Scattered over as many GPUs as samples, nothing is shared.
        single = cost("own contexts, samples scattered", work, machine, gpus, 1)
        assert costs["own contexts, samples scattered"] == pytest.approx(single)


def test_the_store_is_what_costs_beyond_its_limit() -> None:
    limit = gpus_that_the_store_feeds(WORK, MACHINE, 10)
    below, above = (cost("shared store", WORK, MACHINE, round(limit * factor), 10) for factor in (0.9, 1.2))
    assert below == pytest.approx(cost("shared store", WORK, MACHINE, 2, 10), rel=0.01)
    assert above == pytest.approx(round(limit * 1.2) * WORK.context_bytes / MACHINE.store_bytes_per_second)
    assert above > 1.1 * below


def test_the_page_is_what_the_formulas_say_of_what_was_measured() -> None:
    figures = json.loads((RESULTS / "reuse.json").read_text())["figures"]
    checks = checked(figures, build_model().config)
    assert (RESULTS / "scaling.md").read_text() == page(checks), "run `python -m tests.benchmarks.scaling_page`"
    assert (RESULTS / "scaling.png").exists()
    # Its coarsest simplification, that a decision costs the same alone or among others, costs a quarter.
    assert all(abs(check.deviation) < 0.25 for check in checks)

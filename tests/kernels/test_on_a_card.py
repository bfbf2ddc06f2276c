# SPDX-License-Identifier: Apache-2.0
"""The trainer and the benchmark on the stand-in for a card, with flash-linear-attention in Triton's interpreter."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks.gpu import parity
from tests.benchmarks.gpu.schedule import SMOKE
from tests.card import stand_in_card
from tests.gpu_branches import test_trainings
from tests.gpu_branches.test_benchmark import run_on_stand_in
from tests.kernels.card import launches
from tests.reference import random_sample

pytestmark = [pytest.mark.kernels, pytest.mark.slow]


@pytest.fixture
def launched() -> Iterator[Counter[str]]:
    """How often each kernel was launched."""
    with launches() as counts:
        yield counts


def test_a_training_is_that_of_the_cpu(
    tmp_path: Path, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss before and after a step: of prefill, decision and head, forward and backward, by their kernels."""
    monkeypatch.setattr(test_trainings, "ROWS", [random_sample(70, 5)])
    fields = {"max_steps": 2, "per_device_train_batch_size": 1, "verify_context": "never"}
    expected = test_trainings.losses(tmp_path / "cpu", "qwen3_5_text", **fields)
    assert not launched
    with stand_in_card(capability=(8, 0)):
        actual = test_trainings.losses(tmp_path / "card", "qwen3_5_text", **fields)
    assert actual == pytest.approx(expected, rel=test_trainings.TOLERANCE)
    assert launched["fla.chunk_gated_delta_rule_fwd_kernel_h_blockdim64"]
    assert launched["fla.chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64"]
    assert any(name.startswith("trl.") for name in launched)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_benchmark_runs(tmp_path: Path, launched: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter takes a second for what a card does at once.
    plan = dataclasses.replace(
        SMOKE, goal_context=66, contexts=(66,), caps=((24, 66),), profile_context=66, chunk_sizes=(66,)
    )
    monkeypatch.setattr(parity, "SHAPES", ((66, 5),))
    results, _ = run_on_stand_in(tmp_path, monkeypatch, plan)
    assert all(found["holds"] for found in results["parity"])
    assert {(row["outcome"], row["note"]) for row in results["measurements"]} == {("measured", "")}
    kernels = {row["purpose"]: row["kernel"] for row in results["kernels"]}
    assert kernels["prefill, gated delta rule"] == "flash-linear-attention"
    assert launched["fla.chunk_gated_delta_rule_fwd_kernel_h_blockdim64"]

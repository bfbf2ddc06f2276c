# SPDX-License-Identifier: Apache-2.0
"""What two processes do besides training: resume, evaluate first, quantize, refuse; see `extras`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.cases import TWO, Case, reference
from tests.distributed.conftest import TIMEOUT_SECONDS, Results
from tests.distributed.extras import RECIPES
from tests.distributed.preferences import PREFERENCES, expected
from tests.reference import worst_gradient_error
from tests.training.runs import equal
from tests.training.test_predictions import ROWS as CONVERSATIONS
from tests.training.test_predictions import assert_rows_are_the_samples, mean_of_batches

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(TIMEOUT_SECONDS + 120)]


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """Of two steps by one process."""
    return reference(Case(TWO, model="llama"), 2).losses


def of_ranks(results: Callable[[int], Results], name: str) -> list[dict[str, Any]]:
    found = [rank[name] for rank in results(2)]
    for result in found:
        assert "error" not in result, result["error"]
    return found


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(engine: str, results: Callable[[int], Results]) -> None:
    for result in of_ranks(results, "resume"):
        at_once, resumed = result[engine]["at_once"], result[engine]["resumed"]
        assert equal(at_once, resumed)
        assert any(weight.abs().max() > 0 for weight in at_once.values())
        assert {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= set(result[engine]["files"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_an_evaluation_before_training(engine: str, results: Callable[[int], Results], losses: list[float]) -> None:
    untrained = reference(Case(TWO, model="llama", steps=1, learning_rate=0.0), 2).eval_loss
    found = [result[engine] for result in of_ranks(results, "evaluate_first")]
    for result in found:
        assert result["before"] == pytest.approx(untrained, rel=1e-5)
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
    # Where gradients are not reduced, each process ends somewhere else.
    assert equal(found[0]["weights"], found[1]["weights"])


@pytest.mark.parametrize("name", ["one each", "two each"])
def test_a_metric_sees_every_label_once(name: str, results: Callable[[int], Results]) -> None:
    """Of processes with other numbers of decisions, whose last batch holds samples again that were seen before."""
    for result in of_ranks(results, "metrics"):
        logits, labels, inputs = (part.numpy() for part in result[name]["parts"])
        assert_rows_are_the_samples(logits, labels, inputs, CONVERSATIONS)
        if name == "one each":
            assert result[name]["loss"] == pytest.approx(mean_of_batches(CONVERSATIONS, 1), rel=1e-5)


def test_a_base_in_4_bit_is_the_same_whole_and_in_shards(results: Callable[[int], Results]) -> None:
    for result in of_ranks(results, "four_bit"):
        plain, whole, shards = result["ddp"], result["whole"], result["shards"]
        assert plain["num_4bit"] == whole["num_4bit"] > 0
        assert plain["num_shards"] == 0
        # The codes too, whose type is lost where they are shards.
        assert shards["num_shards"] >= whole["num_shards"] + plain["num_4bit"] > plain["num_4bit"]
        for other in (whole, shards):
            assert other["losses"] == pytest.approx(plain["losses"], rel=1e-5)
            assert worst_gradient_error(other["gradients"], plain["gradients"]) <= 1e-5


def test_16_bit_over_shards(results: Callable[[int], Results], losses: list[float]) -> None:
    for result in of_ranks(results, "sixteen_bit"):
        assert result["float32"] == pytest.approx(losses[:1], rel=1e-5)
        assert result["bfloat16"] == pytest.approx(losses[:1], rel=5e-3)
        assert result["bfloat16"] != result["float32"]


def test_what_is_refused_at_start(results: Callable[[int], Results]) -> None:
    """With the same error on every process."""
    first, second = of_ranks(results, "refusals")
    assert first == second
    assert "transformers: " in first["versions"]
    assert " on rank 0, 4.0.0 on rank 1" in first["versions"]
    assert "`checkpoint_every=2` computes several layers again in one go" in first["checkpoint_every"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("fsdp2*.yaml")), ids=lambda path: path.stem)
def test_files_for_accelerate_put_weights_in_shards(
    path: Any, results: Callable[[int], Results], losses: list[float]
) -> None:
    asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    for result in of_ranks(results, "recipes"):
        found = result[path.name]
        assert found["num_shards"] > 0
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        for name, value in asked["fsdp_config"].items():
            assert found["asked"][name.upper()].lower() == str(value).lower()


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_those_of_one_process(name: str, results: Callable[[int], Results]) -> None:
    """Where a process has no context, and with a reference that has its own."""
    case = PREFERENCES[name]
    is_kept = ("precompute_ref_log_probs", True) in case.fields
    for result in of_ranks(results, "preferences"):
        losses, gradients = expected(case, result[name]["weights"])
        assert result[name]["shards"] == (case.engine == "fsdp2")
        # What is computed beforehand TRL keeps in float32, and what is logged goes through it.
        assert result[name]["losses"] == pytest.approx(losses, rel=1e-5 if is_kept else 3e-7)
        assert worst_gradient_error(result[name]["gradients"], gradients) <= (1e-5 if is_kept else 1e-9)


def test_a_tensor_is_compared_in_every_process(results: Callable[[int], Results]) -> None:
    """Ranks end with the same weights, bit for bit."""
    first, second = (rank["fsdp2/tier2"]["weights"] for rank in results(2))
    assert equal(first, second)
    assert all(isinstance(weight, torch.Tensor) for weight in first.values())

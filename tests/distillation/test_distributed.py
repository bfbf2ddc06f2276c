# SPDX-License-Identifier: Apache-2.0
"""Two real processes (gloo) that distil different numbers of turns, or of answers of their own."""

from pathlib import Path

import pytest
import torch

from tests.distillation.own_answers import ROWS, Written, on_policy
from tests.distillation.pairs import Loss, Pair, reference_loss, sharp
from tests.distillation.test_training import spans
from tests.distributed.ranks import run_ranks
from tests.reference import IGNORED, Sample, worst_gradient_error
from tests.training.runs import gradients_of

# Of the first step, one process answers one of its two samples, the other both.
OWN = {"distill_on_policy": 0.5, "max_decisions_per_forward": 2, "seed": 1}
LOSS = Loss(top_k=5, likelihood_weight=0.2)
IDS = torch.arange(3, 54)
INSTRUCTIONS = torch.arange(70, 79)


def instructed(sample: Sample) -> Pair:
    """The sample, and the same with instructions in front."""
    ids = torch.cat([INSTRUCTIONS, sample.input_ids])
    return Pair(sample, Sample(ids, torch.cat([torch.full_like(INSTRUCTIONS, IGNORED), sample.labels])))


CONVERSATIONS = [instructed(spans(IDS, (11, 15), (20, 27), (41, 50))), instructed(spans(IDS.flip(0), (30, 36)))]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_processes_with_different_numbers_of_turns(tmp_path: Path) -> None:
    """Both have the loss and the gradient of one process with every turn of both conversations."""
    results = run_ranks("tests.distillation.distil_rank", tmp_path)
    turns = [instructed(spans(IDS[:stop], (start, stop))) for start, stop in ((11, 15), (20, 27), (41, 50))] + [
        instructed(spans(IDS.flip(0), (30, 36)))
    ]
    model = sharp("llama")
    expected = reference_loss(model, turns, LOSS)
    gradients = gradients_of(expected, model)
    for result in results:
        assert worst_gradient_error(result["gradients"], gradients) <= 1e-5
    assert results[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert results[0]["eval_loss"] == results[1]["eval_loss"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_processes_with_different_numbers_of_answers(written: list[Written], tmp_path: Path) -> None:
    """Processes weigh alike, and write what one process writes."""
    model, loss = sharp("llama"), Loss("reverse_kl")
    results = run_ranks("tests.distillation.own_rank", tmp_path)
    one = on_policy(model, tmp_path / "one", ROWS, **OWN, per_device_train_batch_size=4)
    (batch,) = written
    expected, wrote = torch.zeros((), dtype=torch.float64), {}
    for rank, result in enumerate(results):
        given = [row for row in ROWS[2 * rank : 2 * rank + 2] if prompt_tokens(row) not in result["answered"]]
        wrote[rank] = [Pair(Sample(*each[:2]), Sample(*each[2:])) for each in result["written"]]
        expected = expected + reference_loss(model, [*wrote[rank], *given], loss) / 2
    gradients = gradients_of(expected, model)
    for result in results:
        assert worst_gradient_error(result["gradients"], gradients) <= 1e-5
        assert result["length"] == pytest.approx(one.logs[0]["distill/answer_length"])
    assert results[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert results[0]["eval_loss"] == results[1]["eval_loss"]
    numbers = [len(result["answered"]) for result in results]
    assert sorted(numbers) == [1, 2]
    everywhere = sorted(str(pair) for pairs in wrote.values() for pair in pairs)
    assert everywhere == sorted(map(str, batch.pairs))


def prompt_tokens(row: Pair) -> list[int]:
    return row.student.input_ids[: row.student.boundary + 1].tolist()

# SPDX-License-Identifier: Apache-2.0
"""Two real processes (gloo) that distil conversations with different numbers of turns."""

from pathlib import Path

import pytest
import torch

from tests.distillation.pairs import Loss, Pair, reference_loss, sharp
from tests.distillation.test_training import spans
from tests.distributed.ranks import run_ranks
from tests.reference import IGNORED, Sample, worst_gradient_error
from tests.training.runs import gradients_of

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

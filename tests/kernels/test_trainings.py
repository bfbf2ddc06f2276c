# SPDX-License-Identifier: Apache-2.0
"""A step of the trainer as a card runs it is a step of plain forwards; a fault of a kernel is seen in one."""

import functools
from pathlib import Path

import pytest
import torch

from frozen_peft import FrozenContextTrainer
from frozen_peft.context import use_segmented_attention
from frozen_peft.context.kernels import choose_kernels
from tests.distillation.pairs import Loss, as_dataset, pairs, reference_loss, sharp
from tests.frozen_runs import encode, frozen_logprobs
from tests.kernels.card import on_card, plain_kernels
from tests.kernels.trainings import ARCHITECTURES, FAULTS, WAYS, model_of, planted, step_errors
from tests.reference import random_sample, reference_logprobs, worst_gradient_error
from tests.training.runs import config, gradients_of, train

pytestmark = pytest.mark.kernels

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# What a fault has to come to.
SEEN = 1e-2
# A kernel of the backward of each, which runs where gradient goes through it.
BACKWARD = {
    "qwen3_5_text": "fla.chunk_bwd_kernel_dqkwg",
    "kimi_linear": "fla.chunk_kda_bwd_kernel_intra",
    "bamba": "mamba_ssm._chunk_scan_bwd_dc_kernel",
}
CASES = [(name, way) for name in ARCHITECTURES for way in WAYS]
FAST = {
    ("qwen3_5_text", "tier 2, chunks of 40"),
    ("qwen3_5_text", "tier 3, stretches of 50"),
    ("bamba", "tier 2, chunks of 40"),
}


# Lengths of contexts, and of the decisions behind them.
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129)
ORDER = (128, 1, 65, 2, 127, 63, 1, 64)
MORE = [("qwen3_5_text", 64), ("bamba", 2048), ("bamba", 64), ("kimi_linear", 2048)]


@pytest.mark.parametrize(
    ("name", "way"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_step_is_that_of_plain_forwards(name: str, way: str, tmp_path: Path) -> None:
    errors = step_errors(name, way, tmp_path)
    assert errors.launched[BACKWARD[name]]
    # Forward and backward of TRL's head.
    assert errors.launched["trl._forward_kernel"]
    assert errors.launched["trl._backward_kernel"]
    assert errors.loss <= LOSS_TOLERANCE
    assert (errors.entropy or 0.0) <= LOSS_TOLERANCE
    assert errors.gradient <= GRADIENT_TOLERANCE


def test_the_decision_runs_the_reference_where_the_table_says_so(tmp_path: Path) -> None:
    errors = step_errors("qwen3_5_text", "tier 2", tmp_path, card="B200")
    assert errors.launched["fla.chunk_fwd_kernel_o"]
    assert not errors.launched["fla.chunk_bwd_kernel_dqkwg"]
    assert errors.loss <= LOSS_TOLERANCE
    assert errors.gradient <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, tmp_path: Path) -> None:
    errors = step_errors("qwen3_5_text", "tier 2, chunks of 40", tmp_path, damage=functools.partial(planted, fault))
    assert errors.gradient >= SEEN


@pytest.mark.slow
def test_distillation_on_a_card(tmp_path: Path) -> None:
    """Student and teacher by kernels, the divergence of what they give."""
    model, loss, rows = sharp("qwen3_5_text", **ARCHITECTURES["qwen3_5_text"]), Loss(), pairs(((66, 3), (9, 2)))
    with plain_kernels(model):
        expected = reference_loss(model, rows, loss)
        gradients = gradients_of(expected, model)
    choose_kernels(model)
    with on_card() as launched:
        run = train(FrozenContextTrainer, model, config(tmp_path, max_steps=1, **loss.fields), as_dataset(rows))
    assert launched[BACKWARD["qwen3_5_text"]]
    assert run.losses[0] == pytest.approx(expected.item(), abs=LOSS_TOLERANCE)
    assert worst_gradient_error(run.gradients[0], gradients) <= GRADIENT_TOLERANCE


def test_a_step_in_bfloat16(tmp_path: Path) -> None:
    """Autocast hands the kernels 16 bit; of a step in float32 it keeps what so many digits can."""
    errors = step_errors("qwen3_5_text", "tier 2", tmp_path, bf16=True)
    assert errors.launched[BACKWARD["qwen3_5_text"]]
    assert errors.loss <= 2e-2
    assert errors.gradient <= 1e-1


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [("qwen3_5_text", 2048), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_log_probabilities_of_every_length(name: str, chunk_size: int) -> None:
    """Contexts and decisions around multiples of the kernels' chunks, padded, in one ragged batch."""
    model = model_of(name)
    samples = [
        random_sample(context, 1 + decision, seed=context) for context, decision in zip(LENGTHS, ORDER, strict=True)
    ]
    with plain_kernels(model):
        expected = [reference_logprobs(model, sample.input_ids, sample.boundary) for sample in samples]
    choose_kernels(model)
    assert use_segmented_attention(model)
    with on_card() as launched:
        frozen = encode(model, samples, chunk_size=chunk_size)
        actual = frozen_logprobs(model, samples, frozen, extra_padding=3)
    assert sum(launched.values()) > 0
    assert float((actual - torch.cat(expected)).abs().max()) <= LOSS_TOLERANCE

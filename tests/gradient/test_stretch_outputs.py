# SPDX-License-Identifier: Apache-2.0
"""Stretches that give the hidden states of the labelled end of a sequence alone lose nothing of the gradient."""

from collections.abc import Callable

import pytest
import torch

from frozen_peft.context import encode_context
from frozen_peft.gradient import stretched_forward
from tests.gradient.stretch_cases import (
    SHORT,
    TOLERANCE_FLOAT32,
    TOLERANCE_FLOAT64,
    error_in_double,
    gradients_of,
    in_stretches,
    loss_in_stretches,
    padded,
    reference,
)
from tests.reference import CACHE, random_sample, worst_gradient_error
from tests.tiny_models import ARCHITECTURES, add_lora, tiny_model

BOUNDARY = min(row.boundary for row in SHORT)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_is_that_of_a_plain_backward(name: str) -> None:
    assert error_in_double(name, SHORT, 8, segmented=True, first_output=BOUNDARY) < TOLERANCE_FLOAT64


@pytest.mark.parametrize("size", [2, 7, 62, 63, 64, 65, 100])
@pytest.mark.parametrize("name", ["qwen3_5_text", "llama"])
def test_labels_that_begin_within_before_and_behind_a_stretch(name: str, size: int) -> None:
    """One label in all, for the last token of the first sample; every stretch before it has no output."""
    rows = [random_sample(63, 2, seed=1), random_sample(63, 1, seed=2)]
    assert error_in_double(name, rows, size, segmented=True, first_output=63) < TOLERANCE_FLOAT64


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1", "gemma3_text"])
def test_behind_a_frozen_context(name: str) -> None:
    rows = [random_sample(40, 7, seed=1), random_sample(20, 9, seed=2)]
    assert error_in_double(name, rows, 6, horizon=10, segmented=True, first_output=10) < TOLERANCE_FLOAT64


@pytest.mark.parametrize("size", [8, 500])
def test_the_decoder_gives_these_hidden_states_and_no_others(size: int) -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    batch = padded(SHORT, [0, 0])
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits[:, BOUNDARY:]
        with stretched_forward(model, size, first_output=BOUNDARY):
            actual = model(**batch, use_cache=False).logits
    assert actual.shape == expected.shape
    # What is computed at padding is nobody's.
    own = batch["attention_mask"][:, BOUNDARY:].bool()
    assert (actual - expected)[own].abs().max() < 1e-5


def test_the_auxiliary_loss_of_experts_counts_every_token() -> None:
    model = add_lora(tiny_model("qwen3_5_moe_text"))
    batch = padded(SHORT, [0, 0])

    def gradients(forward: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        return gradients_of(model, forward())

    def loss(first: int) -> torch.Tensor:
        labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
        outputs = model(**batch, labels=labels[:, first:], output_router_logits=True, use_cache=False)
        return outputs.aux_loss

    def in_short_stretches() -> torch.Tensor:
        with stretched_forward(model, 8, first_output=BOUNDARY):
            return loss(BOUNDARY)

    expected = gradients(lambda: loss(0))
    assert max(float(gradient.norm()) for gradient in expected.values()) > 1e-3
    assert worst_gradient_error(gradients(in_short_stretches), expected) < TOLERANCE_FLOAT32


def test_what_is_kept_of_a_longer_sequence_is_keys_and_values_alone() -> None:
    """Nothing as long as the sequence is saved for the backward, and no hidden states of it come out."""
    model = add_lora(tiny_model("llama"))
    row = random_sample(60, 4, seed=1)
    kept: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_in_stretches(model, [row], 16, first_output=row.boundary)
    assert kept
    assert all(len(row.input_ids) not in shape for shape in kept), kept


def test_a_first_output_that_loses_a_label_is_not_the_same_gradient() -> None:
    """The mutant: labels before the first output are left out, and the comparison sees it."""
    model = add_lora(tiny_model("qwen3_5_text"))
    row = SHORT[1]
    expected = reference(model, [row])
    assert worst_gradient_error(in_stretches(model, [row], 8, first_output=row.boundary), expected) < TOLERANCE_FLOAT32
    late = in_stretches(model, [row], 8, first_output=row.boundary + 2)
    assert worst_gradient_error(late, expected) > 100 * TOLERANCE_FLOAT32


def test_embeddings_and_a_frozen_context_with_one_label_each() -> None:
    """The shortest decisions that there are, behind contexts of different lengths."""
    model = add_lora(tiny_model("qwen3_5_text"))
    rows = [random_sample(9, 2, seed=1), random_sample(4, 2, seed=2)]
    horizon = 3
    frozen = encode_context(model, [row.input_ids[: row.boundary - horizon] for row in rows])
    batch = padded(rows, [row.boundary - horizon for row in rows])
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    with stretched_forward(model, 2, first_output=horizon):
        logits = model(inputs_embeds=embeddings, **{CACHE: frozen}, **batch, use_cache=False).logits
    targets = torch.stack([row.input_ids[row.boundary + 1] for row in rows])
    loss = torch.nn.functional.cross_entropy(logits[:, 0], targets)
    assert worst_gradient_error(gradients_of(model, loss), reference(model, rows, horizon)) < TOLERANCE_FLOAT32

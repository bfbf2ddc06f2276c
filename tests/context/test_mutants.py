# SPDX-License-Identifier: Apache-2.0
"""The parity check can fail: any kind of state lost, shifted or mixed up breaks it by a hundred tolerances."""

from functools import cache

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from frozen_peft.context import FrozenContext, encode_context, verify_context
from frozen_peft.errors import ContextMismatchError
from tests.frozen_runs import DAMAGES, encode, frozen_gradients, frozen_logprobs, replaced
from tests.reference import (
    Sample,
    random_sample,
    reference_gradients,
    reference_logprobs,
    relative_error,
    worst_gradient_error,
)
from tests.tiny_models import ARCHITECTURES, REFUSABLE, STATES, add_lora, tiny_model

TOLERANCE = 1e-5
CASES = [(name, kind, damage) for name in ARCHITECTURES for kind in STATES[name] for damage in DAMAGES]


@cache
def _expected(name: str) -> tuple[PeftModel, Sample, torch.Tensor, dict[str, torch.Tensor]]:
    model, sample = add_lora(tiny_model(name)), random_sample(70, 13)
    logprobs = reference_logprobs(model, sample.input_ids, sample.boundary)
    return model, sample, logprobs, reference_gradients(model, [sample])


@cache
def _frozen_contexts(name: str) -> list[FrozenContext]:
    """Of the sample itself, of its context one token behind, and of another sample's context."""
    model, sample, _, _ = _expected(name)
    behind = Sample(torch.cat([sample.input_ids[:1], sample.input_ids[:-1]]), sample.labels)
    return [encode(model, [part]) for part in (sample, behind, random_sample(70, 13, seed=1))]


@pytest.mark.parametrize(("name", "kind", "damage"), CASES)
def test_a_damaged_state_breaks_parity(name: str, kind: str, damage: str) -> None:
    model, sample, logprobs, gradients = _expected(name)
    intact, behind, foreign = _frozen_contexts(name)
    damaged = DAMAGES[damage](intact, kind, behind, foreign)
    assert relative_error(frozen_logprobs(model, [sample], intact), logprobs) <= TOLERANCE
    assert relative_error(frozen_logprobs(model, [sample], damaged), logprobs) >= 100 * TOLERANCE
    assert worst_gradient_error(frozen_gradients(model, [sample], damaged), gradients) >= 100 * TOLERANCE


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1", "gemma3_text"])
def test_rows_that_change_places_break_parity(name: str) -> None:
    model = add_lora(tiny_model(name))
    samples = [random_sample(70, 13), random_sample(70, 13, seed=1)]
    logprobs = torch.cat([reference_logprobs(model, part.input_ids, part.boundary) for part in samples])
    intact, swapped = encode(model, samples), encode(model, samples[::-1])
    assert relative_error(frozen_logprobs(model, samples, intact), logprobs) <= TOLERANCE
    assert relative_error(frozen_logprobs(model, samples, swapped), logprobs) >= 100 * TOLERANCE
    for kind in STATES[name]:
        mixed = replaced(intact, kind, swapped)
        assert relative_error(frozen_logprobs(model, samples, mixed), logprobs) >= 100 * TOLERANCE


@pytest.mark.parametrize("name", REFUSABLE)
def test_an_inexact_architecture_is_refused_or_exact(name: str) -> None:
    model = tiny_model(name)
    sample = random_sample(70, 13)
    if not _is_exact(model, sample):
        with pytest.raises(ContextMismatchError, match=f"{name}.*tier: 1"):
            verify_context(model, sample.input_ids, sample.boundary, chunk_size=2048)


@pytest.mark.parametrize("name", REFUSABLE)
def test_an_inexact_architecture_that_nobody_knows_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frozen_peft.context.models.INEXACT_ARCHITECTURES", {})
    model = tiny_model(name)
    sample = random_sample(70, 13)
    if not _is_exact(model, sample):
        with pytest.raises(ContextMismatchError, match=f"{name}.*tier: 1"):
            verify_context(model, sample.input_ids, sample.boundary, chunk_size=2048)


def _is_exact(model: PreTrainedModel, sample: Sample) -> bool:
    try:
        frozen = encode_context(model, [sample.context])
    except ContextMismatchError:
        return False
    logprobs = reference_logprobs(model, sample.input_ids, sample.boundary)
    return relative_error(frozen_logprobs(model, [sample], frozen), logprobs) <= TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_exact_architecture_passes_verification(name: str) -> None:
    sample = random_sample(70, 13)
    verify_context(add_lora(tiny_model(name)), sample.input_ids, sample.boundary, chunk_size=2048)

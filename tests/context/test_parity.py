# SPDX-License-Identifier: Apache-2.0
"""A decision over a frozen context gives what one plain forward over the whole sequence gives.

Log-probabilities, and the gradient of every adapter weight with a stop-gradient at context positions, agree
with the reference to 1e-5 in float32 and to 1e-12 in float64, whatever the chunk size, the batch, the padding,
the boundary, the order of use and gradient checkpointing.
"""

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from frozen_peft.context import decision_forward, encode_context, use_segmented_attention
from tests.frozen_runs import (
    checkpoint_layers,
    encode,
    fingerprint,
    frozen_gradients,
    frozen_logprobs,
)
from tests.reference import (
    IGNORED,
    Sample,
    double_precision,
    random_sample,
    reference_gradients,
    reference_logprobs,
    relative_error,
    worst_gradient_error,
)
from tests.tiny_models import ARCHITECTURES, SLIDING_WINDOW, add_lora, tiny_model, to_double

TOLERANCE = 1e-5
DOUBLE_TOLERANCE = 1e-12
SLIDING = ("mistral", "gemma3_text", "gpt_oss")


@cache
def _reference(name: str, samples: tuple[Sample, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = add_lora(tiny_model(name))
    logprobs = [reference_logprobs(model, sample.input_ids, sample.boundary) for sample in samples]
    return torch.cat(logprobs), reference_gradients(model, samples)


@cache
def _samples(*shapes: tuple[int, int]) -> tuple[Sample, ...]:
    """One sample for each `(boundary, decision length)`."""
    return tuple(random_sample(*shape, seed=index) for index, shape in enumerate(shapes))


RAGGED = ((65, 11), (0, 6), (129, 2), (7, 70))


def _model(name: str, *, segmented: bool = False, checkpointing: bool = False) -> PeftModel:
    model = add_lora(tiny_model(name))
    if segmented:
        use_segmented_attention(model)
    if checkpointing:
        checkpoint_layers(model)
    return model


def _assert_parity(
    model: PeftModel, name: str, samples: tuple[Sample, ...], *, chunk_size: int = 2048, extra_padding: int = 0
) -> None:
    logprobs, gradients = _reference(name, samples)
    frozen = encode(model, samples, chunk_size=chunk_size)
    actual = frozen_logprobs(model, samples, frozen, extra_padding=extra_padding)
    assert relative_error(actual, logprobs) <= TOLERANCE
    actual = frozen_gradients(model, samples, frozen, extra_padding=extra_padding)
    assert worst_gradient_error(actual, gradients) <= TOLERANCE


@pytest.mark.parametrize(("name", "num_runs"), [("llama", 0), ("qwen3_5_text", 0), ("falcon_h1", 3), ("mistral", 3)])
def test_prefill_is_over_with_the_keys_of_the_last_layer(name: str, num_runs: int) -> None:
    """Where a layer keeps a state as well, or a window, it runs to its end in each of three chunks."""
    model, ended = _model(name), []
    decoder = model.get_base_model().get_decoder()
    list(decoder.layers)[-1].register_forward_hook(lambda *_: ended.append(True))
    encode(model, _samples((20, 4)), chunk_size=7)
    assert len(ended) == num_runs
    # A plain forward is as it was.
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert len(ended) == num_runs + 1


# With segments or without, with checkpoints or without.
MODES = ((False, False), (True, True), (False, True), (True, False))


def _in_pairs(*, opposite: bool = False) -> list[Any]:
    """Each architecture in one mode, and in the opposite one where `opposite` is set; the others in the long run.

    Two tests, one of them with the opposite modes, have every pair of architecture, segments, checkpoints and test.
    """
    chosen = {
        name: tuple(is_on != opposite for is_on in MODES[index % len(MODES)])
        for index, name in enumerate(ARCHITECTURES)
    }
    return [
        pytest.param(name, *mode, marks=() if mode == chosen[name] else pytest.mark.long)
        for name, mode in product(ARCHITECTURES, MODES)
    ]


def _every_second(*values: tuple[Any, ...]) -> list[Any]:
    """The product of two parameters, each pair with one value of the third, which takes turns; the rest is long."""
    return [
        pytest.param(*(parts[at] for parts, at in zip(values, indices, strict=True)), marks=mark)
        for indices in product(*(range(len(parts)) for parts in values))
        for mark in [() if sum(indices) % 2 == 0 else pytest.mark.long]
    ]


@pytest.mark.parametrize(("name", "segmented", "checkpointing"), _in_pairs())
def test_exact_in_double_precision(name: str, segmented: bool, checkpointing: bool) -> None:
    model = to_double(_model(name, segmented=segmented, checkpointing=checkpointing))
    samples = _samples(*RAGGED)
    logprobs, gradients = _double_reference(name)
    with double_precision(model):
        frozen = encode(model, samples, chunk_size=7 if checkpointing else 64)
        actual = frozen_logprobs(model, samples, frozen)
        assert relative_error(actual, logprobs) <= DOUBLE_TOLERANCE
        actual = frozen_gradients(model, samples, frozen)
        assert worst_gradient_error(actual, gradients) <= DOUBLE_TOLERANCE


@cache
def _double_reference(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = to_double(_model(name))
    samples = _samples(*RAGGED)
    with double_precision(model):
        logprobs = [reference_logprobs(model, part.input_ids, part.boundary) for part in samples]
        return torch.cat(logprobs), reference_gradients(model, samples)


@pytest.mark.parametrize(("name", "segmented", "checkpointing"), _in_pairs(opposite=True))
def test_a_ragged_batch_equals_the_plain_forward(name: str, segmented: bool, checkpointing: bool) -> None:
    model = _model(name, segmented=segmented, checkpointing=checkpointing)
    _assert_parity(model, name, _samples(*RAGGED), chunk_size=7 if checkpointing else 64)


@pytest.mark.parametrize(
    ("chunk_size", "boundary", "fast"),
    _every_second((0, 1, 7, 64, 65, 2048), (63, 64, 65, 127, 128, 129), (False, True)),
)
def test_any_chunk_size_and_boundary(chunk_size: int, boundary: int, fast: bool) -> None:
    model = _model("qwen3_5_text", segmented=fast, checkpointing=fast)
    _assert_parity(model, "qwen3_5_text", _samples((boundary, 11)), chunk_size=chunk_size)


# The two tests of single samples below have every architecture with these chunks, too.
@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [1, 65])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "qwen3_5_text"])
def test_chunk_sizes_on_every_architecture(name: str, chunk_size: int) -> None:
    _assert_parity(_model(name), name, _samples((66, 11)), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("name", "chunk_size", "segmented"),
    _every_second(SLIDING, (1, 7, SLIDING_WINDOW - 1, SLIDING_WINDOW, SLIDING_WINDOW + 1), (False, True)),
)
def test_contexts_around_the_sliding_window(name: str, chunk_size: int, segmented: bool) -> None:
    shapes = [(SLIDING_WINDOW + offset, 23) for offset in (-2, -1, 0, 1, 2)]
    _assert_parity(_model(name, segmented=segmented), name, _samples(*shapes), chunk_size=chunk_size)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_extra_padding_around_a_single_sample_changes_nothing(name: str) -> None:
    _assert_parity(_model(name), name, _samples((66, 11)), chunk_size=65, extra_padding=5)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param(name, on, marks=() if on == bool(index % 2) else pytest.mark.long)
        for index, name in enumerate(ARCHITECTURES)
        for on in (False, True)
    ],
)
def test_a_decision_of_one_label(name: str, checkpointing: bool) -> None:
    """In float64: two tokens' gradients in the decay are what is left of sums that cancel."""
    samples = _samples((65, 2))
    assert (samples[0].labels != IGNORED).sum() == 1
    model = to_double(_model(name))
    with double_precision(model):
        logprobs = reference_logprobs(model, samples[0].input_ids, 65)
        gradients = reference_gradients(model, samples)
        if checkpointing:
            checkpoint_layers(model)
        frozen = encode(model, samples)
        actual = frozen_logprobs(model, samples, frozen)
        assert relative_error(actual, logprobs) <= DOUBLE_TOLERANCE
        actual = frozen_gradients(model, samples, frozen)
        assert worst_gradient_error(actual, gradients) <= DOUBLE_TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unsupervised_tokens_inside_a_decision(name: str) -> None:
    sample = random_sample(33, 17)
    labels = sample.labels.clone()
    labels[[36, 37, 41, -1]] = IGNORED
    _assert_parity(_model(name), name, (Sample(sample.input_ids, labels),), chunk_size=1)


def test_a_batch_without_any_context_is_a_plain_batch() -> None:
    _assert_parity(_model("qwen3_5_text"), "qwen3_5_text", _samples((0, 11), (0, 5)))


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1", "gemma3_text"])
def test_reentrant_checkpointing(name: str) -> None:
    model = add_lora(tiny_model(name))
    checkpoint_layers(model, use_reentrant=True)
    _assert_parity(model, name, _samples(*RAGGED))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_context_encoded_without_adapters(name: str) -> None:
    model = add_lora(tiny_model(name), keep=lambda module: not module.endswith("kv_b_proj"))
    samples = _samples((65, 11), (20, 6))
    logprobs, with_adapters = (
        torch.cat([reference_logprobs(model, s.input_ids, s.boundary, context_adapters=active) for s in samples])
        for active in (False, True)
    )
    gradients = reference_gradients(model, samples, context_adapters=False)
    frozen = encode(model, samples, adapters=False, chunk_size=7)
    assert relative_error(frozen_logprobs(model, samples, frozen), logprobs) <= TOLERANCE
    assert worst_gradient_error(frozen_gradients(model, samples, frozen), gradients) <= TOLERANCE
    assert relative_error(with_adapters, logprobs) > 100 * TOLERANCE


def test_adapters_that_would_act_on_a_context_encoded_without_them_are_refused() -> None:
    model = add_lora(tiny_model("kimi_linear"))
    with pytest.raises(ValueError, match="kv_b_proj"):
        encode(model, _samples((20, 6)), adapters=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_frozen_context_serves_decisions_in_any_order_and_never_changes(name: str) -> None:
    """In float64: after 65 tokens in chunks of 7, float32's rounding alone is 1.1e-5 on some processors."""
    model, plain = (to_double(_model(name, checkpointing=checkpointing)) for checkpointing in (True, False))
    base = random_sample(65, 2)
    decisions = [
        Sample(torch.cat([base.context, part.input_ids]), torch.cat([torch.full((65,), IGNORED), part.labels]))
        for part in (random_sample(0, length, seed=length) for length in (9, 17))
    ]
    results: dict[int, list] = {0: [], 1: []}
    with double_precision(model):
        frozen = encode(model, [base], chunk_size=7)
        before = fingerprint(frozen, name)
        num_bytes = frozen.num_bytes
        assert before
        for index in (0, 1, 1, 0):
            samples = [decisions[index]]
            outcome = frozen_logprobs(model, samples, frozen), frozen_gradients(model, samples, frozen)
            results[index].append(outcome)
        assert fingerprint(frozen, name) == before
        assert frozen.num_bytes == num_bytes
    for index, outcomes in results.items():
        sample = decisions[index]
        with double_precision(plain):
            logprobs = reference_logprobs(plain, sample.input_ids, sample.boundary)
            gradients = reference_gradients(plain, [sample])
        for outcome in outcomes:
            assert torch.equal(outcome[0], outcomes[0][0])
            assert all(torch.equal(outcome[1][key], value) for key, value in outcomes[0][1].items())
        assert relative_error(outcomes[0][0], logprobs) <= DOUBLE_TOLERANCE
        assert worst_gradient_error(outcomes[0][1], gradients) <= DOUBLE_TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changing_any_context_token_changes_the_loss(name: str) -> None:
    model = _model(name)
    sample = random_sample(40, 11)
    variants = [sample]
    for position in range(sample.boundary):
        input_ids = sample.input_ids.clone()
        input_ids[position] = 3 + (input_ids[position] - 3 + 1) % 90
        variants.append(Sample(input_ids, sample.labels))
    frozen = encode(model, variants)
    logprobs = frozen_logprobs(model, variants, frozen).view(len(variants), -1)
    for changed in logprobs[1:]:
        assert relative_error(changed, logprobs[0]) > 100 * TOLERANCE
        # Changes of single tokens may nearly cancel in the loss; its rounding is below 1e-6.
        assert abs(changed.mean() - logprobs[0].mean()) > 1e-6


def test_a_frozen_context_carries_no_gradient() -> None:
    frozen = encode(_model("qwen3_5_text"), _samples((20, 5)))
    seen = []
    for kind in ("keys_values", "conv", "recurrent"):
        frozen.mutated(kind, lambda state: seen.append(state) or state)
    assert seen
    assert not any(state.requires_grad for state in seen)


def test_the_model_is_left_as_it_was() -> None:
    model = _model("qwen3_5_text", checkpointing=True)
    samples = _samples((20, 5))
    modes = [module.training for module in model.modules()]
    frozen_gradients(model, samples, encode(model, samples))
    assert [module.training for module in model.modules()] == modes
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert not any(layer._can_checkpoint_with_cache for layer in layers)
    # A plain forward inside the context manager is a plain forward.
    with decision_forward(model), torch.no_grad():
        inside = model(input_ids=samples[0].input_ids[None], use_cache=False).logits
    with torch.no_grad():
        outside = model(input_ids=samples[0].input_ids[None], use_cache=False).logits
    assert torch.equal(inside, outside)


def test_dropout_is_off_in_prefill_and_on_in_the_decision() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Dropout(0.5)
    samples = _samples((20, 5))
    quiet = encode(model.eval(), samples)
    model.train()
    frozen = encode(model, samples)
    assert fingerprint(frozen, "qwen3_5_text") == fingerprint(quiet, "qwen3_5_text")
    first, second = (frozen_logprobs(model, samples, frozen) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_negative_chunk_size_is_refused() -> None:
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        encode_context(tiny_model("llama"), [torch.tensor([3, 4, 5])], chunk_size=-1)

# SPDX-License-Identifier: Apache-2.0
"""Running out of memory in prefill: smaller chunks and the same result, or an error with advice; never a lost state.

A CPU does not raise `torch.OutOfMemoryError`, so it is raised here in the middle of a forward, after some layers have
written to their cache.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from frozen_peft.context import ContextEncoder, ContextStore, FrozenContext, use_segmented_attention
from frozen_peft.context.halving import MIN_FORWARD_TOKENS, AdvisedOutOfMemoryError, halved_chunk
from frozen_peft.context.models import get_decoder, get_pretrained_model
from tests.frozen_runs import frozen_gradients, frozen_logprobs
from tests.reference import (
    random_sample,
    reference_gradients,
    reference_logprobs,
    relative_error,
    worst_gradient_error,
)
from tests.tiny_models import ARCHITECTURES, add_lora, tiny_model

TOLERANCE = 1e-5


@contextmanager
def out_of_memory(model: nn.Module, fails: Callable[[int, int], bool], layer: int = -1) -> Iterator[list[int]]:
    """Lets a decoder layer raise as CUDA does where `fails(number of the forward, its tokens)` says so.

    Yields the tokens of every forward that began, failed ones as negative numbers.
    """
    decoder = get_decoder(get_pretrained_model(model))
    layers = next(part for name, part in decoder.named_children() if isinstance(part, nn.ModuleList))
    begun: list[int] = []

    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        begun.append(kwargs["input_ids"].numel())

    failing = layers[layer]
    forward = failing.forward

    def run_and_fail(*args: object, **kwargs: object) -> object:
        # When the layer is over, by whatever way, its part of the cache is written.
        try:
            return forward(*args, **kwargs)
        finally:
            if fails(len(begun) - 1, begun[-1]):
                begun[-1] = -begun[-1]
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    failing.forward = run_and_fail
    try:
        yield begun
    finally:
        handle.remove()
        del failing.forward


def _tensors(frozen: FrozenContext) -> list[torch.Tensor]:
    return [tensor for row in frozen.rows for tensor in row.tensors()]


@pytest.mark.parametrize(("name", "layer"), [(name, -1) for name in ARCHITECTURES] + [("qwen3_5_text", 0)])
def test_the_result_is_that_of_a_plain_forward(name: str, layer: int) -> None:
    """Every architecture: the second chunk fails, after the first has been written, before or after the last layer."""
    model = add_lora(tiny_model(name))
    use_segmented_attention(model)
    sample = random_sample(300, 9)
    encoder = ContextEncoder(model, chunk_size=200)
    with out_of_memory(model, lambda index, tokens: index == 1, layer) as begun:
        frozen = encoder.encode([sample.context])
    assert begun == [200, -100, 100, 100, 100]
    assert encoder.chunk_size == 100
    expected = reference_logprobs(model, sample.input_ids, sample.boundary)
    assert relative_error(frozen_logprobs(model, [sample], frozen), expected) <= TOLERANCE
    gradients = frozen_gradients(model, [sample], frozen)
    assert worst_gradient_error(gradients, reference_gradients(model, [sample])) <= TOLERANCE


def test_what_went_before_does_not_show_in_a_single_bit() -> None:
    """After a failure in chunks of 256, the states are those of chunks of 128, bit for bit."""
    model = add_lora(tiny_model("qwen3_5_text"))
    use_segmented_attention(model)
    contexts = [random_sample(length, 2, seed=length).context for length in (600, 130)]
    undisturbed = ContextEncoder(model, chunk_size=128).encode(contexts)
    with out_of_memory(model, lambda index, tokens: index == 2):
        disturbed = ContextEncoder(model, chunk_size=256).encode(contexts)
    pairs = zip(_tensors(disturbed), _tensors(undisturbed), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 260), min_size=1, max_size=4),
    chunk=st.sampled_from([0, 70, 128, 512]),
    failing=st.sets(st.integers(0, 12), max_size=2),
    layer=st.integers(-4, -1),
)
def test_any_forward_may_fail(lengths: list[int], chunk: int, failing: set[int], layer: int) -> None:
    """Contexts of any lengths, several of one length among them, with and without failures."""
    model = tiny_model("qwen3_5_text")
    use_segmented_attention(model)
    contexts = [random_sample(length, 2, seed=index % 2).context for index, length in enumerate(lengths)]
    expected = ContextEncoder(model, chunk_size=chunk).encode(contexts)
    encoder = ContextEncoder(model, chunk_size=chunk)
    with out_of_memory(model, lambda index, tokens: index in failing and tokens > MIN_FORWARD_TOKENS, layer):
        actual = encoder.encode(contexts)
    assert actual.lengths == expected.lengths
    for left, right in zip(actual.rows, expected.rows, strict=True):
        for state, wanted in zip(left.layers, right.layers, strict=True):
            pairs = []
            if state.attention is not None and wanted.attention is not None:
                pairs += [(torch.cat(state.attention.keys, -2), torch.cat(wanted.attention.keys, -2))]
                pairs += [(torch.cat(state.attention.values, -2), torch.cat(wanted.attention.values, -2))]
            if state.linear is not None and wanted.linear is not None:
                pairs += [(state.linear.conv[0], wanted.linear.conv[0])]
                pairs += [(state.linear.recurrent[0], wanted.linear.recurrent[0])]
            for found, reference in pairs:
                assert relative_error(found, reference) <= TOLERANCE


def test_contexts_that_ran_together_run_apart() -> None:
    model = tiny_model("qwen3_5_text")
    contexts = [random_sample(32, 2, seed=seed).context for seed in range(8)]
    encoder = ContextEncoder(model, chunk_size=256)
    with out_of_memory(model, lambda index, tokens: tokens > 100) as begun:
        encoder.encode(contexts)
    assert begun == [-256, -128, 64, 64, -128, 64, 64]
    assert encoder.chunk_size == 64


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    encoder = ContextEncoder(model, chunk_size=512)
    with caplog.at_level(logging.WARNING), out_of_memory(model, lambda index, tokens: tokens > 64):
        encoder.encode([random_sample(500, 2).context])
        encoder.encode([random_sample(200, 2, seed=1).context])
    (record,) = caplog.records
    assert "`prefill_chunk_size=512`: going on with 250" in record.getMessage()
    assert encoder.chunk_size == 64


def test_no_chunk_is_small_enough() -> None:
    """It ends with PyTorch's text, the context's length and the fields to change; the encoder stays usable."""
    model = tiny_model("qwen3_5_text")
    encoder = ContextEncoder(model, chunk_size=256, store=ContextStore(1 << 30))
    context = random_sample(300, 2).context
    with (
        out_of_memory(model, lambda index, tokens: True) as begun,
        pytest.raises(AdvisedOutOfMemoryError, match=r"(?s)CUDA out of memory.*300 tokens.*64 tokens.*`max_context_"),
    ):
        encoder.encode([context])
    assert begun == [-256, -128, -64]
    expected = ContextEncoder(model, chunk_size=64).encode([context])
    pairs = zip(_tensors(encoder.encode([context])), _tensors(expected), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_weights_in_shards_are_not_run_in_other_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes wait for their part of the same forwards: an error, at once, that names the chunk's field."""
    model = tiny_model("llama")
    encoder = ContextEncoder(model, chunk_size=256)
    monkeypatch.setattr("frozen_peft.context.encoder.are_sharded", lambda model: True)
    with (
        out_of_memory(model, lambda index, tokens: True) as begun,
        pytest.raises(
            AdvisedOutOfMemoryError, match=r"256 tokens at a time. Lower `prefill_chunk_size`, `max_context"
        ),
    ):
        encoder.encode([random_sample(300, 2).context])
    assert begun == [-256]


def test_what_was_encoded_before_is_kept() -> None:
    """The second context fails for good; the first is in the store, whole."""
    model = tiny_model("qwen3_5_text")
    encoder = ContextEncoder(model, chunk_size=64, adapters=True, store=ContextStore(1 << 30, max_staleness=9))
    first, second = random_sample(64, 2).context, random_sample(128, 2, seed=1).context
    with out_of_memory(model, lambda index, tokens: index > 0), pytest.raises(torch.OutOfMemoryError):
        encoder.encode([first, second])
    with out_of_memory(model, lambda index, tokens: True) as begun:
        found = encoder.encode([first])
    assert begun == []
    expected = ContextEncoder(model, chunk_size=64).encode([first])
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_another_error_passes() -> None:
    model = tiny_model("llama")
    encoder = ContextEncoder(model, chunk_size=64)
    decoder = get_decoder(model)
    handle = decoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        encoder.encode([random_sample(100, 2).context])
    handle.remove()
    assert encoder.chunk_size == 64


@given(st.integers(1, 1 << 20))
def test_halving_ends(num_tokens: int) -> None:
    sizes = [num_tokens]
    while (smaller := halved_chunk(sizes[-1])) is not None:
        assert MIN_FORWARD_TOKENS <= smaller < sizes[-1]
        sizes.append(smaller)
    assert len(sizes) <= 16
    assert sizes[-1] <= MIN_FORWARD_TOKENS


@pytest.mark.gpu
def test_a_card_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's own limit, set to a little above what the context's cache takes."""
    model = tiny_model("qwen3_5_text", hidden_size=256, intermediate_size=8192).cuda()
    use_segmented_attention(model)
    context = random_sample(4000, 2).context
    expected = ContextEncoder(model, chunk_size=256).encode([context])
    del expected
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # Gate, up and their product of 2,048 tokens in float32 are 192 MiB.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (100 << 20)) / total)
    try:
        encoder = ContextEncoder(model, chunk_size=2048)
        frozen = encoder.encode([context])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 64 <= encoder.chunk_size < 2048
    again = ContextEncoder(model, chunk_size=encoder.chunk_size).encode([context])
    assert all(torch.equal(left, right) for left, right in zip(_tensors(frozen), _tensors(again), strict=True))

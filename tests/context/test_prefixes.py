# SPDX-License-Identifier: Apache-2.0
"""Contexts that begin alike are encoded once, and each is what it would be by itself."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frozen_peft.context import ContextEncoder, encode_context, use_segmented_attention
from frozen_peft.context.keys import prefix_keys
from frozen_peft.context.prefixes import MIN_SHARED_TOKENS, PrefixPlan
from tests.frozen_runs import checkpoint_layers, decision_logits, frozen_gradients, frozen_logprobs
from tests.reference import (
    IGNORED,
    Sample,
    double_precision,
    reference_gradients,
    reference_logprobs,
    relative_error,
    worst_gradient_error,
)
from tests.tiny_models import ARCHITECTURES, add_lora, tiny_model, to_double

DOUBLE_TOLERANCE = 1e-12
TOLERANCE = 1e-5


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 95, (count,), generator=torch.Generator().manual_seed(seed))


def sample(context: torch.Tensor, decision: int, seed: int) -> Sample:
    input_ids = torch.cat([context, tokens(decision, 1000 + seed)])
    labels = input_ids.clone()
    labels[: len(context) + 1] = IGNORED
    return Sample(input_ids, labels)


def family() -> list[Sample]:
    """Contexts that are equal, extend each other, branch off early and late, share nothing, and an empty one."""
    trunk, late = tokens(66, 1), tokens(40, 2)
    contexts = [
        torch.cat([trunk, late]),
        trunk,
        torch.cat([trunk, late[:25], tokens(9, 3)]),
        tokens(31, 4),
        trunk,
        torch.cat([trunk[:20], tokens(50, 5)]),
        trunk[:0],
        trunk[:1],
        torch.cat([trunk, late, tokens(1, 6)]),
    ]
    return [sample(context, 3 + seed % 4, seed) for seed, context in enumerate(contexts)]


def encode_family(model: torch.nn.Module, samples: Sequence[Sample], chunk_size: int = 2048):
    return encode_context(model, [each.context for each in samples], chunk_size=chunk_size)


@pytest.mark.parametrize(("segmented", "checkpointing", "chunk_size"), [(False, False, 2048), (True, True, 7)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_family_of_contexts_is_exact(name: str, segmented: bool, checkpointing: bool, chunk_size: int) -> None:
    model = add_lora(tiny_model(name))
    if segmented:
        use_segmented_attention(model)
    if checkpointing:
        checkpoint_layers(model)
    model = to_double(model)
    samples = family()
    with double_precision(model):
        frozen = encode_family(model, samples, chunk_size)
        logprobs = torch.cat([reference_logprobs(model, each.input_ids, each.boundary) for each in samples])
        assert relative_error(frozen_logprobs(model, samples, frozen), logprobs) <= DOUBLE_TOLERANCE
        gradients = reference_gradients(model, samples)
        assert worst_gradient_error(frozen_gradients(model, samples, frozen), gradients) <= DOUBLE_TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "gemma3_text"])
def test_a_family_in_single_precision(name: str) -> None:
    model = add_lora(tiny_model(name))
    use_segmented_attention(model)
    samples = family()
    frozen = encode_family(model, samples)
    logprobs = torch.cat([reference_logprobs(model, each.input_ids, each.boundary) for each in samples])
    assert relative_error(frozen_logprobs(model, samples, frozen), logprobs) <= TOLERANCE
    assert worst_gradient_error(frozen_gradients(model, samples, frozen), reference_gradients(model, samples)) <= (
        TOLERANCE
    )


@pytest.mark.parametrize("name", ["qwen3_5_text", "mistral", "falcon_h1", "lfm2"])
def test_what_extends_a_context_leaves_it_as_it_was(name: str) -> None:
    model = add_lora(tiny_model(name))
    encoder = ContextEncoder(model)
    short, long = tokens(66, 1), torch.cat([tokens(66, 1), tokens(9, 2)])
    encoder.expect([short, long])
    (row,) = encoder.encode([short]).rows
    before = [tensor.clone() for tensor in row.tensors()]
    encoder.encode([long])
    assert encoder.counts.num_tokens_encoded == len(long)
    assert all(torch.equal(left, right) for left, right in zip(before, row.tensors(), strict=True))


def test_keys_and_values_of_a_prefix_are_not_copied() -> None:
    model = add_lora(tiny_model("llama"))
    short, long = tokens(66, 1), torch.cat([tokens(66, 1), tokens(9, 2)])
    frozen = encode_context(model, [short, long])
    storages = [{tensor.untyped_storage().data_ptr() for tensor in row.tensors()} for row in frozen.rows]
    assert storages[0] < storages[1]
    alone = encode_context(model, [long])
    assert frozen.num_bytes == alone.num_bytes


def trie_size(contexts: Sequence[Sequence[int]]) -> int:
    """Tokens to encode when everything is shared: the number of different non-empty prefixes."""
    return len({tuple(context[:length]) for context in contexts for length in range(1, len(context) + 1)})


@pytest.mark.parametrize("order", ["given", "reversed", "shuffled"])
def test_each_token_is_encoded_once_in_a_step_whatever_the_order(order: str) -> None:
    """Over several batches of one step; a prefix that only a later batch asks for is kept for it."""
    model = tiny_model("qwen3_5_text")
    trunk, late = tokens(66, 1), tokens(40, 2)
    contexts = [
        torch.cat([trunk, late]), trunk, torch.cat([trunk, late[:25], tokens(9, 3)]),
        torch.cat([trunk[:20], tokens(50, 5)]), trunk, tokens(31, 4),
    ]  # fmt: skip
    contexts = {"given": contexts, "reversed": contexts[::-1], "shuffled": [contexts[i] for i in (3, 0, 5, 4, 2, 1)]}[
        order
    ]
    encoder = ContextEncoder(model)
    encoder.expect(contexts)
    for start in range(0, len(contexts), 2):
        batch = contexts[start : start + 2]
        frozen = encoder.encode(batch)
        for row, context in zip(frozen.rows, batch, strict=True):
            alone = encode_context(model, [context]).rows[0]
            for left, right in zip(row.layers, alone.layers, strict=True):
                if left.attention is not None:
                    assert relative_error(torch.cat(left.attention.keys, -2), right.attention.keys[0]) <= TOLERANCE
                else:
                    assert relative_error(left.linear.recurrent[0], right.linear.recurrent[0]) <= TOLERANCE
    assert encoder.counts.num_tokens_encoded == trie_size([context.tolist() for context in contexts])
    assert encoder.counts.num_tokens_asked == sum(map(len, contexts))
    assert not encoder._kept


def test_nothing_is_shared_across_steps_without_a_store() -> None:
    encoder = ContextEncoder(tiny_model("llama"))
    for step in range(3):
        encoder.expect([tokens(20, 1)] * 2, step=step)
        encoder.encode([tokens(20, 1)], step=step)
    assert encoder.counts.num_tokens_encoded == 60
    encoder.encode([tokens(20, 1)], step=3)
    assert encoder.counts.num_tokens_encoded == 80


def test_the_order_of_rows_is_that_of_the_contexts() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    samples = family()[::-1]
    frozen = encode_family(model, samples)
    assert frozen.lengths == [each.boundary for each in samples]
    logits = decision_logits(model, samples, frozen)
    for each, rows in zip(samples, logits, strict=True):
        alone = decision_logits(model, [each], encode_family(model, [each]) if each.boundary else None)
        assert relative_error(rows, alone[0]) <= TOLERANCE


small_contexts = st.lists(st.lists(st.integers(0, 2), max_size=40), max_size=8)


@settings(max_examples=300, deadline=None)
@given(small_contexts, st.lists(st.integers(0, 30), max_size=8))
def test_cuts_are_ends_and_branches(contexts: list[list[int]], repeats: list[int]) -> None:
    """Against all pairs: the ends of other contexts, and branches that are late enough."""
    trunk = [1, 2, 0, 0, 1] * 6
    contexts = contexts + [[*trunk[:length], 2, 1] for length in repeats]
    plan = PrefixPlan([np.array(context, dtype=np.int64) for context in contexts])
    for context in contexts:
        if not context:
            continue
        expected = {len(context)}
        for other in contexts:
            common = 0
            while common < min(len(context), len(other)) and context[common] == other[common]:
                common += 1
            if common >= MIN_SHARED_TOKENS or (common and common == len(other)):
                expected.add(common)
        array = np.array(context, dtype=np.int64)
        key = prefix_keys(array, [len(context)])[len(context)]
        assert key in plan
        assert [cut.num_tokens for cut in plan.cuts(key)] == sorted(expected)
        assert list(plan.cuts(key)) == list(prefix_keys(array, expected).values())


def test_a_plan_knows_what_is_to_come() -> None:
    short, long = np.arange(20), np.arange(30)
    plan = PrefixPlan([short, long, long])
    (short_key,), (long_key,) = (prefix_keys(array, [len(array)]).values() for array in (short, long))
    assert plan.cuts(long_key) == (short_key, long_key)
    plan.finish(short_key)
    assert plan.is_to_come(short_key)
    assert short_key not in plan or plan.is_to_come(short_key)
    plan.finish(long_key)
    assert plan.is_to_come(short_key)
    plan.finish(long_key)
    assert not plan.is_to_come(short_key)
    assert long_key not in plan

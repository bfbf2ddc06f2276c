# SPDX-License-Identifier: Apache-2.0
"""Candidates decoded over frozen contexts are those of plain `generate`, and of the distribution they claim."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from frozen_peft.context import encode_context, generate_over, use_segmented_attention
from frozen_peft.context.writable import growing_cache
from frozen_peft.errors import UnsupportedArchitectureError
from tests.tiny_models import ARCHITECTURES, SLIDING_WINDOW, VOCAB_SIZE, add_lora, tiny_model

STOP = (2, 5)
NUM_NEW = 12


def prompts_of(lengths: list[int], shared: int = 20, seed: int = 0) -> list[list[int]]:
    """Prompts that begin alike, each of its own length."""
    generator = np.random.default_rng(seed)
    beginning = generator.integers(6, VOCAB_SIZE, shared).tolist()
    return [(beginning + generator.integers(6, VOCAB_SIZE, length).tolist())[:length] for length in lengths]


def decoded(model: torch.nn.Module, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    frozen = encode_context(model, [torch.tensor(prompt[:-1]) for prompt in prompts], chunk_size=8)
    before = [tensor.clone() for row in frozen.rows for tensor in row.tensors()]
    options = {"draws": None, "max_new_tokens": NUM_NEW, "stop_tokens": STOP} | options
    result = generate_over(model, frozen, prompts, **options)
    after = [tensor for row in frozen.rows for tensor in row.tensors()]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    return result


def plain_greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The likeliest tokens by whole forwards, without any cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NUM_NEW):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            if tokens[-1] in STOP:
                break
    return tokens[len(prompt) :]


def check_against_plain_forwards(name: str, model: PreTrainedModel) -> None:
    prompts = prompts_of([40, 2 * SLIDING_WINDOW + 7, SLIDING_WINDOW - 3, 40])
    reference = tiny_model(name)
    assert decoded(model, prompts) == [plain_greedy(reference, prompt) for prompt in prompts]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_decoding_is_that_of_plain_forwards(name: str) -> None:
    model = tiny_model(name)
    use_segmented_attention(model)
    check_against_plain_forwards(name, model)


@pytest.mark.parametrize("name", ["qwen3_5_text", "llama", "gemma3_text", "falcon_h1"])
def test_the_same_where_attention_reads_no_segments(name: str) -> None:
    check_against_plain_forwards(name, tiny_model(name))


@pytest.mark.parametrize("kind", ["keys_values", "conv", "recurrent"])
def test_a_lost_state_changes_what_is_decoded(kind: Any) -> None:
    model = tiny_model("qwen3_5_text")
    use_segmented_attention(model)
    (prompt,) = prompts_of([40])
    frozen = encode_context(model, [torch.tensor(prompt[:-1])])
    options: dict[str, Any] = {"draws": None, "max_new_tokens": NUM_NEW, "stop_tokens": STOP}
    right = generate_over(model, frozen, [prompt], **options)
    assert generate_over(model, frozen.mutated(kind, torch.zeros_like), [prompt], **options) != right


def test_adapters_are_on() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    prompts = prompts_of([30, 12])
    assert decoded(model, prompts) == [plain_greedy(model.get_base_model(), prompt) for prompt in prompts]
    with model.disable_adapter():
        assert decoded(model, prompts) == [plain_greedy(tiny_model("qwen3_5_text"), prompt) for prompt in prompts]


def test_prompts_of_one_token() -> None:
    model = tiny_model("qwen3_5_text")
    expected = [plain_greedy(model, prompt) for prompt in ([7], [8])]
    assert generate_over(model, None, [[7], [8]], draws=None, max_new_tokens=NUM_NEW, stop_tokens=STOP) == expected
    mixed = prompts_of([30])[0]
    assert decoded(model, [[7], mixed]) == [expected[0], plain_greedy(model, mixed)]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.3, 0.7, 0), (1.3, 1.0, 9), (1.3, 0.7, 9)]
)
def test_tokens_are_drawn_from_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    model = tiny_model("llama")
    (prompt,) = prompts_of([20])
    num_rows = 1000
    frozen = encode_context(model, [torch.tensor(prompt[:-1])]).select([0] * num_rows)
    # Evenly spread numbers, so that counts are those of the distribution to within one row.
    draws = (np.arange(num_rows)[:, None] + 0.5) / num_rows
    rows = generate_over(
        model, frozen, [prompt] * num_rows, draws=draws, max_new_tokens=1, stop_tokens=STOP,
        temperature=temperature, top_p=top_p, top_k=top_k,
    )  # fmt: skip
    counts = torch.bincount(torch.tensor(rows)[:, 0], minlength=VOCAB_SIZE)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double() / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values.min()] = float("-inf")
    expected = nucleus(logits.softmax(-1), top_p)
    assert (counts - num_rows * expected).abs().max() <= 1.0
    assert (counts > 0).sum() > 5


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The fewest of the likeliest tokens that come to `top_p`, their probabilities scaled to 1."""
    order = probabilities.argsort(descending=True)
    kept, total = torch.zeros_like(probabilities), 0.0
    for token in order.tolist():
        if total >= top_p:
            break
        kept[token] = probabilities[token]
        total += float(probabilities[token])
    return kept / kept.sum()


def test_a_candidate_does_not_depend_on_the_rows_beside_it() -> None:
    model = tiny_model("qwen3_5_text")
    use_segmented_attention(model)
    prompts = prompts_of([40, 25, 33])
    draws = np.random.default_rng(0).random((3, NUM_NEW))
    together = decoded(model, prompts, draws=draws)
    alone = [decoded(model, [prompts[row]], draws=draws[row : row + 1])[0] for row in range(3)]
    assert together == alone
    assert decoded(model, prompts, draws=draws[::-1].copy()) != together


def test_numbers_at_the_ends_give_tokens_that_can_be() -> None:
    model = tiny_model("llama")
    (prompt,) = prompts_of([20])
    draws = np.array([[0.0], [np.nextafter(1.0, 0.0)]])
    rows = decoded(model, [prompt] * 2, draws=draws, max_new_tokens=1, top_p=0.3)
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    possible = nucleus(probabilities, 0.3).nonzero()[:, 0]
    assert [row[0] for row in rows] == [int(possible[0]), int(possible[-1])]


def test_candidates_over_one_context_hold_one_context() -> None:
    model = tiny_model("llama")
    use_segmented_attention(model)
    frozen = encode_context(model, [torch.tensor(prompts_of([200])[0])]).select([0] * 16)
    cache = growing_cache(model, frozen)
    kept = [piece for layer in cache.layers for state in layer.past for piece in (*state.keys, *state.values)]
    assert len({piece.data_ptr() for piece in kept}) == 2 * len(cache.layers)


def test_architectures_with_other_states_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    frozen = encode_context(model, [torch.tensor([7, 8, 9])])
    monkeypatch.setattr("frozen_peft.context.writable.can_extend", lambda model: False)
    with pytest.raises(UnsupportedArchitectureError, match="`llama` cannot be decoded"):
        growing_cache(model, frozen)

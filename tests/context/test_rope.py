# SPDX-License-Identifier: Apache-2.0
"""Where positions depend on how long a forward is, a part of a sample has those of the whole sample.

Each kind of such model is held to one plain forward per sample, at lengths on both sides of its limit: within it, with
a decision that crosses it, and with a context beyond it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from frozen_peft.context import (
    ContextEncoder,
    ContextStore,
    ContextTokens,
    FrozenContext,
    encode_context,
    generate_over,
    rope,
    use_segmented_attention,
    verify,
    verify_context,
)
from frozen_peft.context.rope import rope_limits
from frozen_peft.errors import ContextMismatchError, UnsupportedArchitectureError
from frozen_peft.gradient import stretched_forward
from tests.frozen_runs import checkpoint_layers, frozen_gradients, frozen_logprobs
from tests.reference import (
    CACHE,
    Sample,
    negative_log_likelihood,
    random_sample,
    reference_gradients,
    reference_logprobs,
    relative_error,
    worst_gradient_error,
)
from tests.tiny_models import ROPE_LIMIT, add_lora, tiny_model

TOLERANCE = 1e-5
# Within the limit, crossing it in the decision, beyond it in the context, and two without any context.
SAMPLES = tuple(random_sample(*shape, seed=seed) for seed, shape in enumerate([(40, 13), (57, 13), (75, 13), (0, 70)]))
LONGROPE = {
    "rope_type": "longrope",
    "factor": 8.0,
    "original_max_position_embeddings": ROPE_LIMIT,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + index for index in range(8)],
}
STOP = 2
WAVES = {"factor": 8.0, "original_max_position_embeddings": ROPE_LIMIT}


def on_llama(**rope_parameters: Any) -> Callable[[], nn.Module]:
    parameters = {"rope_theta": 10000.0, **rope_parameters}
    length = ROPE_LIMIT if parameters["rope_type"] == "dynamic" else 8 * ROPE_LIMIT
    return lambda: tiny_model("llama", rope_parameters=parameters, max_position_embeddings=length)


FOLLOWING: dict[str, Callable[[], nn.Module]] = {
    "phi3": lambda: tiny_model("phi3"),
    "phimoe": lambda: tiny_model("phimoe"),
    "longrope": on_llama(**LONGROPE),
    "dynamic": on_llama(rope_type="dynamic", factor=4.0),
    "gemma3_text": lambda: tiny_model(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_theta": 10000.0, **LONGROPE},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
FIXED: dict[str, Callable[[], nn.Module]] = {
    "linear": on_llama(rope_type="linear", factor=4.0),
    "yarn": on_llama(rope_type="yarn", **WAVES),
    "llama3": on_llama(rope_type="llama3", **WAVES, low_freq_factor=1.0, high_freq_factor=4.0),
    "proportional": on_llama(rope_type="proportional", partial_rotary_factor=0.5),
    "one set of factors": on_llama(**LONGROPE | {"short_factor": LONGROPE["long_factor"]}),
    "ministral3": lambda: tiny_model("ministral3"),
}


def adapted(build: Callable[[], nn.Module]) -> PeftModel:
    return add_lora(build())


def asked(samples: Sequence[Sample]) -> list[ContextTokens]:
    return [ContextTokens(sample.context, len(sample.input_ids)) for sample in samples]


def expected_logprobs(model: nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
    logprobs = []
    for sample in samples:
        forget_longer_forwards(model)
        logprobs.append(reference_logprobs(model, sample.input_ids, sample.boundary))
    return torch.cat(logprobs)


@torch.no_grad()
def forget_longer_forwards(model: nn.Module) -> None:
    """transformers keeps the frequencies of the longest forward with `dynamic`, until one is short."""
    model(input_ids=torch.tensor([[3, 4]]), use_cache=False)


def expected_gradients(model: nn.Module, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for sample in samples:
        forget_longer_forwards(model)
        for name, gradient in reference_gradients(model, [sample], reduction="sum").items():
            total[name] = total.get(name, 0) + gradient
    return total


@pytest.mark.parametrize("name", [*FOLLOWING, *FIXED])
def test_samples_on_both_sides_in_one_batch(name: str) -> None:
    model = adapted((FOLLOWING | FIXED)[name])
    use_segmented_attention(model)
    if name != "phimoe":
        # In training mode it draws its experts at random.
        checkpoint_layers(model)
    frozen = encode_context(model, asked(SAMPLES), chunk_size=16)
    assert relative_error(frozen_logprobs(model, SAMPLES, frozen), expected_logprobs(model, SAMPLES)) <= TOLERANCE
    actual = frozen_gradients(model, SAMPLES, frozen, extra_padding=3, reduction="sum")
    assert worst_gradient_error(actual, expected_gradients(model, SAMPLES)) <= TOLERANCE


@pytest.mark.parametrize("sample", SAMPLES[1:3], ids=["crossing", "beyond"])
@pytest.mark.parametrize("name", FOLLOWING)
def test_without_knowing_the_length_it_would_be_wrong(
    name: str, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(FOLLOWING[name])
    expected = expected_logprobs(model, [sample])
    if name != "dynamic":
        # Longer than the context, but no longer than the limit: the decision is known to come from elsewhere.
        with pytest.raises(ContextMismatchError, match="was encoded for another length"):
            frozen_logprobs(model, [sample], encode_context(model, [ContextTokens(sample.context, ROPE_LIMIT)]))
    monkeypatch.setattr(rope, "_add_limits", lambda *args: None)
    frozen = encode_context(model, [sample.context], chunk_size=16)
    assert relative_error(frozen_logprobs(model, [sample], frozen), expected) > 100 * TOLERANCE
    with pytest.raises(ContextMismatchError, match="does not continue exactly"):
        verify_context(model, sample.input_ids, sample.boundary)


def test_the_same_tokens_in_samples_of_two_lengths_are_two_contexts() -> None:
    model = adapted(FOLLOWING["phi3"])
    short = SAMPLES[0]
    longer = Sample(
        torch.cat([short.input_ids, SAMPLES[2].input_ids[:18]]), torch.cat([short.labels, short.labels[:18]])
    )
    encoder = ContextEncoder(model, chunk_size=16, store=ContextStore(1 << 24, max_staleness=5))
    for step in range(3):
        for pair in ([short, longer], [longer, short]):
            encoder.expect(asked(pair), step=step)
            frozen = encoder.encode(asked(pair), step=step)
            expected = expected_logprobs(model, pair)
            assert relative_error(frozen_logprobs(model, pair, frozen), expected) <= TOLERANCE
    assert encoder.counts.num_tokens_encoded == 2 * len(short.context)


def test_beyond_the_limit_prefixes_are_shared() -> None:
    model = adapted(FOLLOWING["phi3"])
    pair = [SAMPLES[2], Sample(SAMPLES[2].input_ids[:71], SAMPLES[2].labels[:71])]
    pair[1].labels[60:] = pair[1].input_ids[60:]
    encoder = ContextEncoder(model, chunk_size=16)
    frozen = encoder.encode(asked(pair))
    assert encoder.counts.num_tokens_encoded == len(SAMPLES[2].context)
    assert relative_error(frozen_logprobs(model, pair, frozen), expected_logprobs(model, pair)) <= TOLERANCE


def batch_loss(model: nn.Module, samples: Sequence[Sample], starts: Sequence[int], **options: Any) -> torch.Tensor:
    """Sum of the losses of samples from a token on, in one batch padded on the right."""
    own = [sample.input_ids[start:] for sample, start in zip(samples, starts, strict=True)]
    width = max(map(len, own))
    input_ids = torch.stack([nn.functional.pad(ids, (0, width - len(ids)), value=7) for ids in own])
    mask = torch.stack([(torch.arange(width) < len(ids)).long() for ids in own])
    positions = torch.tensor(starts)[:, None] + torch.arange(width)
    logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False, **options).logits
    return sum(
        negative_log_likelihood(logits[row, : len(ids)], samples[row].labels[starts[row] :])
        for row, ids in enumerate(own)
    )


def gradients_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.mark.parametrize("name", ["phi3", "dynamic", "ministral3", "llama4_text"])
def test_stretches_without_a_context_are_the_plain_forward_of_the_batch(name: str) -> None:
    build = (FOLLOWING | FIXED).get(name, lambda: tiny_model(name))
    model = add_lora(build(), keep=lambda full: full.endswith("_proj"))
    samples = SAMPLES[:2]
    forget_longer_forwards(model)
    expected = gradients_of(model, batch_loss(model, samples, [0, 0]))
    with stretched_forward(model, 20):
        actual = gradients_of(model, batch_loss(model, samples, [0, 0]))
    assert worst_gradient_error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["phi3", "dynamic"])
def test_stretches_behind_contexts_have_each_samples_own_positions(name: str) -> None:
    """The horizon reaches so far that the decisions are several stretches."""
    model = adapted(FOLLOWING[name])
    samples = [
        Sample(sample.input_ids, torch.where(torch.arange(len(sample.input_ids)) > start, sample.input_ids, -100))
        for sample, start in zip(SAMPLES[:3], (20, 11, 30), strict=True)
    ]
    expected = expected_gradients(model, samples)
    frozen = encode_context(model, asked(samples), chunk_size=16)
    with stretched_forward(model, 16):
        loss = batch_loss(model, samples, [sample.boundary for sample in samples], **{CACHE: frozen})
        actual = gradients_of(model, loss)
    assert worst_gradient_error(actual, expected) <= TOLERANCE


def plain_greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["phi3", "phimoe", "longrope"])
def test_decoding_on_both_sides(name: str) -> None:
    model, reference = FOLLOWING[name](), FOLLOWING[name]()
    use_segmented_attention(model)
    prompts = [sample.input_ids[:length].tolist() for sample, length in zip(SAMPLES, (50, 65, 75, 70), strict=True)]
    contexts = [ContextTokens(torch.tensor(prompt[:-1]), len(prompt)) for prompt in prompts]
    options: dict[str, Any] = {"draws": None, "max_new_tokens": 12, "stop_tokens": [STOP]}
    expected = [plain_greedy(reference, prompt, 12) for prompt in prompts]
    assert generate_over(model, encode_context(model, contexts), prompts, **options) == expected

    crossing = prompts_reaching(60)
    frozen = encode_context(model, [ContextTokens(torch.tensor(crossing[:-1]), len(crossing))])
    with pytest.raises(ValueError, match=r"go beyond a limit of the rope .* Decode 5 tokens"):
        generate_over(model, frozen, [crossing], **options)
    found = generate_over(model, frozen, [crossing], **options | {"max_new_tokens": 5})
    assert found == [plain_greedy(reference, crossing, 5)]


def prompts_reaching(length: int) -> list[int]:
    return SAMPLES[2].input_ids[:length].tolist()


def test_the_check_reaches_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is farther than the tokens that a check compares of other models."""
    monkeypatch.setattr(verify, "MIN_CONTEXT_TOKENS", 20)
    monkeypatch.setattr(verify, "MAX_DECISION_TOKENS", 8)
    model = adapted(FOLLOWING["phi3"])
    for sample, longer in ((SAMPLES[0], False), (SAMPLES[1], True), (random_sample(150, 30), True)):
        check = verify_context(model, sample.input_ids, sample.boundary, chunk_size=16)
        assert (check.num_context_tokens + check.num_decision_tokens > ROPE_LIMIT) == longer
        assert check.error < check.effect / 100
    assert check.num_context_tokens == ROPE_LIMIT


def test_what_a_layer_makes_of_the_length_of_a_batch_stops_training() -> None:
    """Rows of one length would agree."""
    model = tiny_model("llama")

    def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get(CACHE)
        if isinstance(cache, FrozenContext):
            start = cache.get_seq_length()
            width = kwargs["input_ids"].shape[1]
            kwargs = kwargs | {"position_ids": torch.arange(start, start + width)[None]}
        return args, kwargs

    sample = random_sample(40, 9)
    verify_context(model, sample.input_ids, sample.boundary)
    model.model.register_forward_pre_hook(shift, with_kwargs=True)
    with pytest.raises(ContextMismatchError, match="does not continue exactly"):
        verify_context(model, sample.input_ids, sample.boundary)


def test_llama4_is_exact_row_by_row_and_refused_where_rows_differ() -> None:
    model = add_lora(tiny_model("llama4_text"))
    for sample in SAMPLES[:3]:
        frozen = encode_context(model, asked([sample]), chunk_size=16)
        expected = expected_logprobs(model, [sample])
        assert relative_error(frozen_logprobs(model, [sample], frozen), expected) <= TOLERANCE
        check = verify_context(model, sample.input_ids, sample.boundary)
        assert check.error < check.effect / 100
    pair = (SAMPLES[0], SAMPLES[1])
    with pytest.raises(
        ValueError, match=r"contexts of 40 to 57 tokens and reaches 70.*per_device_train_batch_size: 1"
    ):
        frozen_logprobs(model, pair, encode_context(model, asked(pair)))
    prompts = [sample.input_ids.tolist() for sample in pair]
    frozen = encode_context(model, [torch.tensor(prompt[:-1]) for prompt in prompts])
    with pytest.raises(ValueError, match="batch size of 1 in other commands"):
        generate_over(model, frozen, prompts, draws=None, max_new_tokens=3, stop_tokens=[2])
    short = [random_sample(20, 9), random_sample(30, 9, seed=1)]
    frozen = encode_context(model, asked(short))
    assert relative_error(frozen_logprobs(model, short, frozen), expected_logprobs(model, short)) <= TOLERANCE


def test_code_that_is_not_known_is_refused_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("phi3")
    monkeypatch.setattr(rope, "_rotary_modules", lambda decoder: [])
    assert rope_limits(model).all == (ROPE_LIMIT,)
    encode_context(model, asked(SAMPLES[:1]))
    with pytest.raises(UnsupportedArchitectureError, match=r"`phi3` .* sample has 70: .* `max_length: 64`"):
        encode_context(model, asked(SAMPLES[1:2]))

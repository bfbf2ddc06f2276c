# SPDX-License-Identifier: Apache-2.0
"""What the other tests stand on: the tiny models can tell a lost state, and the reference is right."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.reference import (
    CACHE,
    Sample,
    closed_form_query_gradient,
    negative_log_likelihood,
    random_sample,
    reference_gradients,
    reference_logprobs,
    relative_error,
    stop_gradient_at_context,
    token_logprobs,
    worst_gradient_error,
)
from tests.tiny_models import ARCHITECTURES, REFUSABLE, STATES, add_lora, tiny_model

TOLERANCE = 1e-5


def _zero_attention(layer: object) -> int:
    if getattr(layer, "keys", None) is None:
        return 0
    layer.keys, layer.values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)
    return 1


def _zero_states(states: dict[int, torch.Tensor | None]) -> int:
    present = [state for state in states.values() if state is not None]
    for state in present:
        state.zero_()
    return len(present)


ZEROING: dict[str, Callable[[object], int]] = {
    "keys_values": _zero_attention,
    "conv": lambda layer: _zero_states(getattr(layer, "conv_states", {})),
    "recurrent": lambda layer: _zero_states(getattr(layer, "recurrent_states", {})),
}


@torch.no_grad()
def cached_logprobs(model: PreTrainedModel, sample: Sample, kind: str | None = None) -> tuple[torch.Tensor, int]:
    """Decision log-probabilities of transformers' own continuation, and how many states were zeroed."""
    cache = DynamicCache(config=model.config.get_text_config())
    model(input_ids=sample.context[None], **{CACHE: cache}, use_cache=True)
    zeroed = sum(ZEROING[kind](layer) for layer in cache.layers) if kind else 0
    logits = model(input_ids=sample.decision[None], **{CACHE: cache}, use_cache=True).logits[0]
    return token_logprobs(logits, sample.decision), zeroed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_state_matters(name: str) -> None:
    model = tiny_model(name)
    sample = random_sample(70, 13)
    intact, _ = cached_logprobs(model, sample)
    expected = reference_logprobs(model, sample.input_ids, sample.boundary)
    assert relative_error(intact, expected) < TOLERANCE
    present = []
    for kind in ZEROING:
        logprobs, zeroed = cached_logprobs(model, sample, kind)
        if zeroed:
            present.append(kind)
            assert (logprobs - intact).abs().mean() >= 1e-2, kind
    assert tuple(present) == STATES[name]


@pytest.mark.parametrize("name", ARCHITECTURES + REFUSABLE)
def test_models_repeat_with_their_seed_and_differ_between_seeds(name: str) -> None:
    sample = random_sample(20, 5)
    random_state = torch.get_rng_state()
    first, again, other = (reference_logprobs(tiny_model(name, seed=seed), sample.input_ids, 0) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert relative_error(other, first) > 1e-2
    assert torch.equal(random_state, torch.get_rng_state())


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        tiny_model("nosuch")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_gradient_reaches_a_context_position(name: str) -> None:
    model = add_lora(tiny_model(name))
    sample = random_sample(70, 13)
    boundary = sample.boundary
    embeddings = model.get_input_embeddings()(sample.input_ids[None]).detach().requires_grad_()
    streams: list[torch.Tensor] = [embeddings]

    def keep_stream(_module: nn.Module, arguments: tuple, keywords: dict) -> None:
        stream = arguments[0] if arguments else keywords["hidden_states"]
        if stream is not embeddings and "visual" not in type(_module).__name__:
            stream.retain_grad()
            streams.append(stream)

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = [layer.register_forward_pre_hook(keep_stream, with_kwargs=True) for layer in layers]
    with stop_gradient_at_context(model, boundary, len(sample.input_ids)):
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    negative_log_likelihood(logits, sample.labels).backward()
    assert len(streams) >= 2
    for stream in streams:
        assert torch.count_nonzero(stream.grad[:, :boundary]) == 0
        assert torch.count_nonzero(stream.grad[:, boundary:]) > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stopping_the_gradient_changes_gradients_and_no_output(name: str) -> None:
    model = add_lora(tiny_model(name))
    sample = random_sample(70, 13)
    stopped = reference_gradients(model, [sample], reduction="sum")
    with stop_gradient_at_context(model, sample.boundary, len(sample.input_ids)):
        logits = model(input_ids=sample.input_ids[None], use_cache=False).logits[0]
    plain_logits = model(input_ids=sample.input_ids[None], use_cache=False).logits[0]
    assert torch.equal(logits, plain_logits)
    negative_log_likelihood(plain_logits, sample.labels).backward()
    full = {parameter: p.grad for parameter, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in parameter for parameter in stopped)
    assert worst_gradient_error(stopped, full) > 0.1


def test_the_stop_gradient_equals_a_hand_written_forward_with_detached_keys_and_values() -> None:
    model = add_lora(tiny_model("llama", dtype=torch.float64))
    samples = [random_sample(boundary, 13, seed=boundary) for boundary in (0, 1, 37, 70)]
    for sample in samples:
        logits = _hand_written_llama(model.get_base_model(), sample)
        negative_log_likelihood(logits, sample.decision_labels).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    actual = reference_gradients(model, samples, reduction="sum")
    # transformers' RMSNorm rounds to float32 whatever the model's type is.
    assert worst_gradient_error(actual, expected) < 1e-6


def test_the_mean_is_taken_over_the_labels_of_the_batch() -> None:
    model = add_lora(tiny_model("llama"))
    samples = [random_sample(20, 3), random_sample(20, 11)]
    total = reference_gradients(model, samples, reduction="sum")
    mean = reference_gradients(model, samples, reduction="mean")
    assert worst_gradient_error(mean, {name: gradient / 12 for name, gradient in total.items()}) < 1e-6


def test_weights_applied_across_positions_are_refused() -> None:
    model = tiny_model("qwen3_5_text").requires_grad_(False)
    model.model.layers[0].linear_attn.conv1d.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"conv1d.* trainable"):
        reference_gradients(model, [random_sample(20, 5)])


def test_a_length_that_hides_the_sequence_dimension_is_refused() -> None:
    model = add_lora(tiny_model("llama"))
    with pytest.raises(ValueError, match="length of 48"):
        reference_gradients(model, [random_sample(40, 8)])


def test_the_closed_form_equals_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values, upstream = (
        torch.randn(rows, 8, dtype=torch.float64, generator=generator) for rows in (5, 17, 17, 5)
    )
    queries.requires_grad_()
    position = torch.arange(17)
    scores = (queries @ keys.T / 8**0.5).masked_fill(position > 12 + torch.arange(5)[:, None], float("-inf"))
    (expected,) = torch.autograd.grad((scores.softmax(-1) @ values * upstream).sum(), queries)
    actual = closed_form_query_gradient(queries.detach(), keys, values, upstream, first_position=12)
    assert relative_error(actual, expected) < 1e-12


def _hand_written_llama(model: PreTrainedModel, sample: Sample) -> torch.Tensor:
    """Decision logits `[D, V]` of a llama, the context run by itself without gradient, no library cache."""
    decoder, config = model.model, model.config
    groups = config.num_attention_heads // config.num_key_value_heads

    def run(input_ids: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple:
        start = past[0][0].shape[1] if past else 0
        hidden = decoder.embed_tokens(input_ids)
        positions = torch.arange(start, start + len(input_ids))
        inverse = config.rope_parameters["rope_theta"] ** (
            -torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        )
        angles = (positions[:, None].float() * inverse).repeat(1, 2)
        cos, sin = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.view(len(input_ids), -1, config.head_dim).transpose(0, 1)

        def rotate(states: torch.Tensor) -> torch.Tensor:
            first, second = states.chunk(2, dim=-1)
            return states * cos + torch.cat([-second, first], dim=-1) * sin

        present = []
        for index, layer in enumerate(decoder.layers):
            normed = layer.input_layernorm(hidden)
            attention = layer.self_attn
            query, key = rotate(heads(attention.q_proj(normed))), rotate(heads(attention.k_proj(normed)))
            value = heads(attention.v_proj(normed))
            if past:
                key = torch.cat([past[index][0].detach(), key], dim=1)
                value = torch.cat([past[index][1].detach(), value], dim=1)
            present.append((key, value))
            scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) / config.head_dim**0.5
            future = torch.arange(key.shape[1]) > positions[:, None]
            mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ value.repeat_interleave(groups, 0)
            hidden = hidden + attention.o_proj(mixed.transpose(0, 1).flatten(1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return model.lm_head(decoder.norm(hidden)), present

    past: list = []
    if sample.boundary:
        with torch.no_grad():
            _, past = run(sample.context, [])
    return run(sample.decision, past)[0]

# SPDX-License-Identifier: Apache-2.0
"""What the gradient knows about a frozen context: the closed form of W_q, and which weights receive any."""

import pytest
import torch
from torch import nn

from tests.frozen_runs import decision_logits, encode, frozen_gradients, states
from tests.reference import (
    Sample,
    closed_form_query_gradient,
    negative_log_likelihood,
    random_sample,
    reference_gradients,
    relative_error,
)
from tests.tiny_models import ARCHITECTURES, add_lora, tiny_model


def _rotate(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `[D, d]` by `[D, d / 2]` angles; the inverse is the rotation by minus them."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


@pytest.mark.parametrize("layer_index", [0, 3])
@pytest.mark.parametrize("head", [0, 3])
def test_the_query_gradient_equals_its_closed_form(head: int, layer_index: int) -> None:
    model = tiny_model("llama", dtype=torch.float64).requires_grad_(False)
    attention = model.model.layers[layer_index].self_attn
    attention.q_proj.weight.requires_grad_(True)
    sample = random_sample(29, 8)
    frozen = encode(model, [sample])

    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        seen[name] = value
        if value.requires_grad:
            value.retain_grad()

    handles = [
        attention.q_proj.register_forward_pre_hook(lambda _m, args: keep("input", args[0])),
        attention.k_proj.register_forward_hook(lambda _m, _a, out: keep("keys", out)),
        attention.v_proj.register_forward_hook(lambda _m, _a, out: keep("values", out)),
        attention.o_proj.register_forward_pre_hook(lambda _m, args: keep("mixed", args[0])),
    ]
    (logits,) = decision_logits(model, [sample], frozen)
    negative_log_likelihood(logits, sample.decision_labels).backward()
    for handle in handles:
        handle.remove()

    size = model.config.head_dim
    rows = slice(head * size, (head + 1) * size)
    kv_head = head // (model.config.num_attention_heads // model.config.num_key_value_heads)
    kv_rows = slice(kv_head * size, (kv_head + 1) * size)
    positions = torch.arange(sample.boundary, len(sample.input_ids), dtype=torch.float64)
    angles = positions[:, None] * model.model.rotary_emb.inv_freq.double()
    weight = attention.q_proj.weight.detach()[rows]
    inputs = seen["input"][0].detach()
    context_keys, context_values = states(frozen, "keys_values")[2 * layer_index : 2 * layer_index + 2]
    query_gradient = closed_form_query_gradient(
        queries=_rotate(inputs @ weight.T, angles),
        keys=torch.cat([context_keys[0, kv_head], _rotate(seen["keys"][0, :, kv_rows].detach(), angles)]),
        values=torch.cat([context_values[0, kv_head], seen["values"][0, :, kv_rows].detach()]),
        output_gradients=seen["mixed"].grad[0, :, rows],
        first_position=sample.boundary,
    )
    expected = _rotate(query_gradient, -angles).T @ inputs
    # cos and sin are rounded to float32 in transformers, whatever the model's type is.
    assert relative_error(attention.q_proj.weight.grad[rows], expected) < 1e-6


def test_the_query_gradient_contains_every_context_key() -> None:
    model = tiny_model("llama", num_hidden_layers=1).requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    sample = random_sample(20, 9)
    (before,) = frozen_gradients(model, [sample], encode(model, [sample])).values()
    for position in range(sample.boundary):
        input_ids = sample.input_ids.clone()
        input_ids[position] = 3 + (input_ids[position] - 3 + 1) % 90
        changed = Sample(input_ids, sample.labels)
        (after,) = frozen_gradients(model, [changed], encode(model, [changed])).values()
        assert relative_error(after, before) > 1e-3
    assert weight.grad is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_adapter_on_the_decisions_path_receives_gradient(name: str) -> None:
    model = add_lora(tiny_model(name))
    sample = random_sample(33, 13)
    gradients = frozen_gradients(model, [sample], encode(model, [sample]))
    assert {part for part in gradients if not gradients[part].any()} == set()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_gradient_reaches_what_was_computed_at_context_positions(name: str) -> None:
    model = tiny_model(name).requires_grad_(False)
    sample = random_sample(33, 13)
    half = model.config.get_text_config().vocab_size // 2
    context, decision = sample.context % half, half + sample.decision % half
    sample = Sample(torch.cat([context, decision]), torch.cat([sample.labels[:34], decision[1:]]))
    embeddings = model.get_input_embeddings()
    embeddings.weight.requires_grad_(True)
    frozen = encode(model, [sample])
    (gradient,) = frozen_gradients(model, [sample], frozen).values()
    assert torch.count_nonzero(gradient[context]) == 0
    # The last token only ends the decision: nothing is predicted from it.
    assert (gradient[decision[:-1]].abs().sum(dim=1) > 0).all()
    for kind in ("keys_values", "conv", "recurrent"):
        assert all(state.grad is None and not state.requires_grad for state in states(frozen, kind))


def test_key_and_value_adapters_learn_from_decision_tokens_only() -> None:
    def is_key_or_value(name: str) -> bool:
        return name.endswith(("k_proj", "v_proj"))

    model = add_lora(tiny_model("llama"), keep=is_key_or_value)
    sample = random_sample(33, 13)
    expected = reference_gradients(model, [sample])
    inputs: list[torch.Tensor] = []
    projections = [m for n, m in model.named_modules() if is_key_or_value(n) and isinstance(m, nn.Module)]
    frozen = encode(model, [sample])
    handles = [m.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for m in projections]
    actual = frozen_gradients(model, [sample], frozen)
    for handle in handles:
        handle.remove()
    assert {tuple(tensor.shape[:2]) for tensor in inputs} == {(1, 13)}
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) <= 1e-5

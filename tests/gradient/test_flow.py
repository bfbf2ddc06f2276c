# SPDX-License-Identifier: Apache-2.0
"""Gradient flow against direct autograd: norms, cosines, and what passes through the context."""

import copy
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from frozen_peft import gradient_flow, lora_config
from frozen_peft.adapters import restrict_adapter_rows
from frozen_peft.context import Cut
from frozen_peft.gradient.flow import GradientFlow
from tests.frozen_runs import checkpoint_layers
from tests.gradient.flow_cases import (
    LONG,
    ROWS,
    STRETCH,
    assert_gradients,
    assert_share,
    collated,
    expected_share,
    frozen_gradients,
    full_gradients,
    whole,
)
from tests.gradient.test_stretches import reference
from tests.reference import Sample, random_sample
from tests.tiny_models import ARCHITECTURES, add_lora, tiny_model

# Dense attention, Gated DeltaNet hybrid, experts, a sliding window, Mamba-2.
EVERY_RUN = ("llama", "qwen3_5_text", "qwen3_5_moe_text", "gemma3_text", "granitemoehybrid")


@pytest.mark.parametrize(
    "name", [name if name in EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_equals_direct_autograd(name: str) -> None:
    _assert_equals_direct_autograd(name, "right")


def test_padding_on_the_left_is_padding() -> None:
    _assert_equals_direct_autograd("qwen3_5_text", "left")


def _assert_equals_direct_autograd(name: str, side: Literal["right", "left"]) -> None:
    model = add_lora(tiny_model(name))
    rows = (*ROWS, LONG)
    flow = gradient_flow(model, collated(rows, side), sequence_chunk_size=STRETCH)
    assert_gradients(flow, model, frozen_gradients(model, rows), full_gradients(model, rows))
    assert (flow.num_samples, flow.num_context_tokens, flow.num_decision_tokens) == (4, 179, 63)


def test_an_untrained_adapter_has_a_gradient_in_its_second_factor() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    flow = gradient_flow(model, collated(ROWS))
    assert_gradients(flow, model, frozen_gradients(model, ROWS), full_gradients(model, ROWS))
    assert all(part.gradient.full_norm > 0 for part in flow.horizons[0].projections)


def test_horizons_reach_so_far_into_the_context() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    rows = (ROWS[0], LONG)
    flow = gradient_flow(model, collated(rows), horizons=(0, 7, 64, 500), sequence_chunk_size=STRETCH)
    full = torch.cat([gradient.flatten() for gradient in full_gradients(model, rows).values()])
    for found in flow.horizons:
        gradients = reference(model, rows, found.horizon)
        own = torch.cat([value.flatten() for name, value in gradients.items() if "lora_B" in name])
        assert_share(found.total, expected_share(own, full))
    # The whole context of both.
    assert flow.horizons[-1].total.context_share == 0.0
    assert [found["horizon"] for found in flow.as_dict()["horizons"]] == [7, 64, 500]


def test_several_batches_are_one() -> None:
    model = add_lora(tiny_model("llama"))
    apart = gradient_flow(model, [collated(ROWS[:1]), collated(ROWS[1:])])
    together = gradient_flow(model, collated(ROWS))
    _assert_close(apart, together)


@settings(max_examples=4, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(2, 9)), min_size=1, max_size=3), st.integers(0, 9))
def test_any_samples_equal_direct_autograd(shapes: list[tuple[int, int]], seed: int) -> None:
    model = add_lora(
        tiny_model("qwen3_5_text", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    )
    sizes = {size for weight in model.parameters() for size in weight.shape}
    rows = []
    for index, (boundary, length) in enumerate(shapes):
        while boundary + length in sizes:
            length += 1
        row = random_sample(boundary, length, seed=10 * seed + index)
        rows.append(row if boundary else whole(row))
    flow = gradient_flow(model, collated(rows))
    assert_gradients(flow, model, frozen_gradients(model, rows), full_gradients(model, rows))


def test_samples_without_context_are_no_error() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    flow = gradient_flow(model, collated([whole(row) for row in ROWS]))
    assert flow.num_context_tokens == 0
    assert {part.gradient.context_share for part in flow.horizons[0].projections} == {0.0}
    cosines = [part.gradient.cosine for part in flow.horizons[0].projections]
    assert cosines == pytest.approx([1.0] * len(cosines))


def test_turns_are_decisions_of_their_own() -> None:
    model = add_lora(tiny_model("llama"))
    row = random_sample(20, 31, seed=5)
    labels = row.labels.clone()
    labels[30:41] = -100
    conversation = Sample(row.input_ids, labels)
    first = Sample(row.input_ids[:30], labels[:30])
    last = Sample(row.input_ids, torch.where(torch.arange(51) < 41, -100, labels))
    flow = gradient_flow(model, collated([conversation]), cut=Cut("turns"))
    assert flow.num_samples == 2
    rows = (first, last)
    assert_gradients(flow, model, frozen_gradients(model, rows), full_gradients(model, rows))


def test_with_gradient_checkpoints_and_dropout_set() -> None:
    model = tiny_model("qwen3_5_text")
    plain = gradient_flow(add_lora(copy.deepcopy(model)), collated(ROWS))
    checkpointed = add_lora(model)
    for module in checkpointed.modules():
        if (
            isinstance(module, torch.nn.ModuleDict)
            and "default" in module
            and isinstance(module["default"], torch.nn.Identity)
        ):
            module["default"] = torch.nn.Dropout(0.5)
    checkpoint_layers(checkpointed)
    _assert_close(gradient_flow(checkpointed, collated(ROWS)), plain)


def test_the_model_is_left_as_it_was() -> None:
    model = add_lora(tiny_model("qwen3_5_text")).train()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    before = {name: (weight.detach().clone(), weight.requires_grad) for name, weight in model.named_parameters()}
    training = [module.training for module in model.modules()]
    gradient_flow(model, collated(ROWS))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0])
        assert weight.requires_grad == before[name][1]
        assert weight.grad is None
    assert [module.training for module in model.modules()] == training


def test_only_rows_that_are_adapted_count() -> None:
    base = tiny_model("qwen3_5_text")
    model = get_peft_model(base, lora_config(base, "response", r=2))
    restrict_adapter_rows(model)
    flow = gradient_flow(model, collated(ROWS))
    roles = {part.role for part in flow.horizons[0].projections}
    assert roles == {"query", "output", "gate", "beta", "decay", "gdn_output"}
    squares = sum(part.gradient.full_norm**2 for part in flow.horizons[0].projections)
    assert flow.horizons[0].total.full_norm == pytest.approx(squares**0.5)


def test_routed_experts_are_measured_as_other() -> None:
    base = tiny_model("qwen3_5_moe_text")
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], task_type="CAUSAL_LM"
    )
    flow = gradient_flow(get_peft_model(base, config), collated(ROWS[:1]))
    found = {(part.layer, part.role) for part in flow.horizons[0].projections}
    assert {(layer, "other") for layer in range(4)} <= found
    assert {(1, "query"), (3, "query")} <= found


def test_no_layer_sees_more_than_a_stretch_or_a_chunk() -> None:
    model = add_lora(tiny_model("llama"))
    widths = []
    model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[1])
    )
    gradient_flow(model, collated([LONG]), sequence_chunk_size=32, prefill_chunk_size=48)
    # Chunks of the context; stretches of the decision, and of all. Attention is probed with contexts of one and two.
    assert set(widths) - {1, 2} == {48, 42} | {32, 9} | {32, 3}


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no active LoRA adapter.*lora_config"):
        gradient_flow(tiny_model("llama"), collated(ROWS))


def test_a_sample_without_labels_is_named() -> None:
    nothing = Sample(ROWS[0].input_ids, torch.full_like(ROWS[0].labels, -100))
    with pytest.raises(ValueError, match=r"Sample 1 of the batch has no supervised label in its 68 tokens"):
        gradient_flow(add_lora(tiny_model("llama")), collated([ROWS[1], nothing]))


def test_arguments_out_of_range_are_named() -> None:
    model = add_lora(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"`horizons` must be 0 or more.*\(-1,\)"):
        gradient_flow(model, collated(ROWS), horizons=(-1,))
    with pytest.raises(ValueError, match=r"`sequence_chunk_size` must be 1 token or more, found 0"):
        gradient_flow(model, collated(ROWS), sequence_chunk_size=0)
    with pytest.raises(ValueError, match="no sample to measure"):
        gradient_flow(model, [])


def _assert_close(left: GradientFlow, right: GradientFlow) -> None:
    assert replace(left, horizons=[], loss=0.0) == replace(right, horizons=[], loss=0.0)
    assert left.loss == pytest.approx(right.loss, rel=1e-5)
    for one, other in zip(left.horizons[0].projections, right.horizons[0].projections, strict=True):
        assert (one.module, one.role) == (other.module, other.role)
        assert_share(one.gradient, other.gradient)

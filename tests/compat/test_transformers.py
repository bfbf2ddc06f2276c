# SPDX-License-Identifier: Apache-2.0
"""What of transformers is used beyond what it promises is there, does what it is used for, and is still needed."""

import inspect
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_5 import modeling_qwen3_5

from frozen_peft.utils.compat.transformers import (
    as_stored,
    attention_implementation,
    checkpoint_function,
    from_config,
    keeping_cache_under_checkpointing,
    kept_in_float32,
    parameters_of_tensors,
    replace_kernels,
    set_checkpoint_function,
    stored_together,
)
from tests.frozen_runs import checkpoint_layers
from tests.tiny_models import tiny_model


def test_the_attention_of_a_model_is_known_by_its_configuration_alone() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    assert attention_implementation(model.config) == "eager"
    public = {name for name in dir(PreTrainedModel) if "attn_implementation" in name and not name.startswith("_")}
    # The second says what an implementation that is asked for would come to.
    assert public == {"set_attn_implementation", "get_correct_attn_implementation"}


def test_no_public_method_makes_a_model_of_one_class_in_a_type() -> None:
    model = tiny_model("llama")
    assert from_config(type(model), model.config, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert not hasattr(PreTrainedModel, "from_config")
    # The automatic class takes no other class than its own choice.
    assert type(AutoModelForCausalLM.from_config(tiny_model("qwen3_5").config)).__name__ == "Qwen3_5ForCausalLM"


def test_transformers_alone_knows_what_a_stacked_parameter_is_stored_as() -> None:
    """Experts that a checkpoint stores one by one, gate and up apart: there and back."""
    model = tiny_model("qwen3_next")
    stacked = next(name for name, _ in model.named_parameters() if name.endswith("experts.gate_up_proj"))
    parts = as_stored(model, {stacked: model.get_parameter(stacked).detach()})
    loaded = parameters_of_tensors(model, parts)
    assert len(parts) > 2
    assert set(loaded.values()) == {(stacked, True)}
    assert stored_together(model, stacked) == (stacked,)
    public = [name for name in dir(model) if "conversion" in name and not name.startswith("_")]
    assert not public, f"transformers may say it in public now: {public}"


def test_what_stays_in_float32_is_no_public_list() -> None:
    model = tiny_model("llama")
    assert {"_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"} <= set(dir(PreTrainedModel))
    assert not [name for name in dir(PreTrainedModel) if "fp32" in name and not name.startswith("_")]
    model._keep_in_fp32_modules = ["lm_head"]
    pattern = kept_in_float32(model, torch.float16)
    assert pattern is not None
    assert pattern.search("lm_head.weight")
    assert kept_in_float32(model, torch.float32) is None


def test_the_checkpoint_of_a_layer_is_an_attribute_and_nothing_public() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0]
    assert checkpoint_function(layer) is None
    checkpoint_layers(model, use_reentrant=True)
    assert checkpoint_function(layer).keywords == {"use_reentrant": True}
    calls = []
    set_checkpoint_function(layer, lambda forward, *args: calls.append(args) or forward(*args))
    model.train()(input_ids=model.dummy_inputs["input_ids"] % 9, use_cache=False)
    assert len(calls) == 1
    # When this fails, see whether transformers has a public way by now.
    public = {name for name in vars(GradientCheckpointingLayer) if not name.startswith("_")}
    assert public == {"gradient_checkpointing"}


def test_a_layer_drops_its_cache_under_checkpointing_unless_told_otherwise() -> None:
    class Layer(GradientCheckpointingLayer):
        def forward(self, hidden_states: torch.Tensor, layer_past: object = None) -> torch.Tensor:
            seen.append(layer_past)
            return hidden_states * 1

    seen: list[object] = []
    layer = Layer().train()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda function, *args: function(*args)
    cache = object()
    with keeping_cache_under_checkpointing([layer]):
        layer(torch.ones(2, requires_grad=True), layer_past=cache)
    layer(torch.ones(2, requires_grad=True), layer_past=cache)
    assert seen == [cache, None]


def test_kernel_functions_are_found_with_their_reference() -> None:
    @use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")
    def chunk_gated_delta_rule(query: torch.Tensor) -> torch.Tensor:
        return query

    file = ModuleType("modeling_of_a_test")
    vars(file).update(kernel=chunk_gated_delta_rule, other=inspect.getsource)
    made: list[tuple[Any, ...]] = []
    replace_kernels(file, lambda bound, reference, *names: made.append((bound, reference, *names)) or reference)
    assert made == [(chunk_gated_delta_rule, chunk_gated_delta_rule.__wrapped__, "chunk_gated_delta_rule", "fla")]
    assert file.kernel is chunk_gated_delta_rule.__wrapped__
    # It is bound once, at import, and modeling files do it so.
    assert "device" not in inspect.getsource(use_kernel_func_from_hub_with_fallback)
    assert "@use_kernel_func_from_hub_with_fallback" in inspect.getsource(modeling_qwen3_5)

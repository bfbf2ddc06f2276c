# SPDX-License-Identifier: Apache-2.0
"""Activation checkpoints over several layers: the same gradients, and fewer hidden states kept."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from frozen_peft import FrozenContextConfig
from frozen_peft.gradient import group_checkpoints
from frozen_peft.utils.compat.transformers import checkpoint_function
from tests.frozen_runs import checkpoint_layers, encode, frozen_gradients
from tests.reference import random_sample, worst_gradient_error
from tests.tiny_models import add_lora, tiny_model

NAMES = ["llama", "qwen3_5_text", "qwen3_5_moe_text", "gpt2", "granitemoehybrid"]
INPUT_IDS = random_sample(0, 23).input_ids[None]


def checkpointed(model: nn.Module, layers: int) -> nn.Module:
    model = copy.deepcopy(model)
    checkpoint_layers(model)
    group_checkpoints(model.get_base_model().get_decoder(), layers)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the mean negative log-likelihood, from a fixed random state."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    model(input_ids=INPUT_IDS, labels=INPUT_IDS, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def with_dropout(model: nn.Module, probability: float) -> nn.Module:
    """Gives every adapter dropout."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = nn.Dropout(probability)
    return model.train()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("layers", [1, 2, 3, 9])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_without_checkpoints(name: str, layers: int, dropout: float) -> None:
    model = with_dropout(add_lora(tiny_model(name)), dropout)
    expected = gradients(model)
    actual = gradients(checkpointed(model, layers))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    if dropout:
        assert worst_gradient_error(gradients(with_dropout(add_lora(tiny_model(name)), 0.0)), expected) > 1e-2


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_over_a_frozen_context(name: str, layers: int) -> None:
    sample_rows = [random_sample(37, 9, seed=1), random_sample(20, 14, seed=2)]
    model = add_lora(tiny_model(name)).train()
    expected = frozen_gradients(model, sample_rows, encode(model, sample_rows))
    grouped = checkpointed(model, layers)
    actual = frozen_gradients(grouped, sample_rows, encode(grouped, sample_rows))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


class _SavedBytes:
    """Counts what autograd keeps for the backward pass outside of checkpoints."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor


def kept_bytes(model: nn.Module) -> int:
    saved = _SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        model(input_ids=INPUT_IDS, labels=INPUT_IDS, use_cache=False)
    return saved.num_bytes


def test_fewer_hidden_states_are_kept() -> None:
    model = add_lora(tiny_model("llama", num_hidden_layers=6)).train()
    plain = kept_bytes(model)
    by_layers = [kept_bytes(checkpointed(model, layers)) for layers in (1, 2, 3, 6)]
    hidden_state = INPUT_IDS.numel() * model.config.hidden_size * 4
    assert by_layers[0] < plain / 3
    assert [by_layers[0] - bytes_kept for bytes_kept in by_layers] == [
        0,
        3 * hidden_state,
        4 * hidden_state,
        5 * hidden_state,
    ]


def test_each_layer_runs_twice_and_no_more() -> None:
    model = checkpointed(add_lora(tiny_model("llama")).train(), 3)
    calls = [0] * 4
    for index, layer in enumerate(model.get_base_model().model.layers):

        def count(*args: Any, index: int = index) -> None:
            calls[index] += 1

        layer.mlp.register_forward_pre_hook(count)
    gradients(model)
    assert calls == [2, 2, 2, 2]


def test_without_gradient_nothing_is_checkpointed() -> None:
    model = checkpointed(add_lora(tiny_model("llama")), 2)
    with torch.no_grad():
        logits = model(input_ids=INPUT_IDS).logits
    expected = model.eval()(input_ids=INPUT_IDS).logits
    assert torch.equal(logits, expected)


def test_grouping_again_changes_nothing() -> None:
    model = checkpointed(add_lora(tiny_model("llama")).train(), 2)
    decoder = model.get_base_model().get_decoder()
    before = [checkpoint_function(layer) for layer in decoder.layers]
    group_checkpoints(decoder, 2)
    assert [checkpoint_function(layer) for layer in decoder.layers] == before


def test_a_forward_that_failed_leaves_the_next_one_whole() -> None:
    model = with_dropout(add_lora(tiny_model("llama")), 0.0)
    expected = gradients(model)
    grouped = checkpointed(model, 3)
    layer = grouped.get_base_model().model.layers[1]

    def fail(*args: Any) -> None:
        raise RuntimeError("out of luck")

    handle = layer.mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        gradients(grouped)
    handle.remove()
    actual = gradients(grouped)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_something_between_the_layers_is_refused() -> None:
    model = checkpointed(add_lora(tiny_model("llama")).train(), 2)
    model.get_base_model().model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match=r"`checkpoint_every` above 1 needs layers that run one after another"):
        gradients(model)


def test_no_layer_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`checkpoint_every` must be 1 layer or more, found 0"):
        group_checkpoints(tiny_model("llama").model, 0)


@pytest.mark.parametrize("name", ["use_reentrant", "selective"])
def test_other_kinds_of_checkpoint_are_refused(name: str, tmp_path: Path) -> None:
    fields = {"use_cpu": True, "bf16": False, "gradient_checkpointing_kwargs": {name: True}}
    with pytest.raises(ValueError, match=rf"`checkpoint_every=2` needs non-reentrant checkpoints.*remove `{name}`"):
        FrozenContextConfig(str(tmp_path), checkpoint_every=2, **fields)
    FrozenContextConfig(str(tmp_path), checkpoint_every=1, **fields)

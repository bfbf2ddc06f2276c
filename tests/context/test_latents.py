# SPDX-License-Identifier: Apache-2.0
"""Latent attention: the cache holds latents, of which each forward makes keys and values again.

Of the context these are constants, and a decision holds no more of the context than the cache does.
"""

import copy
from functools import cache

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from frozen_peft.context import FrozenContext, encode_context, use_segmented_attention
from tests.frozen_runs import checkpoint_layers, decision_logits, encode, frozen_gradients, frozen_logprobs
from tests.reference import (
    Sample,
    random_sample,
    reference_gradients,
    reference_logprobs,
    relative_error,
    worst_gradient_error,
)
from tests.tiny_models import LATENT_ATTENTION, add_lora, tiny_model

TOLERANCE = 1e-5
# Plain, and with two attentions in a layer; kimi_linear has it beside linear attention.
FAST = ("deepseek_v3", "longcat_flash")
NAMES = [
    "kimi_linear",
    *(name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LATENT_ATTENTION),
]
SAMPLES = (random_sample(65, 11, seed=0), random_sample(7, 6, seed=1))


@cache
def _reference(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = add_lora(tiny_model(name))
    logprobs = [reference_logprobs(model, sample.input_ids, sample.boundary) for sample in SAMPLES]
    return torch.cat(logprobs), reference_gradients(model, SAMPLES)


@pytest.mark.parametrize(("segmented", "checkpointing"), [(True, True), (False, False)])
@pytest.mark.parametrize("name", NAMES)
def test_all_adapters_have_the_gradient_of_constant_keys_and_values(
    name: str, segmented: bool, checkpointing: bool
) -> None:
    model = add_lora(tiny_model(name))
    assert any("kv_b_proj" in weight for weight, p in model.named_parameters() if p.requires_grad)
    if segmented:
        assert use_segmented_attention(model)
    if checkpointing:
        checkpoint_layers(model)
    frozen = encode(model, SAMPLES, chunk_size=20)
    logprobs, gradients = _reference(name)
    assert relative_error(frozen_logprobs(model, SAMPLES, frozen), logprobs) <= TOLERANCE
    assert worst_gradient_error(frozen_gradients(model, SAMPLES, frozen), gradients) <= TOLERANCE


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_linear"])
def test_a_decision_holds_of_the_context_what_the_cache_holds(name: str) -> None:
    model = add_lora(tiny_model(name))
    assert use_segmented_attention(model)
    short, long = (_held_beside_the_cache(model, num_tokens) for num_tokens in (64, 1024))
    assert short == long > 0


def _held_beside_the_cache(model: PeftModel, num_context_tokens: int) -> int:
    """Bytes that autograd keeps of a decision's forward, without those of the frozen context and of weights."""
    sample = random_sample(num_context_tokens, 9)
    frozen = encode_context(model, [sample.context])
    known = [*model.parameters(), *model.buffers(), *(tensor for row in frozen.rows for tensor in row.tensors())]
    beside = {tensor.untyped_storage().data_ptr() for tensor in known}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in beside:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (logits,) = decision_logits(model, [sample], frozen)
    assert logits.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("segmented", [True, False])
def test_a_context_is_expanded_without_dropout(segmented: bool) -> None:
    """With a dropout of everything, an adapter acts on the context, which was encoded without it, and nowhere else."""
    model = add_lora(tiny_model("deepseek_v3"), keep=lambda module: module.endswith("kv_b_proj"))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.lora_dropout["default"] = nn.Dropout(1.0).eval()
    if segmented:
        assert use_segmented_attention(model)
    sample = SAMPLES[0]
    expected = _without_adapters_in_the_decision(model, layers, sample)
    frozen = encode(model, [sample])
    model.train()
    assert relative_error(decision_logits(model, [sample], frozen)[0].detach(), expected) <= TOLERANCE
    assert relative_error(_plain_logits(model, sample), expected) > 100 * TOLERANCE


def _plain_logits(model: PeftModel, sample: Sample) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=sample.input_ids[None], use_cache=False).logits[0, sample.boundary :]


def _without_adapters_in_the_decision(model: PeftModel, layers: list[LoraLayer], sample: Sample) -> torch.Tensor:
    def hook(layer: LoraLayer, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        base = layer.base_layer(args[0])
        return torch.cat([output[..., : sample.boundary, :], base[..., sample.boundary :, :]], dim=-2)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        return _plain_logits(model, sample)
    finally:
        for handle in handles:
            handle.remove()


def test_a_copy_of_the_model_expands_with_weights_of_its_own() -> None:
    model = add_lora(tiny_model("deepseek_v3"))
    assert use_segmented_attention(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "kv_b_proj" in name:
                weight *= 1.5
    expected = reference_logprobs(other, SAMPLES[0].input_ids, SAMPLES[0].boundary)
    assert relative_error(frozen_logprobs(other, SAMPLES[:1], encode(other, SAMPLES[:1])), expected) <= TOLERANCE


def test_autocast_expands_a_context_as_the_forward_does_and_leaves_weights_their_gradient() -> None:
    model = add_lora(tiny_model("deepseek_v3"))
    assert use_segmented_attention(model)
    gradients = []
    for enabled in (False, True):
        frozen: FrozenContext | None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            frozen = encode(model, SAMPLES)
            gradients.append(frozen_gradients(model, SAMPLES, frozen))
    expected, rounded = gradients
    assert all(bool(gradient.any()) for gradient in rounded.values())
    weights = [name for name in expected if "kv_b_proj" in name]
    errors = [relative_error(rounded[name], expected[name]) for name in weights]
    assert 1e-4 < max(errors) < 0.2

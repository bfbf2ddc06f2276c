# SPDX-License-Identifier: Apache-2.0
"""Builds a model with random weights where it will run, one weight at a time, quantized as it is made."""

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from frozen_peft import quantization_config
from frozen_peft.adapters import keep_linear4bit_trainable

# NF4 with double quantization: 4 bit, 8 bit per block of 64, and a float32 per 256 of those.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def needed_bytes(config: PretrainedConfig, dtype: torch.dtype, *, quantized: bool) -> int:
    """Bytes of the weights as `build_model` makes them."""
    model = on_meta(config, dtype)
    linear = _quantized_names(model, config) if quantized else set()
    return round(
        sum(
            parameter.numel() * (NF4_BYTES if name in linear else parameter.element_size())
            for name, parameter in model.named_parameters()
        )
    )


def build_model(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, *, quantized: bool, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights, of which no more than one weight exists unquantized at a time.

    Gated DeltaNet layers keep their state for many tokens (`dt_bias` the inverse softplus of uniform(0.001, 0.1),
    `A_log` in [0, 1]), as trained ones do.

    Args:
        config: Its configuration.
        device: Where the weights are made.
        dtype: Of weights that are not quantized.
        quantized: Linear layers in NF4, but for those that `quantization_config` keeps.
        seed: Fixes the weights on a device.
    """
    torch.manual_seed(seed)
    model = on_meta(config, dtype)
    if quantized:
        _replace_linear(model, config, dtype)
    modules = list(model.modules())
    for module in tqdm(modules, desc="building", unit="module", leave=False):
        _materialize(model, module, device, dtype)
    model.tie_weights()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"not built: {left}"
    model.requires_grad_(False)
    keep_linear4bit_trainable(model)
    return model.eval()


def _quantization(config: PretrainedConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    return quantization_config(config, bnb_4bit_compute_dtype=dtype)


def _replace_linear(model: PreTrainedModel, config: PretrainedConfig, dtype: torch.dtype) -> None:
    # Here and not above: it is no dependency on every platform.
    from transformers.integrations import replace_with_bnb_linear

    settings = _quantization(config, dtype)
    replace_with_bnb_linear(model, modules_to_not_convert=settings.llm_int8_skip_modules, quantization_config=settings)
    # What trainers and PEFT look at.
    model.is_loaded_in_4bit = True


def _quantized_names(model: PreTrainedModel, config: PretrainedConfig) -> set[str]:
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = _quantization(config, torch.bfloat16).llm_int8_skip_modules
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(name, kept)
    }


@torch.no_grad()
def _materialize(model: PreTrainedModel, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives one module its own weights and buffers."""
    weight = module._parameters.get("weight")
    if type(weight).__name__ == "Params4bit":
        values = torch.empty(module.out_features, module.in_features, device=device, dtype=dtype)
        values.normal_(std=model.config.initializer_range)
        made = type(weight)(
            values,
            requires_grad=False,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            module=module,
        )
        module.weight = made.to(device)
        return
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_meta:
                empty = torch.empty_like(tensor, device=device)
                tensors[name] = nn.Parameter(empty, requires_grad=False) if tensors is module._parameters else empty
    with torch.device(device):
        model._init_weights(module)
    if hasattr(module, "dt_bias") and hasattr(module, "A_log"):
        step = torch.empty_like(module.dt_bias, dtype=torch.float32).uniform_(0.001, 0.1)
        module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        module.A_log.uniform_(0.0, 1.0)

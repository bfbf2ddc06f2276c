# SPDX-License-Identifier: Apache-2.0
"""Load the base in 4 bit, say what that did, and keep it trainable on a CPU."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import is_bitsandbytes_available

from frozen_peft.adapters.lora import matches_by_module
from frozen_peft.adapters.roles import as_model, bypassed_modules, find_roles, linear_modules
from frozen_peft.errors import UnsupportedArchitectureError

__all__ = [
    "QuantizationReport",
    "WeightGroup",
    "keep_linear4bit_trainable",
    "log_quantization",
    "quantization_config",
    "quantization_report",
]

logger = logging.getLogger(__name__)

# Small and exponentiated: an error in beta or decay multiplies through the whole recurrence.
_SENSITIVE_ROLES = frozenset({"beta", "decay"})
_LAYER_NUMBER = re.compile(r"\.\d+\.")


def quantization_config(model_or_config: nn.Module | PretrainedConfig | str, **kwargs: Any) -> BitsAndBytesConfig:
    """Make the configuration that loads the base in NF4 with double quantization and bfloat16 computation.

    Kept in 16 bit: projections that hold nothing but `beta` or `decay` (where they are fused into a large matrix,
    as in Mamba-2's `in_proj`, the matrix is quantized), projections with a single output (the gate of a shared
    expert), weights that a kernel reads without calling the module (`out_proj` of Mamba-2, which it could not read
    in 4 bit), `lm_head`, and what transformers leaves out by itself (tied weights, the output embedding).

    Args:
        model_or_config: The model, its configuration, or a hub id or path to load the configuration from.
        kwargs: Fields of `BitsAndBytesConfig`; they win over the ones above, except that modules named in
            `llm_int8_skip_modules` are added to those already kept.
    """
    model = as_model(model_or_config)
    kept = {"lm_head", *get_keys_to_not_convert(model), *_kept_paths(model)}
    kept.update(kwargs.pop("llm_int8_skip_modules", None) or ())
    defaults = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    return BitsAndBytesConfig(llm_int8_skip_modules=sorted(kept), **(defaults | kwargs))


def _kept_paths(model: nn.Module) -> set[str]:
    """Names within a layer of what stays in 16 bit.

    transformers takes each for the end of a full name, so the owner's name belongs to it: "b_proj" alone would
    also keep "g_b_proj" and "kv_b_proj".
    """
    bypassed = bypassed_modules(model)
    paths = {linear.path for linear in linear_modules(model) if linear.out_features == 1 or linear.name in bypassed}
    try:
        grouped = matches_by_module(find_roles(model))
    except UnsupportedArchitectureError as error:
        logger.warning("Quantizing without a role table, beta and decay projections included. %s", error)
        return paths
    for own in grouped.values():
        if all(match.role in _SENSITIVE_ROLES for match in own):
            paths.add(own[0].path)
    return paths


@dataclass(frozen=True)
class WeightGroup:
    """Weights of the same name in different layers.

    Attributes:
        name: Their name, layer numbers written as `*`.
        count: How many there are.
        dtype: `"4-bit nf4"`, `"4-bit fp4"`, or the name of the torch type.
        num_weights: Weights in all of them.
        num_bytes: Bytes of all of them, block scales included.
        is_quantized: Whether they are in 4 bit.
    """

    name: str
    count: int
    dtype: str
    num_weights: int
    num_bytes: int
    is_quantized: bool


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantized and what was not, largest first; `str()` gives the text for the log."""

    groups: tuple[WeightGroup, ...]

    @property
    def quantized(self) -> tuple[WeightGroup, ...]:
        """Groups in 4 bit."""
        return tuple(group for group in self.groups if group.is_quantized)

    @property
    def kept(self) -> tuple[WeightGroup, ...]:
        """Groups in their own precision."""
        return tuple(group for group in self.groups if not group.is_quantized)

    @property
    def quantized_bytes(self) -> int:
        """Bytes of the weights in 4 bit, block scales included."""
        return sum(group.num_bytes for group in self.quantized)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the weights in their own precision."""
        return sum(group.num_bytes for group in self.kept)

    def __str__(self) -> str:
        lines = []
        for title, groups, total in (
            ("quantized", self.quantized, self.quantized_bytes),
            ("not quantized", self.kept, self.kept_bytes),
        ):
            lines.append(f"{title}: {_readable(total)}")
            # Norms, biases and the like: listed together, or they would hide what matters.
            small = [group for group in groups if group.num_bytes * 1000 < self.quantized_bytes + self.kept_bytes]
            if len(small) < 2:
                small = []
            listed = [group for group in groups if group not in small]
            width = max((len(group.name) for group in listed), default=0)
            for group in listed:
                lines.append(
                    f"  {group.name.ljust(width)}  {group.count:>3} x  {group.dtype}  {_readable(group.num_bytes)}"
                )
            if small:
                total_small = _readable(sum(group.num_bytes for group in small))
                lines.append(f"  {len(small)} smaller kinds of weight  {total_small}")
        return "\n".join(lines)


def quantization_report(model: nn.Module) -> QuantizationReport:
    """List the weights of a loaded model by whether they are in 4 bit, with the bytes of each; adapters excluded.

    Args:
        model: A model, PEFT-wrapped or not, quantized or not.
    """
    collected: dict[tuple[str, str, bool], list[tuple[int, int]]] = {}
    for name, dtype, num_weights, num_bytes, is_quantized in _weights(as_model(model)):
        key = (_LAYER_NUMBER.sub(".*.", name), dtype, is_quantized)
        collected.setdefault(key, []).append((num_weights, num_bytes))
    groups = [
        WeightGroup(name, len(sizes), dtype, sum(size[0] for size in sizes), sum(size[1] for size in sizes), is_4bit)
        for (name, dtype, is_4bit), sizes in collected.items()
    ]
    return QuantizationReport(tuple(sorted(groups, key=lambda group: -group.num_bytes)))


def log_quantization(model: nn.Module) -> QuantizationReport:
    """Log, at level INFO, what was and was not quantized and the bytes of each; returns the report."""
    report = quantization_report(model)
    logger.info("%s", report)
    return report


def _weights(model: nn.Module) -> Iterator[tuple[str, str, int, int, bool]]:
    """Name, type, number, bytes and whether 4-bit, of every weight of the base model."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".").removesuffix(".weight")
        state = getattr(parameter, "quant_state", None)
        if state is None:
            dtype = str(parameter.dtype).removeprefix("torch.")
            yield name, dtype, parameter.numel(), parameter.numel() * parameter.element_size(), False
            continue
        scales = [state.absmax, state.code]
        if state.nested:
            scales += [state.offset, state.state2.absmax, state.state2.code]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in [parameter, *scales])
        yield name, f"4-bit {state.quant_type}", state.shape.numel(), num_bytes, True


def _readable(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def keep_linear4bit_trainable(model: nn.Module) -> int:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU; call it once after loading.

    On a CPU with AVX512-BF16, the first forward of a `Linear4bit` in eval mode rewrites the weight in place for its
    inference kernel: for good, with its block scales rounded to bfloat16, and with no backward; where the rows are
    no multiple of 32 it fails. Evaluation or a prefill in eval mode would so end the training. Each layer reads
    its own `support_avx512bf16_for_cpu` before it does that; switched off there, forwards in eval and training
    mode read the same bytes. No other hardware is affected. Needed with bitsandbytes 0.50; it can go when the
    repacking leaves the trained weight alone.

    Args:
        model: A model with or without 4-bit layers, PEFT-wrapped or not. Layers added later need another call.

    Returns:
        Number of 4-bit layers.

    Raises:
        ValueError: A layer has been repacked already; its training weight cannot be recovered exactly.
    """
    if not is_bitsandbytes_available():
        return 0
    # Here and not above: it is no dependency on every platform.
    import bitsandbytes

    guarded = 0
    for name, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit weight of {name} was repacked for inference by a forward in eval mode and can no longer "
                "be trained. Load the model again and call keep_linear4bit_trainable(model) before any forward."
            )
        module.support_avx512bf16_for_cpu = False
        guarded += 1
    return guarded

# SPDX-License-Identifier: Apache-2.0
"""The weights that an adapter on a 4-bit base saw in training: quantized, and de-quantized again."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from frozen_peft.adapters.quantization import quantization_config
from frozen_peft.merging.base_record import BaseRecord, relative_names

__all__ = ["Requantizer", "requantizer", "training_config"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Requantizer:
    """Which weights were in 4 bit, and how.

    Attributes:
        parameters: Their names in the model; whether each is kept as [in, out].
        how: `quant_type`, `double_quant`, `blocksize` and `dtype`.
        recorded: Whether training said so; else this package's defaults are assumed.
    """

    parameters: dict[str, bool]
    how: dict[str, Any]
    recorded: bool

    def prepare(self, parameter: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What makes of a weight what the adapter saw; None where it was not quantized."""
        if parameter not in self.parameters:
            return None
        return partial(_as_trained, how=self.how, turned=self.parameters[parameter])


def requantizer(record: BaseRecord | None, model: PreTrainedModel) -> Requantizer:
    """How the base was quantized in training.

    Args:
        record: What training wrote.
        model: The base model without weights.

    Raises:
        ValueError: The adapter was trained on a base that was not, or bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("`onto='quantized'` needs bitsandbytes, which is not installed.")
    if record is None:
        logger.warning(
            "The adapter does not say how its base was quantized; assumed are this package's own settings "
            "(`quantization_config`: NF4, double quantization, small and sensitive projections left out)."
        )
        return Requantizer(_by_default(model), _DEFAULT, False)
    if record.quantization is None:
        raise ValueError(
            f"{record.path} says that the adapter was trained on a base that was not quantized, so there are no "
            "quantized weights to merge onto. Leave out `onto='quantized'` (--onto quantized)."
        )
    own = relative_names(model)
    modules = dict(model.named_modules())
    names = [own[name] for name in record.quantized if name in own]
    return Requantizer({name: _is_turned(modules, name) for name in names}, record.quantization, True)


def training_config(
    record: BaseRecord | None, model: PreTrainedModel, *, assume: bool = False
) -> BitsAndBytesConfig | None:
    """The configuration that loads the base as it was in training; None where it was not quantized.

    Args:
        record: What training wrote.
        model: The base model without weights.
        assume: Whether it is this package's own where training wrote nothing.
    """
    if record is None:
        return quantization_config(model) if assume else None
    if record.quantization is None:
        return None
    own = relative_names(model)
    quantized = {own[name].removesuffix(".weight") for name in record.quantized if name in own}
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=record.quantization["quant_type"],
        bnb_4bit_use_double_quant=record.quantization["double_quant"],
        bnb_4bit_compute_dtype=getattr(torch, record.quantization["dtype"]),
        llm_int8_skip_modules=sorted(set(linear) - quantized),
    )


_DEFAULT = {"quant_type": "nf4", "double_quant": True, "blocksize": 64, "dtype": "bfloat16"}


def _by_default(model: PreTrainedModel) -> dict[str, bool]:
    """The weights that transformers would quantize with this package's configuration."""
    kept = quantization_config(model).llm_int8_skip_modules
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, kept)
    }


def _is_turned(modules: dict[str, nn.Module], parameter: str) -> bool:
    return isinstance(modules[parameter.rpartition(".")[0]], Conv1D)


@torch.no_grad()
def _as_trained(weight: torch.Tensor, *, how: dict[str, Any], turned: bool) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    as_loaded = weight.to(getattr(torch, how["dtype"]))
    codes, state = quantize_4bit(
        (as_loaded.T if turned else as_loaded).contiguous(),
        blocksize=how["blocksize"],
        compress_statistics=how["double_quant"],
        quant_type=how["quant_type"],
    )
    seen = dequantize_4bit(codes, state)
    return seen.T if turned else seen

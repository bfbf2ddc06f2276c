# SPDX-License-Identifier: Apache-2.0
"""The weights that an adapter on a 4-bit base saw in training: quantized, and de-quantized again."""

import logging
from collections.abc import Callable

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import is_bitsandbytes_available

from frozen_peft.adapters.quantization import quantization_config
from frozen_peft.merging.base_record import BaseRecord, relative_names

__all__ = ["Requantizer", "training_config"]

logger = logging.getLogger(__name__)

# Of bitsandbytes, where training wrote no other.
_BLOCK_SIZE = 64


class Requantizer:
    """Quantizes and de-quantizes those weights that were in 4 bit in training.

    Args:
        record: What training wrote.
        model: The base model without weights.

    Attributes:
        recorded: Whether training said how; else this package's defaults are assumed.

    Raises:
        ValueError: The adapter was trained on a base that was not quantized, or bitsandbytes is missing.
    """

    def __init__(self, record: BaseRecord | None, model: PreTrainedModel):
        if not is_bitsandbytes_available():
            raise ValueError("`onto='quantized'` needs bitsandbytes, which is not installed.")
        config = training_config(record, model, assume=True)
        if config is None:
            assert record is not None  # one is assumed where there is none
            raise ValueError(
                f"{record.path} says that the adapter was trained on a base that was not quantized, so there are no "
                "quantized weights to merge onto. Leave out `onto='quantized'` (--onto quantized)."
            )
        linear = {
            f"{name}.weight": isinstance(module, Conv1D)
            for name, module in model.named_modules()
            if isinstance(module, Conv1D) or type(module) is nn.Linear
        }
        self._config, self._block_size, self.recorded = config, _BLOCK_SIZE, False
        if record is not None and record.quantization is not None:
            self._block_size, self.recorded = record.quantization["blocksize"], True
            names = _quantized(record, model)
        else:
            logger.warning(
                "The adapter does not say how its base was quantized; assumed are this package's own settings "
                "(`quantization_config`: NF4, double quantization, small and sensitive projections left out)."
            )
            kept = config.llm_int8_skip_modules
            names = {name for name in linear if should_convert_module(name.removesuffix(".weight"), kept)}
        # Whether each is kept as [in, out].
        self._transposed = {name: linear.get(name, False) for name in names}

    def prepare(self, parameter: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What makes of a weight what the adapter saw; None where it was not quantized."""
        if parameter not in self._transposed:
            return None
        if self._transposed[parameter]:
            return lambda weight: self._as_trained(weight.T).T
        return self._as_trained

    @torch.no_grad()
    def _as_trained(self, weight: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(
            weight.to(self._config.bnb_4bit_compute_dtype).contiguous(),
            blocksize=self._block_size,
            compress_statistics=self._config.bnb_4bit_use_double_quant,
            quant_type=self._config.bnb_4bit_quant_type,
        )
        return dequantize_4bit(codes, state)


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
    quantized = _quantized(record, model)
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=record.quantization["quant_type"],
        bnb_4bit_use_double_quant=record.quantization["double_quant"],
        bnb_4bit_compute_dtype=getattr(torch, record.quantization["dtype"]),
        llm_int8_skip_modules=sorted(name for name in linear if f"{name}.weight" not in quantized),
    )


def _quantized(record: BaseRecord, model: PreTrainedModel) -> set[str]:
    """Names in the model of the weights that were in 4 bit."""
    own = relative_names(model)
    return {own[name] for name in record.quantized if name in own}

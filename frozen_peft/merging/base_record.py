# SPDX-License-Identifier: Apache-2.0
"""What an adapter's folder says of the base it was trained on, and whether a checkpoint is that base.

PEFT records a name, which says little: a folder is written anew, a branch moves on. Training adds the names, shapes
and a few values of the base's weights, and how they were quantized. Names count from the text model, so that both
classes of one checkpoint have the same.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from frozen_peft.adapters.initialisation import spread_values
from frozen_peft.adapters.vocabulary import vocabulary_parameters
from frozen_peft.merging.source import Checkpoint
from frozen_peft.utils.compat.transformers import parameters_of_tensors
from frozen_peft.utils.files import read_json, whole_file

__all__ = [
    "RECORD",
    "BaseRecord",
    "difference_from",
    "read_record",
    "relative_names",
    "require_same_base",
    "save_base_record",
]

logger = logging.getLogger(__name__)

RECORD = "base_record.json"
_FORMAT = 1
# Tensors that are sampled, spread over the model, and values of each.
_NUM_TENSORS, _NUM_VALUES = 32, 16
# What bitsandbytes quantizes by.
_QUANTIZATION = {
    "quant_type": ("nf4", "fp4"),
    "double_quant": (True, False),
    "blocksize": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "dtype": ("bfloat16", "float16", "float32"),
}
_LAYER = re.compile(r"\.(\d+)\.")
# Values that went through a 16-bit type differ by its rounding: eight bits of mantissa in bfloat16.
_ROUNDING = 2.0**-7
# Below it float16 has nothing.
_SMALLEST = 2.0**-24
_WRAPPING = re.compile(r"\.(?:base_layer|original_module|token_adapter)(?=\.)")


@dataclass(frozen=True)
class BaseRecord:
    """What training wrote of its base.

    Attributes:
        path: The file.
        shapes: By name; layers are numbered.
        quantized: Names of the weights that were in 4 bit.
        quantization: How: `quant_type`, `double_quant`, `blocksize` and the `dtype` of the weights before; None where
            nothing was.
        samples: By name, values by their flat index.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    quantized: frozenset[str]
    quantization: dict[str, Any] | None
    samples: dict[str, dict[int, float]]


def relative_names(model: PreTrainedModel) -> dict[str, str]:
    """The model's own parameter names, by those that a record uses."""
    return {relative: name for relative, name, _ in _parameters(model)}


def save_base_record(model: nn.Module, folder: str | Path) -> None:
    """Writes what is known of the base into the folder of an adapter that was just saved there.

    Without adapters there is nothing to merge, and where a process holds only its part of the weights (FSDP,
    DeepSpeed ZeRO-3) they cannot be read: nothing is written then.
    """
    if not isinstance(model, PeftModel):
        return
    parameters = {relative: parameter for relative, _, parameter in _parameters(model)}
    states = {
        name: state for name, parameter in parameters.items() if (state := getattr(parameter, "quant_state", None))
    }
    if any(
        type(parameter.data) is not torch.Tensor or (not parameter.numel() and name not in states)
        for name, parameter in parameters.items()
    ):
        logger.info("The base's weights are in parts here; %s is not written.", RECORD)
        return
    groups: dict[tuple[str, tuple[int, ...], bool], list[int]] = {}
    for name, parameter in parameters.items():
        layer = _LAYER.search(name)
        pattern = name if layer is None else f"{name[: layer.start()]}.*.{name[layer.end() :]}"
        key = (pattern, tuple(states.get(name, parameter).shape), name in states)
        groups.setdefault(key, []).append(-1 if layer is None else int(layer[1]))
    readable = [
        (name, parameter)
        for name, parameter in parameters.items()
        if name not in states and parameter.ndim >= 2 and not parameter.requires_grad
    ]
    record = {
        "format": _FORMAT,
        "tensors": [
            {"name": pattern, "shape": list(shape), "quantized": quantized, "layers": layers}
            for (pattern, shape, quantized), layers in groups.items()
        ],
        "quantization": next((_quantization(state) for state in states.values()), None),
        "samples": [_sample(*item) for item in readable[:: max(1, len(readable) // _NUM_TENSORS)]],
    }
    with whole_file(Path(folder) / RECORD) as file:
        file.write(json.dumps(record) + "\n")


def read_record(folder: Path) -> BaseRecord | None:
    """What the adapter's folder says; None where it says nothing.

    Raises:
        ValueError: The file is not one that this version writes.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    values = read_json(path)
    try:
        if values["format"] != _FORMAT:
            raise ValueError(f"its format is {values['format']!r}, and {_FORMAT} is known")
        how = values["quantization"]
        if how is not None and not all(how[field] in known for field, known in _QUANTIZATION.items()):
            raise ValueError(f"bitsandbytes does not quantize by {how}")
        shapes, quantized = {}, set()
        for group in values["tensors"]:
            for layer in group["layers"]:
                name = group["name"] if layer < 0 else group["name"].replace("*", str(int(layer)), 1)
                shapes[name] = tuple(map(int, group["shape"]))
                if group["quantized"]:
                    quantized.add(name)
        samples = {
            item["name"]: dict(zip(map(int, item["indices"]), map(float, item["values"]), strict=True))
            for item in values["samples"]
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}). Remove it to merge without checking that the base is the one that "
            "the adapter was trained on."
        ) from error
    return BaseRecord(path, shapes, frozenset(quantized), how, samples)


def require_same_base(record: BaseRecord, model: PreTrainedModel, checkpoint: Checkpoint) -> int:
    """Compares names, shapes and sampled values with a checkpoint's.

    Args:
        record: What training wrote.
        model: The base model without weights.
        checkpoint: Its weights.

    Returns:
        Number of tensors of which values were compared.

    Raises:
        ValueError: The checkpoint is another model.
    """
    names = relative_names(model)
    loaded = parameters_of_tensors(model, checkpoint.tensors)
    stored = {parameter: name for name, (parameter, is_converted) in loaded.items() if not is_converted}
    difference = _different_shape(record, {own: tuple(model.get_parameter(name).shape) for own, name in names.items()})
    homes = {own: stored[name] for own, name in names.items() if name in stored and own in record.samples}
    # Rows that training has added to the vocabulary are not the checkpoint's.
    resized = {own for own, name in names.items() if name in vocabulary_parameters(model)}

    def read(own: str, index: int) -> float | None:
        shard, home = checkpoint.shard_of(homes[own]), homes[own]
        shape = shard.tensors[home].shape
        row, column = divmod(index, math.prod(shape[1:]))
        if not 0 <= row < shape[0]:
            return None if own in resized else math.nan
        return float(shard.read(home, row, row + 1).reshape(-1)[column])

    difference = difference or _different_value({own: record.samples[own] for own in homes}, read)
    if difference is not None:
        raise ValueError(
            f"{checkpoint.folder} is not the base that {record.path.parent} was trained on: {difference}. Name the "
            "right one with --base (`base`), or merge onto this one all the same with --any-base (`any_base=True`)."
        )
    return len(homes)


def difference_from(record: BaseRecord, model: PeftModel) -> str | None:
    """What sampled value of the base is another one in a loaded model than it was in training; None where none is."""
    parameters = {relative: parameter for relative, _, parameter in _parameters(model)}
    for name, values in record.samples.items():
        if name not in parameters or parameters[name].numel() <= max(values, default=-1):
            return f"`{name}` was there in training"
    return _different_value(record.samples, lambda name, index: float(parameters[name].detach().reshape(-1)[index]))


def _different_shape(record: BaseRecord, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first weight that was of another shape in training."""
    for name in sorted(set(shapes) | set(record.shapes)):
        now, then = shapes.get(name), record.shapes.get(name)
        # A weight that is kept as [in, out] is turned before it is quantized.
        turned = name in record.quantized and then is not None and now == then[::-1]
        if now != then and not turned:
            shown = ["not there" if shape is None else str(list(shape)) for shape in (now, then)]
            return f"`{name}` is {shown[0]}, and was {shown[1]} in training"
    return None


def _different_value(
    samples: Mapping[str, Mapping[int, float]], read: Callable[[str, int], float | None]
) -> str | None:
    """The first value that was another one in training, up to rounding; `read` gives None for what is not compared."""
    for name, values in samples.items():
        for index, then in values.items():
            now = read(name, index)
            if now is not None and not abs(now - then) <= _ROUNDING * max(abs(now), abs(then)) + _SMALLEST:
                return f"value {index} of `{name}` is {now:g}, and was {then:g} in training"
    return None


def _quantization(state: Any) -> dict[str, Any]:
    """How bitsandbytes has quantized a weight."""
    return {
        "quant_type": state.quant_type,
        "double_quant": state.nested,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
    }


def _sample(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    indices, values = spread_values(parameter, _NUM_VALUES)
    return {"name": name, "indices": indices, "values": values.tolist()}


def _parameters(model: PeftModel | PreTrainedModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """The base's parameters in text model and head: by names that count from the text model, and by their own."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = {id(module): name for name, module in base.named_modules()}
    prefixes = {f"{modules[id(base.get_decoder())]}.": ""}
    if (head := base.get_output_embeddings()) is not None:
        prefixes[f"{modules[id(head)]}."] = "head."
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if ".lora_" in name or ".modules_to_save." in name or ".trainable_tokens_" in name:
            continue
        plain = _WRAPPING.sub("", name)
        prefix = next((prefix for prefix in prefixes if plain.startswith(prefix)), None)
        if prefix is not None:
            yield prefixes[prefix] + plain.removeprefix(prefix), name, parameter

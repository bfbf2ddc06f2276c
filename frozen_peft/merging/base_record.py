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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from frozen_peft.adapters.vocabulary import vocabulary_parameters
from frozen_peft.merging.source import Checkpoint, read_json

__all__ = [
    "RECORD",
    "BaseRecord",
    "describe_base",
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
# What bitsandbytes quantizes in.
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
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
        samples: By name, flat indices and values.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    quantized: frozenset[str]
    quantization: dict[str, Any] | None
    samples: dict[str, tuple[list[int], list[float]]]


def relative_names(model: PreTrainedModel) -> dict[str, str]:
    """The model's own parameter names, by those that a record uses."""
    prefixes = _prefixes(model)
    named = ((_relative(prefixes, name), name) for name, _ in model.named_parameters(remove_duplicate=False))
    return {relative: name for relative, name in named if relative is not None}


def save_base_record(model: nn.Module, folder: str | Path) -> None:
    """Writes what is known of the base into the folder of an adapter that was just saved there.

    Without adapters there is nothing to merge, and where a process holds only its part of the weights (FSDP,
    DeepSpeed ZeRO-3) they cannot be read: nothing is written then.
    """
    if not isinstance(model, PeftModel):
        return
    record = describe_base(model)
    if record is None:
        logger.info("The base's weights are in parts here; %s is not written.", RECORD)
        return
    (Path(folder) / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


def describe_base(model: PeftModel) -> dict[str, Any] | None:
    """The record's content; None where weights are in parts."""
    groups: dict[tuple[str, tuple[int, ...], bool], list[int]] = {}
    readable: list[tuple[str, nn.Parameter]] = []
    quantization = None
    for name, parameter in _base_parameters(model):
        state = getattr(parameter, "quant_state", None)
        shape = tuple((parameter if state is None else state).shape)
        if type(parameter.data) is not torch.Tensor or (not parameter.numel() and state is None):
            return None
        if state is not None:
            quantization = {
                "quant_type": state.quant_type,
                "double_quant": state.nested,
                "blocksize": state.blocksize,
                "dtype": str(state.dtype).removeprefix("torch."),
            }
        elif parameter.ndim >= 2 and not parameter.requires_grad:
            readable.append((name, parameter))
        layer = _LAYER.search(name)
        pattern = name if layer is None else f"{name[: layer.start()]}.*.{name[layer.end() :]}"
        groups.setdefault((pattern, shape, state is not None), []).append(-1 if layer is None else int(layer[1]))
    step = max(1, len(readable) // _NUM_TENSORS)
    return {
        "format": _FORMAT,
        "tensors": [
            {"name": pattern, "shape": list(shape), "quantized": quantized, "layers": layers}
            for (pattern, shape, quantized), layers in groups.items()
        ],
        "quantization": quantization,
        "samples": [_sample(name, parameter) for name, parameter in readable[::step]],
    }


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
        shapes, quantized = {}, set()
        for group in values["tensors"]:
            for layer in group["layers"]:
                name = group["name"] if layer < 0 else group["name"].replace("*", str(int(layer)), 1)
                shapes[name] = tuple(map(int, group["shape"]))
                if group["quantized"]:
                    quantized.add(name)
        samples = {
            item["name"]: (list(map(int, item["indices"])), list(map(float, item["values"])))
            for item in values["samples"]
        }
        how = values["quantization"]
        if how is not None:
            how = {
                "quant_type": {"nf4": "nf4", "fp4": "fp4"}[how["quant_type"]],
                "double_quant": bool(how["double_quant"]),
                "blocksize": {size: size for size in _BLOCK_SIZES}[how["blocksize"]],
                "dtype": {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}[how["dtype"]],
            }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}). Remove it to merge without checking that the base is the one that "
            "the adapter was trained on."
        ) from error
    return BaseRecord(path, shapes, frozenset(quantized), how, samples)


def require_same_base(
    record: BaseRecord,
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    stored: Mapping[str, str],
) -> int:
    """Compares names, shapes and sampled values with a checkpoint's.

    Args:
        record: What training wrote.
        model: The base model without weights.
        checkpoint: Its weights.
        stored: The tensor that each parameter is, for those that are one tensor.

    Returns:
        Number of tensors of which values were compared.

    Raises:
        ValueError: The checkpoint is another model.
    """
    names = relative_names(model)
    own = dict(model.named_parameters(remove_duplicate=False))
    shapes = {relative: tuple(own[name].shape) for relative, name in names.items()}
    for name in sorted(set(shapes) | set(record.shapes)):
        then = record.shapes.get(name)
        # A weight that is kept as [in, out] is turned before it is quantized.
        turned = name in record.quantized and then is not None and shapes.get(name) == then[::-1]
        if shapes.get(name) != then and not turned:
            raise _other_base(
                record,
                checkpoint,
                f"`{name}` is {_shown(shapes.get(name))}, and was {_shown(then)} in training",
            )
    compared = 0
    resized = vocabulary_parameters(model)
    for name, (indices, values) in record.samples.items():
        tensor = stored.get(names[name]) if name in names else None
        if tensor is None:
            continue
        if names[name] in resized:
            # Rows that training has added are not the checkpoint's.
            num_there = math.prod(checkpoint.shard_of(tensor).tensors[tensor].shape)
            values = [value for index, value in zip(indices, values, strict=True) if index < num_there]
            indices = [index for index in indices if index < num_there]
        found = _values(checkpoint, tensor, indices)
        compared += 1
        for index, now, value in zip(indices, found, values, strict=True):
            if not _is_same(now, value):
                raise _other_base(
                    record, checkpoint, f"value {index} of `{tensor}` is {now:g}, and was {value:g} in training"
                )
    return compared


def difference_from(record: BaseRecord, model: PeftModel) -> str | None:
    """What sampled value of the base is another one in a loaded model than it was in training; None where none is."""
    parameters = dict(_base_parameters(model))
    for name, (indices, values) in record.samples.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.numel() <= max(indices, default=-1):
            return f"`{name}` was there in training"
        flat = parameter.detach().reshape(-1)
        found = flat[torch.tensor(indices, device=flat.device)].float().tolist()
        for index, now, value in zip(indices, found, values, strict=True):
            if not _is_same(now, value):
                return f"value {index} of `{name}` is {now:g}, and was {value:g} in training"
    return None


def _is_same(now: float, then: float) -> bool:
    """Whether two values are one, up to rounding."""
    return abs(now - then) <= _ROUNDING * max(abs(now), abs(then)) + _SMALLEST


def _other_base(record: BaseRecord, checkpoint: Checkpoint, difference: str) -> ValueError:
    return ValueError(
        f"{checkpoint.folder} is not the base that {record.path.parent} was trained on: {difference}. Name the right "
        "one with --base (`base`), or merge onto this one all the same with --any-base (`any_base=True`)."
    )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else str(list(shape))


def _values(checkpoint: Checkpoint, name: str, indices: list[int]) -> list[float]:
    shard = checkpoint.shard_of(name)
    shape = shard.tensors[name].shape
    row_size = 1
    for size in shape[1:]:
        row_size *= size
    found = []
    for index in indices:
        row = index // row_size
        if not 0 <= row < shape[0]:
            found.append(float("nan"))
            continue
        found.append(float(shard.read(name, row, row + 1).reshape(-1)[index % row_size]))
    return found


def _sample(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    num_values = min(_NUM_VALUES, parameter.numel())
    indices = [(2 * part + 1) * parameter.numel() // (2 * num_values) for part in range(num_values)]
    flat = parameter.detach().reshape(-1)
    values = flat[torch.tensor(indices, device=flat.device)].float().cpu()
    return {"name": name, "indices": indices, "values": values.tolist()}


def _base_parameters(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the base's text model and head, by names that count from the text model."""
    base = model.get_base_model()
    prefixes = _prefixes(base)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if ".lora_" in name or ".modules_to_save." in name or ".trainable_tokens_" in name:
            continue
        relative = _relative(prefixes, _WRAPPING.sub("", name))
        if relative is not None:
            yield relative, parameter


def _prefixes(model: PreTrainedModel) -> dict[str, str]:
    """What the names of the text model's and the head's parameters begin with, and what they begin with here."""
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = {f"{names[id(model.get_decoder())]}.": ""}
    head = model.get_output_embeddings()
    if head is not None:
        prefixes[f"{names[id(head)]}."] = "head."
    return prefixes


def _relative(prefixes: Mapping[str, str], name: str) -> str | None:
    """A parameter's name from the text model on; the head's own; None for what is neither."""
    for prefix, own in prefixes.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return None

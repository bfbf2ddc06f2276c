# SPDX-License-Identifier: Apache-2.0
"""A PEFT adapter's folder: what it changes of a model, by the model's own names.

PEFT itself builds its layers, on a model without weights, and loads the adapter into them: ranks, scales, fused
experts and what is saved beside LoRA mean what they mean to `PeftModel.from_pretrained`.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from frozen_peft.adapters.activated import CANNOT_MERGE
from frozen_peft.adapters.initialisation import CONVERT, initial_change
from frozen_peft.adapters.roles import bypassed_modules
from frozen_peft.adapters.vocabulary import without_copies
from frozen_peft.merging.layout import adapted_modules, change_layout, layout_of_keys, layout_of_model
from frozen_peft.merging.patterns import require_quick_patterns
from frozen_peft.merging.source import find_folder, load_tensors, read_json
from frozen_peft.merging.updates import AddVector, Layered, LowRank, Replacement, RowReplacement, Update

__all__ = ["AdapterFolder", "open_adapter", "updates_of"]

logger = logging.getLogger(__name__)

_NAME = "default"
_PREFIX = "base_model.model."


def _is(*kinds: type) -> Callable[[Any], bool]:
    """Checks for a value of just these types; a bool is no int."""
    return lambda value: type(value) in kinds


def _list_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(type(item) in kinds for item in value)


def _pattern_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is dict and all(type(item) in kinds and item > 0 for item in value.values())


def _tokens_by_module(value: Any) -> bool:
    return type(value) is dict and all(map(_list_of(int), value.values()))


_NONE, _TEXT, _FLAG, _TEXTS = _is(type(None)), _is(str), _is(bool), _list_of(str)
# The fields that say what an adapter computes, with what they may be.
_FIELDS: dict[str, tuple[Callable[[Any], bool], ...]] = {
    "r": (_is(int),),
    "lora_alpha": (_is(int, float),),
    "target_modules": (_NONE, _TEXT, _TEXTS),
    "exclude_modules": (_NONE, _TEXT, _TEXTS),
    "target_parameters": (_NONE, _TEXTS),
    "modules_to_save": (_NONE, _TEXTS),
    "layers_to_transform": (_NONE, _is(int), _list_of(int)),
    "layers_pattern": (_NONE, _TEXT, _TEXTS),
    "rank_pattern": (_NONE, _pattern_of(int)),
    "alpha_pattern": (_NONE, _pattern_of(int, float)),
    "trainable_token_indices": (_NONE, _list_of(int), _tokens_by_module),
    "fan_in_fan_out": (_FLAG,),
    "use_rslora": (_FLAG,),
    "use_dora": (_FLAG,),
    "lora_bias": (_FLAG,),
    "ensure_weight_tying": (_FLAG,),
    "bias": (_TEXT,),
}
# What says where the base is.
_BASE_FIELDS = dict.fromkeys(("base_model_name_or_path", "revision"), (_NONE, _TEXT))
_NOT_MERGED = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow, which mixes adapters by the input",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA, which changes the base weight",
    "velora_config": "VeLoRA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron's layers",
}


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as it lies on disk.

    Attributes:
        name: As the caller named it.
        folder: Where it is.
        config: `adapter_config.json`.
        tensors: Its weights, by their names in the file.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def open_adapter(name: str | Path, *, allow_pickle: bool = False, activated: bool = False) -> AdapterFolder:
    """Reads an adapter, and refuses one that cannot be merged exactly.

    Args:
        name: Its folder, or its id on the hub.
        allow_pickle: Whether its weights may be a pickle.
        activated: Whether it may be one that is switched on by tokens, which can be exported and not merged.

    Raises:
        ValueError: It is no whole LoRA adapter, or of a kind that has no exact merged weights; the message says which.
        FileNotFoundError: There is no such folder.
    """
    folder = find_folder(name, what="the adapter", allow_pickle=allow_pickle)
    path = folder / "adapter_config.json"
    config = read_json(path)
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise ValueError(f"{path} has `peft_type` {config.get('peft_type')!r}; only LORA can be merged here.")
    for field, allowed in (_FIELDS | _BASE_FIELDS).items():
        value = config.get(field)
        if field in config and not any(check(value) for check in allowed):
            raise ValueError(f"{path} has {field!r}: {value!r}, which PEFT cannot read.")
    if config.get("alora_invocation_tokens") and not activated:
        raise ValueError(f"{folder}: {CANNOT_MERGE}")
    for field, meaning in _NOT_MERGED.items():
        if config.get(field):
            raise ValueError(f"{path} has {field!r}: {config[field]!r}. An adapter with {meaning} is not merged here.")
    if change := initial_change(config):
        raise ValueError(
            f"{path} has {change}, which changes the base weights before training, so that the adapter belongs to "
            f"weights the checkpoint does not hold. {CONVERT}"
        )
    tensors = without_copies(load_tensors(folder, "adapter_model", allow_pickle=allow_pickle))
    if not tensors:
        raise ValueError(f"{folder} holds an adapter without tensors.")
    # Of the other class's names the patterns are written out from these.
    require_quick_patterns(path, config, adapted_modules(tensors))
    return AdapterFolder(str(name), folder, config, tensors)


def updates_of(adapter: AdapterFolder, make_model: Callable[[], PreTrainedModel]) -> dict[str, Update]:
    """What an adapter changes of a model.

    Args:
        adapter: The adapter, trained on this class of the model or on the other of text model and wrapper.
        make_model: Makes the base model on the meta device; PEFT changes the one it gets.

    Returns:
        Updates by the name of the parameter in the model.

    Raises:
        ValueError: A tensor of the adapter has no home in this model, a home has no tensor, or one does not fit.
    """
    model = make_model()
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    bypassed_names = bypassed_modules(model)
    config, tensors = adapter.config, adapter.tensors
    modules = (name for name, _ in model.named_modules())
    require_quick_patterns(adapter.folder / "adapter_config.json", config, [*modules, *names])
    needed = layout_of_model(model)
    if needed is not None and layout_of_keys(tensors) != needed:
        config, tensors = change_layout(config, tensors, needed)
    wrapped = _load(adapter.folder, model, _lora_config(adapter.folder, config), tensors)
    found: dict[str, Update] = {}
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            found.update(_lora_updates(adapter.folder, _plain(name), module))
        elif isinstance(module, ModulesToSaveWrapper):
            for own, tensor in module.modules_to_save[_NAME].state_dict().items():
                found[f"{_plain(name)}.{own}"] = Replacement(tensor)
        elif isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter
            values = (layer.tied_adapter or layer).trainable_tokens_delta[_NAME].detach()
            found[f"{_plain(name)}.weight"] = RowReplacement(torch.tensor(layer.token_indices[_NAME]), values)
    # What PEFT has loaded into the model itself: biases, and embeddings whose vocabulary was resized.
    for name, parameter in wrapped.named_parameters(remove_duplicate=False):
        home = _plain(name)
        if home not in names or not _is_loaded(parameter):
            continue
        changed = found.get(home)
        if changed is None:
            found[home] = Replacement(parameter.detach())
        elif not isinstance(changed, Replacement | Layered):
            found[home] = Layered(parameter.detach(), changed)
    bypassed = [name for name in bypassed_names if f"{name}.weight" in found]
    if bypassed:
        raise ValueError(
            f"{adapter.folder} adapts {', '.join(bypassed)}, whose weight a kernel of this architecture reads without "
            "calling the module: the adapter did nothing there in training and would do something when merged."
        )
    homeless = sorted(set(found) - names)
    if homeless:
        raise ValueError(f"{adapter.folder} changes {', '.join(homeless)}, which the base model does not have.")
    return found


def _lora_config(folder: Path, config: dict[str, Any]) -> LoraConfig:
    """PEFT's configuration, of the fields that say what the adapter computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return LoraConfig(**{name: config[name] for name in _FIELDS if name in config}, task_type="CAUSAL_LM")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'adapter_config.json'} cannot be read by PEFT: {error}") from error


def _load(folder: Path, model: PreTrainedModel, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> PeftModel:
    """Has PEFT put the adapter on a model without weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = PeftModel(_fill_in(model), config, adapter_name=_NAME, low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(wrapped, tensors, adapter_name=_NAME, low_cpu_mem_usage=True)
        except KeyError as error:
            raise ValueError(f"{folder} lacks the tensor {error} that its configuration asks for.") from error
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, re.error) as error:
            # torch appends its own frames.
            problem = str(error).partition("\nException raised from")[0]
            raise ValueError(
                f"{folder} does not fit the base model: {problem}\nThe base has to be the model that the adapter was "
                "trained on, with the same vocabulary."
            ) from error
    if result.unexpected_keys:
        raise ValueError(
            f"{folder}: {len(result.unexpected_keys)} of {len(tensors)} tensors have no home in the base model: "
            f"{', '.join(sorted(result.unexpected_keys))}. Merge onto the model that the adapter was trained on."
        )
    own = ((name, parameter) for name, parameter in wrapped.named_parameters() if _is_adapter(name))
    missing = [name for name, parameter in own if not _is_loaded(parameter)]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors that its configuration asks for in this base model: "
            f"{', '.join(sorted(missing))}. Merge onto the model that the adapter was trained on."
        )
    return wrapped


def _fill_in(model: PreTrainedModel) -> PreTrainedModel:
    """Puts one zero, seen in every place, where a model without weights has its parameters.

    PEFT moves the adapter that it loads to the device of the weights, and the meta device would lose it.
    """
    zeros: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, zeros.setdefault(id(parameter), nn.Parameter(zero, requires_grad=False)))
    return model


def _is_loaded(parameter: nn.Parameter) -> bool:
    """Whether a parameter is neither on the meta device nor one of the zeros."""
    return not parameter.is_meta and (parameter.numel() < 2 or any(parameter.stride()))


def _is_adapter(name: str) -> bool:
    return ".lora_" in name or f".modules_to_save.{_NAME}" in name or ".trainable_tokens_delta." in name


def _plain(name: str) -> str:
    """The model's own name of what PEFT has wrapped."""
    name = name.removeprefix(_PREFIX)
    for wrapping in (".base_layer", ".original_module", ".token_adapter"):
        name = name.replace(wrapping, "")
    return name


def _lora_updates(folder: Path, home: str, layer: LoraLayer) -> Iterator[tuple[str, Update]]:
    """What one layer of PEFT changes: parameter names and updates."""
    variant = layer.lora_variant.get(_NAME)
    kind = type(layer)
    if variant is not None and not (kind is Linear and isinstance(variant, DoraLinearVariant)):
        raise ValueError(f"{folder} adapts {home} by {type(variant).__name__}, which is not merged here.")
    scale = layer.scaling[_NAME]
    if kind is Embedding:
        down, up = layer.lora_embedding_A[_NAME].detach(), layer.lora_embedding_B[_NAME].detach()
        yield f"{home}.weight", LowRank(down.T, up.T, scale)
        return
    if kind not in (Linear, ParamWrapper):
        raise ValueError(f"{folder} adapts {home}, a {kind.__name__}; only linear modules and embeddings are merged.")
    down, up = layer.lora_A[_NAME].weight.detach(), layer.lora_B[_NAME].weight.detach()
    if kind is ParamWrapper:
        # Experts see to their own order of inputs and outputs.
        left, right, scale = (up, down, scale) if layer.num_experts == 1 else layer.get_delta_factors(_NAME)
        yield f"{home}.{layer.parameter_name}", LowRank(left.detach(), right.detach(), scale)
        return
    magnitude = layer.lora_magnitude_vector[_NAME].weight.detach() if variant is not None else None
    if layer.fan_in_fan_out:
        yield f"{home}.weight", LowRank(down.T, up.T, scale, magnitude, outputs_last=True)
    else:
        yield f"{home}.weight", LowRank(up, down, scale, magnitude)
    if layer.lora_bias[_NAME]:
        yield f"{home}.bias", AddVector(layer.lora_B[_NAME].bias.detach(), scale)

# SPDX-License-Identifier: Apache-2.0
"""A PEFT adapter's folder: what it changes of a model, by the model's own names.

PEFT itself builds its layers, on a model without weights, and loads the adapter into them: ranks, scales, fused
experts and what is saved beside LoRA mean what they mean to `PeftModel.from_pretrained`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from frozen_peft.adapters.activated import CANNOT_MERGE
from frozen_peft.adapters.initialisation import CONVERT, initial_change
from frozen_peft.adapters.pickles import require_no_pickle
from frozen_peft.adapters.roles import bypassed_modules
from frozen_peft.adapters.vocabulary import without_copies
from frozen_peft.merging.layout import change_layout, layout_of_model
from frozen_peft.merging.source import find_folder
from frozen_peft.merging.updates import AddVector, Layered, LowRank, Replacement, RowReplacement, Update
from frozen_peft.utils.compat.peft import is_dora, variant_name
from frozen_peft.utils.files import read_json

__all__ = ["AdapterFolder", "open_adapter", "updates_of"]

_NAME = "default"
_PREFIX = "base_model.model."


# Fields that are read here; of the others PEFT says whether it can read them.
_KINDS = {
    "base_model_name_or_path": str,
    "revision": str,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "target_parameters": list,
    "modules_to_save": list,
}
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
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} has `peft_type` {config.get('peft_type')!r}; only LORA can be merged here.")
    for field, kind in _KINDS.items():
        if not isinstance(config.get(field) or kind(), kind):
            raise ValueError(f"{path} has {field!r}: {config[field]!r}, which cannot be read by PEFT.")
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
    if not allow_pickle:
        require_no_pickle(folder)
    # PEFT would ask the hub for what is not there.
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ValueError(f"{folder} holds no adapter_model.safetensors.")
    with _readable(folder):
        tensors = without_copies(load_peft_weights(str(folder), device="cpu"))
    if not tensors:
        raise ValueError(f"{folder} holds an adapter without tensors.")
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
    config, tensors = change_layout(adapter.config, adapter.tensors, layout_of_model(model))
    wrapped = _load(adapter.folder, model, config, tensors)
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


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Makes an error that names the adapter of whatever PEFT makes of a file that anyone may have written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            # torch appends its own frames.
            problem = f"{type(error).__name__}: {error}".partition("\nException raised from")[0]
            raise ValueError(
                f"{folder} does not fit the base model, or cannot be read by PEFT: {problem}\nThe base has to be the "
                "model that the adapter was trained on, with the same vocabulary."
            ) from error


def _load(folder: Path, model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> PeftModel:
    """Has PEFT put the adapter on a model without weights."""
    # How its weights began is past, and a few ways of it need weights.
    config = {name: value for name, value in config.items() if name != "init_lora_weights"}
    with _readable(folder):
        peft_config = LoraConfig.from_peft_type(**config)
        wrapped = PeftModel(_fill_in(model), peft_config, adapter_name=_NAME, low_cpu_mem_usage=True)
        result = set_peft_model_state_dict(wrapped, tensors, adapter_name=_NAME, low_cpu_mem_usage=True)
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
    kind, variant = type(layer), variant_name(layer, _NAME)
    if variant is not None and not (kind is Linear and is_dora(layer, _NAME)):
        raise ValueError(f"{folder} adapts {home} by {variant}, which is not merged here.")
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

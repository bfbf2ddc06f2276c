# SPDX-License-Identifier: Apache-2.0
"""Text model and vision-language wrapper: two classes of one checkpoint that name the same weights differently.

The wrapper keeps the text model at `model.language_model`, the text class at `model`. PEFT ignores, with a warning,
what it finds no module for, so an adapter with the other class's names would do nothing.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any, Literal

import torch
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

__all__ = ["Layout", "change_layout", "layout_of_keys", "layout_of_model", "text_name"]

Layout = Literal["text", "wrapper"]

_TEXT, _WRAPPER = "base_model.model.model.", "base_model.model.model.language_model."
_MODULE = re.compile(r"base_model\.model\.(?P<module>.+?)(?:\.base_layer)*\.lora_")


def text_name(name: str) -> str:
    """A parameter's name in the text class."""
    return re.sub(r"^model\.language_model\.", "model.", name)


def layout_of_keys(names: Iterable[str]) -> Layout:
    """The class that an adapter's tensors are named for."""
    return "wrapper" if any(name.startswith(_WRAPPER) for name in names) else "text"


def layout_of_model(model: PreTrainedModel) -> Layout | None:
    """Which of the two classes a model is; None where it names its text model otherwise."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    layouts: dict[str, Layout] = {"model": "text", "model.language_model": "wrapper"}
    return layouts.get(name)


def change_layout(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], layout: Layout
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An adapter under the names of the other class.

    Which modules are adapted is written out module by module: a pattern or a list of name endings that fits one class
    may match a vision tower in the other.

    Args:
        config: `adapter_config.json`.
        tensors: Its weights, by their names in the file.
        layout: The class they are to be named for.

    Returns:
        Configuration and weights; the same ones if they are named so already.

    Raises:
        ValueError: The adapter adapts a part that the text class does not have.
    """
    if layout_of_keys(tensors) == layout:
        return config, tensors
    renamed = {_renamed(name, layout): tensor for name, tensor in tensors.items()}
    changed = dict(config)
    # Experts that `target_parameters` adapts are named there, by endings.
    modules = _modules(renamed) - _parameter_owners(config, renamed)
    if config.get("target_modules"):
        changed["target_modules"] = sorted(modules)
        changed["exclude_modules"] = changed["layers_to_transform"] = changed["layers_pattern"] = None
    for field, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if config.get(field):
            # PEFT's own defaults, where the configuration leaves them out.
            changed[field] = _spelled_out(config[field], config.get(usual, 8), tensors, layout)
    for field in ("target_parameters", "modules_to_save"):
        if config.get(field):
            changed[field] = [_renamed_text(name, layout) for name in config[field]]
    return changed, renamed


def _renamed(name: str, layout: Layout) -> str:
    if layout == "wrapper":
        return name.replace(_TEXT, _WRAPPER, 1) if name.startswith(_TEXT) else name
    if name.startswith(_WRAPPER):
        return name.replace(_WRAPPER, _TEXT, 1)
    if name.startswith(_TEXT):
        raise ValueError(f"`{name}` adapts a part of the vision-language model that its text model does not have.")
    return name


def _renamed_text(name: Any, layout: Layout) -> Any:
    """A full name, or the beginning of one, in a configuration."""
    if not isinstance(name, str):
        return name
    if layout == "text":
        return re.sub(r"^(\^?model(?:\\)?\.)language_model(?:\\)?\.", r"\1", name)
    return re.sub(r"^(\^?model(\\)?\.)(?!language_model)", r"\1language_model\2.", name)


def _spelled_out(patterns: dict[str, Any], usual: Any, names: Iterable[str], layout: Layout) -> dict[str, Any]:
    """A pattern of ranks or alphas, module by module: what it means under the one class's names."""
    values = {}
    for module in sorted(_modules(names)):
        value = patterns.get(get_pattern_key(list(patterns), module), usual)
        values[re.escape(_renamed(f"base_model.model.{module}", layout).removeprefix("base_model.model."))] = value
    # Those of parameters are not modules' names, and come last because the first that fits wins.
    return values | {_renamed_text(key, layout): value for key, value in patterns.items()}


def _modules(names: Iterable[str]) -> set[str]:
    found = (_MODULE.match(name) for name in names)
    return {match["module"] for match in found if match}


def _parameter_owners(config: dict[str, Any], names: Collection[str]) -> set[str]:
    """Modules whose parameters, not themselves, are adapted."""
    owners = {str(name).rpartition(".")[0] for name in config.get("target_parameters") or ()}
    return {module for module in _modules(names) for owner in owners if owner and module.endswith(owner)}

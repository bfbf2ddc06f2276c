# SPDX-License-Identifier: Apache-2.0
"""Text model and vision-language wrapper: two classes of one checkpoint that name the same weights differently.

The wrapper keeps the text model at `model.language_model`, the text class at `model`. PEFT ignores, with a warning,
what it finds no module for, so an adapter with the other class's names would do nothing.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

__all__ = ["Layout", "change_layout", "layout_of_keys", "layout_of_model"]

Layout = Literal["text", "wrapper"]

_PREFIX = "base_model.model."
_TEXT, _WRAPPER = f"{_PREFIX}model.", f"{_PREFIX}model.language_model."
_MODULE = re.compile(r"base_model\.model\.(?P<module>.+?)(?:\.base_layer)*\.lora_")


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
    config: dict[str, Any], tensors: dict[str, torch.Tensor], layout: Layout | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An adapter under the names of the other class.

    Which modules are adapted is written out module by module: a pattern or a list of name endings that fits one class
    may match a vision tower in the other.

    Args:
        config: `adapter_config.json`.
        tensors: Its weights, by their names in the file.
        layout: The class they are to be named for; None: of a model that has no other.

    Returns:
        Configuration and weights; the same ones if they are named so already.

    Raises:
        ValueError: The adapter adapts a part that the text class does not have, or a pattern is none.
    """
    if layout in (None, layout_of_keys(tensors)):
        return config, tensors

    def module_name(name: str) -> str:
        return _renamed(_PREFIX + name, layout).removeprefix(_PREFIX)

    changed = dict(config)
    before = _adapted(config, tensors)
    if config.get("target_modules"):
        # Experts that `target_parameters` adapts are named there, by endings.
        changed["target_modules"] = sorted(module_name(name) for name, parameter in before if not parameter)
        changed["exclude_modules"] = changed["layers_to_transform"] = changed["layers_pattern"] = None
    for field, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = config.get(field)
        if not patterns:
            continue
        try:
            keys = {names: get_pattern_key(list(patterns), "".join(names)) for names in before}
        except re.error as error:
            raise ValueError(
                f"{field!r} of the adapter's configuration has a key that is no pattern: {error}"
            ) from error
        # Spelled out: what a pattern means under the one class's names. 8 is PEFT's own default.
        changed[field] = {
            re.escape(module_name(name) + parameter): patterns.get(key, config.get(usual, 8))
            for (name, parameter), key in keys.items()
        }
    for field in ("target_parameters", "modules_to_save"):
        if config.get(field):
            changed[field] = [_renamed_part(str(name), layout) for name in config[field]]
    return changed, {_renamed(name, layout): tensor for name, tensor in tensors.items()}


def _renamed(name: str, layout: Layout | None) -> str:
    if layout == "wrapper":
        return name.replace(_TEXT, _WRAPPER, 1) if name.startswith(_TEXT) else name
    if name.startswith(_WRAPPER):
        return name.replace(_WRAPPER, _TEXT, 1)
    if name.startswith(_TEXT):
        raise ValueError(f"`{name}` adapts a part of the vision-language model that its text model does not have.")
    return name


def _renamed_part(name: str, layout: Layout | None) -> str:
    """A full name, or the beginning of one, in a configuration."""
    if layout == "text":
        return re.sub(r"^(\^?model(?:\\)?\.)language_model(?:\\)?\.", r"\1", name)
    return re.sub(r"^(\^?model(\\)?\.)(?!language_model)", r"\1language_model\2.", name)


def _adapted(config: dict[str, Any], names: Iterable[str]) -> list[tuple[str, str]]:
    """Modules with adapters; with the name of a parameter, after a dot, where that is adapted and not the module."""
    targets = [str(target).rpartition(".") for target in config.get("target_parameters") or ()]
    found = []
    for module in sorted({match["module"] for name in names if (match := _MODULE.match(name))}):
        own = {leaf for owner, _, leaf in targets if module.endswith(owner)}
        found += [(module, f".{leaf}") for leaf in sorted(own)] or [(module, "")]
    return found

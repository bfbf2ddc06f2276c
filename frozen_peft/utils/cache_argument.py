# SPDX-License-Identifier: Apache-2.0
"""The name under which a model takes its cache, known here and nowhere else.

transformers 5.24 renamed `past_key_values` (and `cache_params` of pure Mamba models) to `cache`, and warns of the old
names until 5.40. A model that ships its own code keeps the name it was written with, whatever is installed, so the
model is asked and not the version.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from transformers import GenerationMixin

__all__ = [
    "CACHE_ARGUMENTS",
    "as_cache_argument",
    "cache_argument",
    "generation_cache",
    "given_cache",
    "take_cache",
    "takes_unknown_cache",
    "under_own_name",
]

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")


def cache_argument(module: torch.nn.Module) -> str | None:
    """Name of the argument of `module.forward` that takes a cache; None where there is none of a known name.

    Args:
        module: A model of transformers or a part of one; a `PeftModel` hands arguments on, so pass the model in it.
    """
    return _cache_argument(type(module).forward)


def as_cache_argument(module: torch.nn.Module, value: object) -> dict[str, Any]:
    """The keyword argument that hands a cache to `module.forward`.

    Raises:
        TypeError: The module takes no cache of a known name.
    """
    name = cache_argument(module)
    if name is None:
        raise TypeError(f"The forward of {type(module).__name__} takes none of {', '.join(CACHE_ARGUMENTS)}.")
    return {name: value}


def generation_cache(value: object) -> dict[str, Any]:
    """The keyword argument that hands a cache to `model.generate`, which has one name for all models."""
    name = _cache_argument(GenerationMixin.prepare_inputs_for_generation)
    assert name is not None
    return {name: value}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """What was passed as a cache, under whichever name; None where nothing was."""
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def take_cache(arguments: dict[str, Any]) -> Any:
    """The same, taken out of `arguments`."""
    given = given_cache(arguments)
    for name in CACHE_ARGUMENTS:
        arguments.pop(name, None)
    return given


def under_own_name(module: torch.nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `module.forward` with a cache that was passed under another known name under the module's own.

    A forward with `**kwargs` swallows the others without a word.
    """
    if given_cache(arguments) is None:
        return arguments
    arguments = dict(arguments)
    given = take_cache(arguments)
    return arguments | as_cache_argument(module, given)


def takes_unknown_cache(module: torch.nn.Module) -> bool:
    """Whether a module keeps a cache (it has `use_cache`) and takes it under a name that is not known here."""
    return cache_argument(module) is None and "use_cache" in inspect.signature(type(module).forward).parameters


@cache
def _cache_argument(forward: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)

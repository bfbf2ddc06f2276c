# SPDX-License-Identifier: Apache-2.0
"""Sees to it that a loss is computed over the frozen context that belongs to its batch.

Who computes a loss of their own calls the model as they like: with all that is in the batch, or with the arguments
that they know by name. Forgotten, a context would leave a loss that looks fine and means something else.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.errors import ContextMismatchError
from frozen_peft.utils.cache_argument import (
    CACHE_ARGUMENTS,
    as_cache_argument,
    cache_argument,
    given_cache,
    take_cache,
)

__all__ = ["carried_context"]


@contextmanager
def carried_context(
    model: torch.nn.Module, batch: Mapping[str, Any], encode_again: Callable[[], FrozenContext] | None = None
) -> Iterator[None]:
    """Has forwards of a batch's tokens continue from its frozen context, however the model is called inside.

    A forward that is given the batch's `input_ids` gets its cache and `position_ids`, where they are not given. One
    that is given a cache, or None for it by name, runs as asked, and so does one of other tokens.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.
        batch: What the model is called with: `input_ids` and `position_ids` of shape `(decisions, tokens)`, and a
            `FrozenContext` as its cache; without one, nothing is to be seen to.
        encode_again: Encodes the batch's contexts with the adapters as they are. Called, once for each setting, for
            forwards inside which adapters are off, or other ones on, than when the batch's context was encoded: what
            the base says, or a reference adapter, is said over a context of its own. None: contexts are the base's
            whatever is on.

    Raises:
        ContextMismatchError: No forward inside continued from the context, or one was called with other tokens in the
            batch's shape and without a cache, so that nobody can tell whose they are.
    """
    frozen = given_cache(batch)
    if not isinstance(frozen, FrozenContext):
        yield
        return
    pretrained = get_pretrained_model(model)
    name = cache_argument(pretrained)
    was_read = False
    encoded = {_adapter_state(pretrained): frozen}

    def context_now() -> FrozenContext:
        if encode_again is None:
            return frozen
        state = _adapter_state(pretrained)
        if state not in encoded:
            encoded[state] = encode_again()
        return encoded[state]

    def carry(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal was_read
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if not arguments.keys().isdisjoint(CACHE_ARGUMENTS):
            if given_cache(arguments) is not frozen:
                return None
            take_cache(arguments)
        elif (tokens := arguments.get("input_ids")) is batch["input_ids"]:
            arguments = {"position_ids": batch["position_ids"], **arguments}
        elif tokens is None or tokens.shape != batch["input_ids"].shape:
            return None
        else:
            raise ContextMismatchError(
                f"A loss was computed from `input_ids` of the batch's shape {tuple(tokens.shape)} that are not "
                f"the batch's, without a cache. Pass `{name}=inputs['{name}']` and `position_ids` if they stand "
                f"behind the same contexts, or `{name}=None` if they stand behind none."
            )
        context = context_now()
        was_read = was_read or context is frozen
        return (), arguments | as_cache_argument(module, context)

    # The decoder too, which a loss over hidden states may call by itself.
    modules = {pretrained, get_decoder(pretrained)}
    handles = [module.register_forward_pre_hook(carry, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not was_read:
        raise ContextMismatchError(
            f"A loss was computed without the frozen context that its batch carries as `{name}`, as if every decision "
            "stood at the beginning of a text. In a `compute_loss` of your own, call the model with `**inputs`, or "
            f"with the `input_ids` and the `{name}` that are in `inputs`."
        )


def _adapter_state(model: torch.nn.Module) -> tuple[bool, tuple[str, ...]]:
    """Whether a model's adapters are off, and which ones are active."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            return module.disable_adapters, tuple(module.active_adapters)
    return True, ()

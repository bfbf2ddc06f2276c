# SPDX-License-Identifier: Apache-2.0
"""Sees to it that a loss is computed over the frozen context that belongs to its batch.

Who computes a loss of their own calls the model as they like: with all that is in the batch, or with the arguments
that they know by name. Forgotten, a context would leave a loss that looks fine and means something else.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from frozen_peft.context.boundary import ContextTokens
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

__all__ = ["Carried", "EncodeAgain", "adapter_state", "carried_context"]


@dataclass(frozen=True, eq=False)
class Carried:
    """Decisions, and what they stand behind.

    Attributes:
        input_ids: Shape `(decisions, tokens)`, int64.
        position_ids: Counted from the start of each context, shape `(decisions, tokens)`, int64.
        frozen: Their contexts, as the model that is trained encodes them.
        contexts: The same as tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    frozen: FrozenContext
    contexts: Sequence[ContextTokens]

    @classmethod
    def behind(cls, contexts: Sequence[ContextTokens], frozen: FrozenContext, input_ids: torch.Tensor) -> Self:
        """Decisions `(decisions, tokens)` behind contexts, each of which its row of `frozen` holds."""
        lengths = torch.tensor(frozen.lengths, device=input_ids.device)
        position_ids = lengths[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        return cls(input_ids, position_ids, frozen, contexts)

    def is_meant_by(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a forward with these arguments is one of these decisions."""
        return arguments.get("input_ids") is self.input_ids


# Gives the contexts of some decisions as the model encodes them now.
EncodeAgain = Callable[[Carried], FrozenContext]


@contextmanager
def carried_context(
    model: torch.nn.Module,
    carried: Sequence[Carried],
    encode_again: EncodeAgain | None = None,
    *,
    of_another: bool = False,
) -> Iterator[None]:
    """Has forwards of a batch's tokens continue from its frozen context, however the model is called inside.

    A forward that is given the batch's `input_ids` gets its cache and `position_ids`, where they are not given. One
    that is given a cache, or None for it by name, runs as asked, and so does one of other tokens.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.
        carried: What the model is called with; without any, nothing is to be seen to. The first must be read.
        encode_again: Called, once for each setting, for forwards inside which adapters are off, or other ones on, than
            when the batch's context was encoded: what the base says, or a reference adapter, is said over a context of
            its own. None: contexts are the base's whatever is on.
        of_another: The model is not the one that encoded the contexts: it has all of them encoded again, and need not
            be called.

    Raises:
        ContextMismatchError: No forward inside continued from the context, or one was called with other tokens in the
            batch's shape and without a cache, so that nobody can tell whose they are.
    """
    if not carried:
        yield
        return
    pretrained = get_pretrained_model(model)
    name = cache_argument(pretrained)
    was_read = of_another
    own_state = None if of_another else adapter_state(pretrained)
    encoded: dict[tuple[object, Carried], FrozenContext] = {}

    def context_now(meant: Carried) -> FrozenContext:
        state = adapter_state(pretrained)
        if encode_again is None or state == own_state:
            return meant.frozen
        if (state, meant) not in encoded:
            encoded[state, meant] = encode_again(meant)
        return encoded[state, meant]

    def carry(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal was_read
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        meant = next((each for each in carried if each.is_meant_by(arguments)), None)
        if not arguments.keys().isdisjoint(CACHE_ARGUMENTS):
            given = next((each for each in carried if given_cache(arguments) is each.frozen), None)
            if given is None:
                return None
            take_cache(arguments)
            # What was made for one part of a batch, handed on with another part of it.
            if meant is not None and arguments.get("position_ids") is given.position_ids:
                arguments["position_ids"] = meant.position_ids
            meant = meant or given
        elif meant is not None:
            arguments = {"position_ids": meant.position_ids, **arguments}
        elif all(getattr(arguments.get("input_ids"), "shape", None) != each.input_ids.shape for each in carried):
            return None
        else:
            raise ContextMismatchError(
                f"A loss was computed from `input_ids` of the batch's shape {tuple(arguments['input_ids'].shape)} "
                f"that are not the batch's, without a cache. Pass `{name}=inputs['{name}']` and `position_ids` if "
                f"they stand behind the same contexts, or `{name}=None` if they stand behind none."
            )
        context = context_now(meant)
        was_read = was_read or context is carried[0].frozen
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


def adapter_state(model: torch.nn.Module) -> tuple[bool, tuple[str, ...]]:
    """Whether a model's adapters are off, and which ones are active."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            return module.disable_adapters, tuple(module.active_adapters)
    return True, ()

# SPDX-License-Identifier: Apache-2.0
"""A card that is none: tensors say `cuda`, and are computed in host memory.

Every branch that only a GPU takes runs so on a CPU, of this package and of what it builds on, and much of what goes
wrong on a GPU alone goes wrong here:

1. Which memory a tensor lies in is kept for its storage, at every operation that PyTorch dispatches. An operation that
   mixes the card's and the host's tensors fails as CUDA's do, and so does reading the card's as an array of numpy.
2. What `torch.cuda` and tensors offer for a card takes the arguments that the real ones take, by their signatures.
3. Work on one stream that reads what another has written, without having waited for its event, fails; so does reading
   what was not recorded on the stream, since its memory might be given away.
4. The card has so much memory. An operation that needs more fails with `torch.OutOfMemoryError`.
5. What CUDA has and CPUs have not (products of 16 bit with sums in float32, flash attention whose causal mask sits at
   the lower right) passes PyTorch's own check of arguments where there is one, and is computed in float32.

What it cannot show is whether a kernel computes what it should, and how fast.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import thread
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch.nn.attention import bias
from transformers.utils import import_utils

from frozen_peft.context.kernels import choice, table
from frozen_peft.context.store import residence
from tests.card import surface
from tests.card.memory import CARD, GIBIBYTE, HOST, Card, Event, Stream, _current, like, real_device
from tests.card.operations import Functions, Operations

__all__ = ["CARD", "GIBIBYTE", "HOST", "Card", "real_device", "stand_in_card"]


@contextmanager
def stand_in_card(**facts: Any) -> Iterator[Card]:
    """Has this machine have a card; `facts` are those of `Card`."""
    _forget_the_machine()
    on = Card(**facts)
    on.default_stream = Stream()
    autocast = surface.Autocast()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        methods = surface.tensor_methods(on)
        for module, functions in (
            (torch.cuda, surface.cuda_functions(on)),
            (torch.accelerator, surface.ACCELERATOR_FUNCTIONS),
        ):
            for name, own in functions.items():
                real = getattr(module, name)
                # Some are read where they are defined, and not where they are meant to be.
                for place in (module, sys.modules[real.__module__]):
                    patch.setattr(place, name, like(real, own))
        for name, own in {"Stream": Stream, "Event": Event, "device": surface.Device, "_lazy_init": _nothing}.items():
            patch.setattr(torch.cuda, name, own)
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        patch.setattr(bias, "can_use_flash_attention", surface.can_use_flash_attention)
        patch.setattr(bias.CausalBias, "__new__", staticmethod(surface.new_bias), raising=False)
        patch.setattr(torch.autocast, "__enter__", lambda context: autocast.enter(context))
        patch.setattr(torch.autocast, "__exit__", lambda context, *error: autocast.exit(context, *error))
        for made in (torch.tensor, torch.as_tensor, torch.asarray):
            patch.setattr(torch, made.__name__, surface.made_in_host_memory(made))
        for name, method in methods.items():
            patch.setattr(torch.Tensor, name, method)
        _current.append(on)
        stack.callback(_current.pop)
        stack.callback(_forget_the_machine)
        run = thread._WorkItem.run
        # Modes are of one thread, and the store has threads of its own.
        patch.setattr(thread._WorkItem, "run", lambda *args, **kwargs: _in_modes(run, *args, **kwargs))
        stack.enter_context(_modes())
        yield on


def _forget_the_machine() -> None:
    """What the package and transformers have read of this machine's devices once and for all."""
    for cached in (table.current_capabilities, choice._is_accelerated, residence._copy_stream):
        cached.cache_clear()
    for name, function in vars(import_utils).items():
        if name.startswith("is_torch_") and hasattr(function, "cache_clear"):
            function.cache_clear()


@contextmanager
def _modes() -> Iterator[None]:
    with Operations(), Functions():
        yield


def _in_modes(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _modes():
        return run(*args, **kwargs)


def _nothing() -> None: ...

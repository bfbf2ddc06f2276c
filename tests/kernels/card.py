# SPDX-License-Identifier: Apache-2.0
"""Takes this machine's CPU for a card that has Triton, so that what runs there is what the card would run."""

import contextlib
import dataclasses
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from triton.runtime import interpreter
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from frozen_peft.context.kernels import choice
from frozen_peft.context.kernels.table import Capabilities, current_capabilities
from frozen_peft.utils.compat.transformers import replace_kernels

__all__ = ["CARDS", "launches", "on_card", "plain_kernels"]

# With every kernel, and where the table has the gated delta rule's backward run in PyTorch.
CARDS = {"A100": (8, 0), "B200": (10, 0)}


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Counts how often each Triton kernel is launched, by `package.function`."""
    launched: Counter[str] = Counter()
    launch = interpreter.GridExecutor.__call__

    def counted(self: interpreter.GridExecutor, *args: object, **kwargs: object) -> None:
        launched[f"{self.fn.__module__.partition('.')[0]}.{self.fn.__name__}"] += 1
        launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", counted)
        yield launched


@contextmanager
def on_card(card: str = "A100") -> Iterator[Counter[str]]:
    """Chooses kernels as on a card with the packages that are installed here, TRL's of its head among them.

    Attention asks the same table elsewhere, and stays as it is on a CPU.

    Yields:
        What `launches` counts.
    """
    is_accelerated = choice.is_accelerated
    machine = dataclasses.replace(
        current_capabilities(torch.device("cpu")), device_type="cuda", compute_capability=CARDS[card]
    )

    def answer(operation: choice.Operation, gradient: bool, _: Capabilities) -> tuple[bool, str]:
        return is_accelerated(operation, gradient, machine)

    choice._is_accelerated.cache_clear()
    with launches() as launched, pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "is_accelerated", answer)
        # mamba-ssm makes the device of its tensors the current one, and asks how wide it is.
        patch.setattr(torch.cuda, "device", contextlib.nullcontext)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=108))
        for module in (chunked_logprob, trl_utils):
            patch.setattr(module, "_use_triton", lambda device: True)
        yield launched
    choice._is_accelerated.cache_clear()


@contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Runs PyTorch's references, whatever is installed and chosen: what the kernels are held to."""
    files = [sys.modules[name] for name in {type(module).__module__ for module in model.modules()}]
    before = [dict(vars(file)) for file in files]
    for file in files:
        replace_kernels(file, lambda _, reference, *names: reference)
        for name, function in list(vars(file).items()):
            if inspect.isfunction(function) and function.__module__ == choice.__name__:
                setattr(file, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for file, names in zip(files, before, strict=True):
            vars(file).update(names)

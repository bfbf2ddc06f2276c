# SPDX-License-Identifier: Apache-2.0
"""Modes that a model runs in for a while, each put back as it was.

No mode is switched through `train()` or `eval()`: a 4-bit layer would repack its weights.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel

from frozen_peft.adapters import require_base
from frozen_peft.context.compiled import not_compiled
from frozen_peft.context.models import get_pretrained_model

__all__ = ["adapters_active", "attention_in_training", "prefill_mode", "without_dropout"]


@contextmanager
def prefill_mode(model: torch.nn.Module, *, adapters: bool = True) -> Iterator[None]:
    """What all forwards of prefill run in: no gradient, no dropout, adapters on or off."""
    device_type = get_pretrained_model(model).get_input_embeddings().weight.device.type
    with (
        torch.no_grad(),
        adapters_active(model, adapters),
        without_dropout(model),
        not_compiled(),
        _uncached_autocast(device_type),
    ):
        yield


@contextmanager
def without_dropout(model: torch.nn.Module, *, keep_checkpointing: bool = False) -> Iterator[None]:
    """Clears the training flag of every module but 4-bit layers, and puts it back.

    The flags are set one by one: `model.eval()` would make bitsandbytes (0.50, CPUs with AVX512-BF16) repack its
    4-bit weights for inference at the next forward, for good.

    Args:
        model: The model whose dropout is to be off.
        keep_checkpointing: Leave decoder and decoder layers in training mode, so that gradient checkpointing stays on.
    """
    with _training_flags(model, False, of_checkpointed=not keep_checkpointing):
        yield


@contextmanager
def attention_in_training(model: torch.nn.Module) -> Iterator[None]:
    """Sets the training flag of every module but decoder layers and 4-bit layers, and gives back what was drawn.

    So attention asks for the dropout that it has in training, and gradient checkpointing stays off.
    """
    device = get_pretrained_model(model).get_input_embeddings().weight.device
    devices = [device] if device.type == "cuda" else []
    with _training_flags(model, True, of_checkpointed=False), torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _training_flags(model: torch.nn.Module, value: bool, *, of_checkpointed: bool) -> Iterator[None]:
    """Sets the training flags of modules, but for 4-bit layers, and puts them back.

    Args:
        model: Their model.
        value: What they are set to.
        of_checkpointed: Also those of the decoder and its layers, on which gradient checkpointing hangs.
    """
    changed = [
        module
        for module in model.modules()
        if module.training is not value
        and type(module).__name__ != "Linear4bit"
        and (of_checkpointed or not hasattr(module, "gradient_checkpointing"))
    ]
    for module in changed:
        module.training = value
    try:
        yield
    finally:
        for module in changed:
            module.training = not value


def adapters_active(model: torch.nn.Module, active: bool) -> AbstractContextManager[None]:
    """Runs a model with its adapters on, or switched off.

    Raises:
        ValueError: They are to be off, and the model has none, or is not its base model without them.
    """
    if active:
        return nullcontext()
    if not isinstance(model, PeftModel):
        raise ValueError(
            "`context_adapters=False` encodes contexts with the adapters switched off, but the model is a "
            f"{type(model).__name__} without adapters. Pass `peft_config`, or leave `context_adapters=True`."
        )
    require_base(model, "Contexts are to be encoded by the base model")
    return model.disable_adapter()


def _uncached_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast as it is around the call, but without its cache of cast weights.

    The cache would keep weights that were cast here, without gradient, and hand them to the decision's forward,
    whose adapters would then silently receive none (pytorch/pytorch#48049).
    """
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=False)

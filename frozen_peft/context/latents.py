# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention over a frozen context: latents stay latents, and are expanded where they are read.

The cache of such a model holds latents. Every forward makes keys and values of them, those of the context included,
with the projection `kv_b_proj`. What is computed at context positions is a constant here, so:

1. A decision expands its own latents, with gradient. The context's travel on to attention as they are, together with
   the function that expands them. Attention expands one block at a time, in the forward pass and again in the backward
   pass: of the context, a decision holds what the cache holds.
2. Attention that reads no segments takes the latents of context and decision as one tensor. There `kv_b_proj` expands
   the context's part by itself, without gradient, and keys and values are those of the whole length.

A context is expanded as it was encoded: without dropout.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from frozen_peft.context.handover import Segment, frozen_length, get_segment, move_segment, uncompiled
from frozen_peft.context.models import latent_expansions
from frozen_peft.context.modes import without_dropout

__all__ = ["freeze_latent_expansions", "hand_on_latents"]

Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# The method of transformers (5.23, 5.24) between an attention module's cache and its attention.
EXPAND = "expand_kv"
CONTEXT_ATTRIBUTE = "_frozen_peft_context_latents"
HOOKED_ATTRIBUTE = "_frozen_peft_expands_context"


def hand_on_latents(decoder: torch.nn.Module) -> None:
    """Lets the segments that ride on latents reach attention, for the life of the model.

    `expand_kv` is replaced on the modules at hand: the tensors that it makes carry nothing of those it was given.
    """
    for attention in decoder.modules():
        if hasattr(attention, EXPAND) and EXPAND not in vars(attention):
            # Partials, unlike closures, are copied with the model that they belong to.
            expand: Any = attention.expand_kv
            setattr(attention, EXPAND, partial(_expand_own, attention, expand))


@uncompiled
def _expand_own(
    attention: torch.nn.Module, expand: Expand, latents: torch.Tensor, rotary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the latents at hand, `(B, H, D, E)`; what lies before them goes on as latents."""
    keys, values = expand(latents, rotary)
    segment = get_segment(latents)
    if isinstance(segment, Segment):
        device_type = latents.device.type
        autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        move_segment(keys, values, replace(segment, expand=partial(_expand_frozen, attention, expand, autocast)))
    return keys, values


def _expand_frozen(
    attention: torch.nn.Module,
    expand: Expand,
    autocast: tuple[bool, torch.dtype],
    latents: torch.Tensor,
    rotary: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of context latents, which are constants, with the precision of the forward."""
    enabled, dtype = autocast
    with (
        torch.no_grad(),
        without_dropout(attention),
        # Without its cache: weights that were cast without gradient would get none when used again.
        torch.autocast(latents.device.type, dtype=dtype, enabled=enabled, cache_enabled=False),
    ):
        return expand(latents, rotary)


def freeze_latent_expansions(decoder: torch.nn.Module) -> None:
    """Makes what `kv_b_proj` computes at context positions a constant, where context and decision are one tensor.

    The hooks stay on the modules, since the backward pass may run a layer again; they act only on latents that come
    out of a frozen context.
    """
    for module in latent_expansions(decoder):
        if not hasattr(module, HOOKED_ATTRIBUTE):
            setattr(module, HOOKED_ATTRIBUTE, True)
            module.register_forward_pre_hook(_set_context_aside)
            module.register_forward_hook(_expand_context)


@uncompiled
def _set_context_aside(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    length = frozen_length(args[0])
    if not length:
        return None
    own = args[0][..., length:, :]
    setattr(own, CONTEXT_ATTRIBUTE, args[0][..., :length, :])
    return own, *args[1:]


@uncompiled
def _expand_context(
    module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor | None:
    latents = getattr(args[0], CONTEXT_ATTRIBUTE, None)
    if latents is None:
        return None
    # After the decision's own: autocast keeps weights as they were first cast, with gradient or without.
    with torch.no_grad(), without_dropout(module):
        context = module.forward(latents)
    return torch.cat([context, output], dim=-2)

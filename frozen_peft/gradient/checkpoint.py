# SPDX-License-Identifier: Apache-2.0
"""Activation checkpoints that span several decoder layers.

transformers checkpoints every layer by itself: it keeps one hidden state per layer, and recomputes one layer at a
time. A checkpoint over N layers keeps one hidden state per N layers, and recomputes N at a time. For L layers whose
activations take k hidden states each, memory is about (L / N + N * k) * length * hidden, least at N = sqrt(L / k).

Layers are called one after another by modeling code that knows nothing of groups, so a checkpoint is opened when a
group's first layer is called and closed after its last. Its recomputation runs the group's layers in a row, each with
the arguments it was called with, and the hidden states flowing from one to the next.
"""

from collections.abc import Callable, Generator
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from frozen_peft.utils.compat.torch import begun_checkpoint
from frozen_peft.utils.compat.transformers import checkpoint_function, set_checkpoint_function

__all__ = ["group_checkpoints"]

LayerForward = Callable[..., Any]


def group_checkpoints(decoder: torch.nn.Module, layers_per_checkpoint: int) -> None:
    """Makes the activation checkpoints of a decoder span several layers.

    To be called after gradient checkpointing was enabled on the model; calling it again changes nothing.

    Args:
        decoder: The text decoder, whose layers run one after another.
        layers_per_checkpoint: Layers per checkpoint; 1 leaves transformers' own checkpoints.

    Raises:
        ValueError: `layers_per_checkpoint` is less than 1.
    """
    if layers_per_checkpoint < 1:
        raise ValueError(f"`checkpoint_every` must be 1 layer or more, found {layers_per_checkpoint}.")
    layers = [
        module
        for module in decoder.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    grouped = all(isinstance(checkpoint_function(layer), _Member) for layer in layers)
    if layers_per_checkpoint == 1 or grouped:
        return
    for start in range(0, len(layers), layers_per_checkpoint):
        members = layers[start : start + layers_per_checkpoint]
        group = _Group()
        for index, layer in enumerate(members):
            set_checkpoint_function(layer, _Member(group, is_first=index == 0, is_last=index == len(members) - 1))


class _Group:
    """One checkpoint over consecutive layers. Holds state only while a forward is between its layers."""

    def __init__(self) -> None:
        self.checkpoint: Generator[None, None, None] | None = None
        self.calls: list[tuple[LayerForward, tuple[Any, ...]]] = []
        self.hidden_states: torch.Tensor | None = None

    def open(self, hidden_states: torch.Tensor, *args: Any) -> None:
        self.close()
        # Of this checkpoint alone: the next one has calls of its own.
        calls: list[tuple[LayerForward, tuple[Any, ...]]] = []

        def recompute(hidden_states: torch.Tensor, *_: Any) -> None:
            for forward, args in calls:
                hidden_states = _first(forward(hidden_states, *args))

        self.calls = calls
        self.checkpoint = begun_checkpoint(recompute, hidden_states, *args)

    def close(self) -> None:
        checkpoint, self.checkpoint, self.hidden_states = self.checkpoint, None, None
        if checkpoint is not None:
            next(checkpoint, None)


class _Member:
    """What a layer of a group calls in place of `torch.utils.checkpoint.checkpoint`."""

    def __init__(self, group: _Group, *, is_first: bool, is_last: bool):
        self.group, self.is_first, self.is_last = group, is_first, is_last

    def __call__(self, forward: LayerForward, *args: Any) -> Any:
        if not args:
            raise ValueError(
                "`checkpoint_every` above 1 needs layers that take their hidden states by position. Use "
                "`checkpoint_every=1`."
            )
        group, (hidden_states, *others) = self.group, args
        if self.is_first:
            group.open(*args)
        elif hidden_states is not group.hidden_states:
            group.close()
            raise ValueError(
                "`checkpoint_every` above 1 needs layers that run one after another; this model computes something "
                "between them. Use `checkpoint_every=1`."
            )
        # Without the hidden states, which are what the checkpoint is there not to keep.
        group.calls.append((forward, tuple(others)))
        try:
            output = forward(*args)
        except BaseException:
            group.close()
            raise
        group.hidden_states = _first(output)
        if self.is_last:
            group.close()
        return output


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output

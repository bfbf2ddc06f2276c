# SPDX-License-Identifier: Apache-2.0
"""Activation checkpoints that span several decoder layers.

transformers checkpoints every layer by itself: it keeps one hidden state per layer, and recomputes one layer at a
time. A checkpoint over N layers keeps one hidden state per N layers, and recomputes N at a time. For L layers whose
activations take k hidden states each, memory is about (L / N + N * k) * length * hidden, least at N = sqrt(L / k).

Layers are called one after another by modeling code that knows nothing of groups, so a checkpoint is opened when a
group's first layer is called and closed after its last. Its recomputation runs the group's layers in a row, each with
the arguments it was called with, and the hidden states flowing from one to the next.
"""

import inspect
from collections.abc import Callable, Generator
from typing import Any

import torch

# Private in torch 2.8 to 2.14, where `torch.distributed._composable.checkpoint` uses it for the same purpose: a
# checkpoint whose beginning and end are in different calls. It can go when PyTorch offers that in public.
from torch.utils.checkpoint import _checkpoint_without_reentrant_generator
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["group_checkpoints"]

LayerForward = Callable[..., Any]
# Before the layers' own arguments, by position: random states are kept, nothing surrounds the recomputation, its
# tensors are compared, and no trace is kept. Whether it stops early was added after torch 2.8, which does so unasked.
_OPTIONS: tuple[Any, ...] = (True, torch.utils.checkpoint.noop_context_fn, "default", False)
if "early_stop" in inspect.signature(_checkpoint_without_reentrant_generator).parameters:
    _OPTIONS += (True,)


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
    grouped = all(isinstance(layer._gradient_checkpointing_func, _Member) for layer in layers)
    if layers_per_checkpoint == 1 or grouped:
        return
    for start in range(0, len(layers), layers_per_checkpoint):
        members = layers[start : start + layers_per_checkpoint]
        group = _Group(len(members))
        for index, layer in enumerate(members):
            layer._gradient_checkpointing_func = _Member(group, index)


class _Group:
    """One checkpoint over consecutive layers. Holds state only while a forward is between its layers."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self._checkpoint: Generator[None, None, None] | None = None
        self._calls: list[tuple[LayerForward, tuple[Any, ...]]] = []
        self._hidden_states: torch.Tensor | None = None

    def run(self, index: int, forward: LayerForward, hidden_states: torch.Tensor, *args: Any) -> Any:
        if index == 0:
            self._open(hidden_states, *args)
        elif hidden_states is not self._hidden_states:
            self._close()
            raise ValueError(
                "`checkpoint_every` above 1 needs layers that run one after another; this model computes something "
                "between them. Use `checkpoint_every=1`."
            )
        # Without the hidden states, which are what the checkpoint is there not to keep.
        self._calls.append((forward, args))
        try:
            output = forward(hidden_states, *args)
        except BaseException:
            self._close()
            raise
        self._hidden_states = _first(output)
        if index == self.num_layers - 1:
            self._close()
        return output

    def _open(self, hidden_states: torch.Tensor, *args: Any) -> None:
        self._close()
        calls: list[tuple[LayerForward, tuple[Any, ...]]] = []

        def recompute(hidden_states: torch.Tensor, *_: Any) -> None:
            for forward, args in calls:
                hidden_states = _first(forward(hidden_states, *args))

        self._calls = calls
        self._checkpoint = _checkpoint_without_reentrant_generator(recompute, *_OPTIONS, hidden_states, *args)
        next(self._checkpoint)

    def _close(self) -> None:
        checkpoint, self._checkpoint, self._hidden_states = self._checkpoint, None, None
        if checkpoint is not None:
            next(checkpoint, None)


class _Member:
    """What a layer of a group calls in place of `torch.utils.checkpoint.checkpoint`."""

    def __init__(self, group: _Group, index: int):
        self.group, self.index = group, index

    def __call__(self, forward: LayerForward, *args: Any) -> Any:
        if not args:
            raise ValueError(
                "`checkpoint_every` above 1 needs layers that take their hidden states by position. Use "
                "`checkpoint_every=1`."
            )
        return self.group.run(self.index, forward, *args)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output

# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` for what carries gradient: the parts of each decoder layer, one by one.

1. Compiled are the modules that a decoder layer is made of: norms, attention or linear attention, MLP or experts. A
   layer's own forward stays as it is, so that activation checkpoints, which begin and end there, run a compiled module
   again as they ran it first.
2. What hands over a context is called as it is: cache layers, attention over segments, kernels that are chosen at each
   call. They read and leave notes beside the tensors, which a compiler does not see; each is marked `uncompiled`.
3. Prefill runs the modules as they are. It is bound by its matrix products, has other shapes with every chunk, and a
   frozen context does not come to depend on a compiler.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from frozen_peft.context.kernels import choose_kernels
from frozen_peft.context.models import get_decoder

__all__ = ["compile_layers", "not_compiled"]


def compile_layers(model: PreTrainedModel, **options: Any) -> int:
    """Compiles the parts of every decoder layer in place, each when it first runs.

    Args:
        model: A causal language model of transformers, with its adapters.
        options: Of `torch.compile`, such as `backend` and `mode`.

    Returns:
        The number of modules.

    Raises:
        ValueError: The decoder has no layers that activation checkpoints could span, whose parts would be compiled;
            or each part is to be one graph, and a hand-over of contexts interrupts it.
    """
    if options.get("fullgraph"):
        raise ValueError(
            "`torch_compile` cannot make one graph of a layer's attention, which hands over a context that is not "
            "compiled. Leave `fullgraph` (`ACCELERATE_DYNAMO_USE_FULLGRAPH`) out."
        )
    modules = _parts(get_decoder(model))
    if not modules:
        raise ValueError(
            f"`torch_compile` compiles the parts of decoder layers, and {type(model).__name__} has no layers that are "
            "a `GradientCheckpointingLayer`. Set `torch_compile` to False."
        )
    # A compiler would unroll the reference's loops over tokens.
    choose_kernels(model, always=True)
    for module in modules:
        module.compile(**options)
    return len(modules)


def not_compiled() -> AbstractContextManager[object]:
    """Runs the parts of decoder layers as they are."""
    return torch.compiler.set_stance("force_eager")


def _parts(decoder: PreTrainedModel) -> list[torch.nn.Module]:
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [part for layer in layers for part in layer.children()]

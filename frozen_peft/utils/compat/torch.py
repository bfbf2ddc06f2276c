# SPDX-License-Identifier: Apache-2.0
"""What of PyTorch is used beyond what it promises."""

import inspect
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.utils.checkpoint import _checkpoint_without_reentrant_generator

__all__ = ["begun_checkpoint", "flash_attention_on_cpu", "num_writes"]


# Before the arguments of the recomputation: random states are kept, nothing surrounds it, its tensors are compared,
# and no trace is kept. Whether it stops early was added after torch 2.8, which does so unasked.
_CHECKPOINT_OPTIONS: tuple[Any, ...] = (True, torch.utils.checkpoint.noop_context_fn, "default", False)


if "early_stop" in inspect.signature(_checkpoint_without_reentrant_generator).parameters:
    _CHECKPOINT_OPTIONS += (True,)


# PRIVATE: `torch.utils.checkpoint._checkpoint_without_reentrant_generator`, torch 2.8 to 2.14.
# Why: an activation checkpoint whose beginning and end are in different calls;
# `torch.distributed._composable.checkpoint` uses it for the same purpose. Goes when: PyTorch offers that in public.
def begun_checkpoint(recompute: Callable[..., None], *args: Any) -> Generator[None, None, None]:
    """Begins a checkpoint; `next(checkpoint, None)` on what comes back ends it.

    Args:
        recompute: Computes again what ran between beginning and end.
        args: What it is called with.
    """
    checkpoint = _checkpoint_without_reentrant_generator(recompute, *_CHECKPOINT_OPTIONS, *args)
    next(checkpoint)
    return checkpoint


# PRIVATE: `Tensor._version`, torch 2.8 to 2.13.
# Why: autograd's own count of writes in place tells a weight that has changed from one that has not, and reads
# nothing. Goes when: the count has a public name.
def num_writes(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place, as far as PyTorch counts."""
    return tensor._version


# PRIVATE: `aten._scaled_dot_product_flash_attention_for_cpu`, torch 2.8 to 2.13.
# Why: attention over two segments merges them by their log-sum-exp, which no public function returns on a CPU without
# a compiler; going on block by block in Python takes up to half as long again at 8k tokens. Goes when:
# `scaled_dot_product_attention` or `flex_attention` without a compiler returns it.
def flash_attention_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp, shapes `(1, H, queries, V)` and `(1, H, queries)`. Without gradient."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p=0.0, is_causal=is_causal, scale=scale
    )

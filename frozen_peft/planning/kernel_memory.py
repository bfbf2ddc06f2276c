# SPDX-License-Identifier: Apache-2.0
"""What accelerated kernels allocate, for planning where they are not there to be run.

Under `accelerated_kernels` a modeling file's reference functions are replaced by functions that return tensors of the
same shapes and allocate what the kernels of an accelerator do, as their code has it:

| function | stands for | read from |
| --- | --- | --- |
| `chunk_gated_delta_rule` | flash-linear-attention's, blocks of 64 tokens | its `chunk.py`, commit 0315a70 |
| `causal_conv1d_fn` | causal-conv1d: the output, no padded copy | its `causal_conv1d_interface.py` |

Kernels of other layers (Mamba-2, Kimi's delta rule) are counted as PyTorch's reference, which takes more.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["accelerated_kernels", "reference_counted"]

BLOCK = 64
_REFERENCE_ONLY = ("mamba_chunk_scan_combined", "chunk_kda")


class _GatedDeltaRule(torch.autograd.Function):
    """Outputs and buffers of flash-linear-attention's `ChunkGatedDeltaRuleFunction`."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor,
        beta: torch.Tensor, state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        # Normalised queries and keys, the norms' reciprocals, the cumulative decay, the inverse of each block.
        query, key = torch.empty_like(query), torch.empty_like(key)
        norms = [query.new_empty(part.shape[:-1], dtype=torch.float32) for part in (query, key)]
        decay = torch.empty_like(decay, dtype=torch.float32)
        blocks = value.new_empty(*value.shape[:3], BLOCK)
        ctx.shape = (value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
        output = _output(ctx.shape, key, value)
        final = value.new_empty(ctx.shape, dtype=torch.float32)
        ctx.save_for_backward(query, key, *norms, value, decay, beta, blocks, state)
        return output, final

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_final: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        query, key, _, _, value, decay, beta, _, state = ctx.saved_tensors
        states, weights, updates = _block_buffers(ctx.shape, key, value)
        grad_states, grad_updates = torch.empty_like(states), torch.empty_like(updates)
        per_head = (*value.shape[:3], key.shape[-1])
        of_query, of_key, of_weights = (value.new_empty(per_head) for _ in range(3))
        del states, weights, updates, grad_states
        more_key, grad_value = torch.empty_like(of_key), torch.empty_like(value)
        del more_key, grad_updates, of_weights, of_query
        return (
            torch.empty_like(query),
            torch.empty_like(key),
            grad_value,
            torch.empty_like(decay),
            torch.empty_like(beta),
            None if state is None else torch.empty_like(state),
        )


def _block_buffers(
    shape: tuple[int, ...], key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States before each block of 64 tokens, weights and updates of the WY form."""
    batch, heads, key_dim, value_dim = shape
    num_blocks = -(-value.shape[1] // BLOCK)
    states = value.new_empty(batch, num_blocks, heads, key_dim, value_dim)
    weights = value.new_empty(*value.shape[:3], key_dim)
    return states, weights, torch.empty_like(value)


def _output(shape: tuple[int, ...], key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output, allocated while the forward's buffers are held."""
    buffers = (*_block_buffers(shape, key, value), torch.empty_like(value))
    return torch.empty_like(buffers[-1])


def _gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    output, final = _GatedDeltaRule.apply(query, key, value, g, beta, initial_state)
    return output, final if output_final_state else None


class _Convolution(torch.autograd.Function):
    """Output and gradient of a causal convolution with its activation, which keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_states, weight)
        return torch.empty_like(hidden_states)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


def _causal_conv1d(hidden_states: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _Convolution.apply(hidden_states, weight)


STAND_INS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "chunk_gated_delta_rule": _gated_delta_rule,
    "causal_conv1d_fn": _causal_conv1d,
}


@contextmanager
def accelerated_kernels(model: nn.Module) -> Iterator[None]:
    """Puts the stand-ins in place in every modeling file that a model's layers come from."""
    replaced = []
    for file in _modeling_files(model):
        for name, stand_in in STAND_INS.items():
            if name in vars(file):
                replaced.append((file, name, vars(file)[name]))
                setattr(file, name, stand_in)
    try:
        yield
    finally:
        for file, name, function in replaced:
            setattr(file, name, function)


def reference_counted(model: nn.Module) -> list[str]:
    """Kernels of a model whose accelerated form is not counted here, but PyTorch's reference."""
    known = {name for file in _modeling_files(model) for name in vars(file)}
    return [name for name in _REFERENCE_ONLY if name in known]


def _modeling_files(model: nn.Module) -> list[Any]:
    names = {type(module).__module__ for module in model.modules()}
    return [sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")]

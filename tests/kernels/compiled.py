# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the two modules of causal-conv1d and mamba-ssm that only a CUDA compiler makes.

Their Python around it is the packages' own: what reaches the compiled functions is checked as their C++ checks it
(causal-conv1d 1.7, csrc/causal_conv1d.cpp), then computed by PyTorch. It shows that the call is right; not the kernel.
"""

import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_input, conv1d_weight

__all__ = ["stand_in_for_compiled_modules"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def stand_in_for_compiled_modules() -> None:
    """Puts the stand-ins where the packages import them from."""
    convolution = ModuleType("causal_conv1d_cuda")
    convolution.causal_conv1d_fwd = _forward
    convolution.causal_conv1d_bwd = _backward
    convolution.causal_conv1d_update = _update
    sys.modules.setdefault(convolution.__name__, convolution)
    sys.modules.setdefault("selective_scan_cuda", ModuleType("selective_scan_cuda"))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, states: Tensor | None) -> None:
    dim, width = weight.shape
    assert x.dtype in FLOATS
    assert weight.dtype in FLOATS
    assert x.shape[1] == dim
    assert 2 <= width <= 4, f"causal_conv1d only supports width between 2 and 4, found {width}"
    assert 1 in (x.stride(1), x.stride(2))
    if x.stride(1) == 1 and x.stride(2) > 1:
        assert dim % 8 == 0, f"causal_conv1d only supports channel dimension divisible by 8, found {dim}"
        assert x.stride(2) % 8 == 0, "strides of channel last have to be multiples of 8"
        assert x.stride(0) % 8 == 0, "strides of channel last have to be multiples of 8"
    if bias is not None:
        assert bias.dtype == weight.dtype
        assert bias.shape == (dim,)
    assert seq_idx is None, "no sequences are packed here"
    assert states is None, "transformers puts the states before the input"


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Before its activation, with as many positions after the input as there are zeros before it."""
    bias = None if bias is None else bias.float()
    return F.conv1d(x.float(), weight.float()[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    out: Tensor,
    final_states_out: Tensor | None,
    silu: bool,
) -> None:
    _check(x, weight, bias, seq_idx, initial_states)
    assert final_states_out is None
    convolved = _convolved(x, weight, bias)[..., : x.shape[2]]
    out.copy_(F.silu(convolved) if silu else convolved)


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_out: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dinitial_states: Tensor | None,
    silu: bool,
) -> None:
    _check(x, weight, bias, seq_idx, initial_states)
    assert (bias is None) == (dbias is None)
    gradient = torch.zeros_like(convolved := _convolved(x, weight, bias))
    gradient[..., : x.shape[2]] = gradient_out
    if silu:
        sigmoid = convolved.sigmoid()
        gradient *= sigmoid * (1 + convolved * (1 - sigmoid))
    padding = {"padding": weight.shape[1] - 1, "groups": x.shape[1]}
    dx.copy_(conv1d_input(x.shape, weight.float()[:, None], gradient, **padding))
    dweight.copy_(conv1d_weight(x.float(), weight[:, None].shape, gradient, **padding)[:, 0])
    if dbias is not None:
        dbias.copy_(gradient.sum((0, 2)))


def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> None:
    assert cache_seqlens is None
    assert conv_state_indices is None
    assert conv_state.dtype == x.dtype
    assert conv_state.shape[:2] == x.shape[:2] == (x.shape[0], len(weight))
    assert conv_state.shape[2] >= weight.shape[1] - 1
    inputs = torch.cat([conv_state, x], dim=2)
    convolved = _convolved(inputs, weight, bias)[..., conv_state.shape[2] : inputs.shape[2]]
    out.copy_(F.silu(convolved) if silu else convolved)
    conv_state.copy_(inputs[..., -conv_state.shape[2] :])

# SPDX-License-Identifier: Apache-2.0
"""The rules of linear attention as kernels compute them, beside the same rules written out token by token."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import relative_error

__all__ = ["LENGTHS", "RULES", "Rule", "worst_errors"]

# Around one and two chunks of 64, and what is left of a chunk.
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129)
KEY_SIZE, VALUE_SIZE, HEADS = 16, 32, 2

Inputs = dict[str, Tensor]
# From inputs and the state before them to outputs and the state after.
Run = Callable[[Inputs, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        kernel: Runs the package's kernels.
        by_token: The same, written out.
        inputs: Random ones of a length.
        state: Shape of the state of one sequence.
        lengths: In tokens, that it can run.
        gradient: Whether its kernels have a backward.
    """

    kernel: Run
    by_token: Run
    inputs: Callable[[int], Inputs]
    state: tuple[int, ...]
    lengths: tuple[int, ...] = LENGTHS
    gradient: bool = True


def worst_errors(rule: Rule, length: int, dtype: torch.dtype, *, split: int | None = None) -> dict[str, float]:
    """Relative errors of a rule's kernels against float64: of outputs, final state, and every gradient.

    Args:
        rule: What is run.
        length: In tokens.
        dtype: Of what the kernel gets, decay and states excepted, which stay in float32. The reference gets the same
            numbers.
        split: Runs so many tokens first and the others from their state.
    """
    torch.manual_seed(length)
    inputs = {
        name: tensor if name in ("g", "dt", "A") else tensor.to(dtype) for name, tensor in rule.inputs(length).items()
    }
    state = torch.randn(2, *rule.state)
    weights: tuple[Tensor, Tensor] | None = None
    found = []
    for run, exact in ((rule.kernel, False), (rule.by_token, True)):
        leaves = {n: (t.double() if exact else t).clone().requires_grad_() for n, t in (inputs | {"h": state}).items()}
        given = {name: leaf for name, leaf in leaves.items() if name != "h"}
        if split is None:
            output, final = run(given, leaves["h"])
        else:
            parts = [
                {n: t if n == "A" else t[:, part] for n, t in given.items()}
                for part in (slice(split), slice(split, None))
            ]
            first, between = run(parts[0], leaves["h"])
            second, final = run(parts[1], between)
            output = torch.cat([first, second], dim=1)
        found.append({"output": output, "state": final})
        if rule.gradient:
            weights = weights or (torch.randn(output.shape), torch.randn(final.shape))
            loss = (output.double() * weights[0]).sum() + (final.double() * weights[1]).sum()
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            found[-1] |= zip((f"d{name}" for name in leaves), gradients, strict=True)
    actual, expected = found
    return {name: relative_error(actual[name].detach(), t.detach()) for name, t in expected.items()}


def _delta_inputs(length: int, *, decays: int | None) -> Inputs:
    q, k = (F.normalize(torch.randn(2, length, HEADS, KEY_SIZE), dim=-1) for _ in range(2))
    shape = (2, length, HEADS) if decays is None else (2, length, HEADS, decays)
    return {
        "q": q,
        "k": k,
        "v": torch.randn(2, length, HEADS, VALUE_SIZE),
        "g": -0.2 * torch.rand(shape),
        "beta": torch.rand(2, length, HEADS),
    }


def _delta_by_token(inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Yang et al. 2024 (arXiv 2412.06464), equation 10: forget, then correct what the key recalls."""
    outputs = []
    for t in range(inputs["q"].shape[1]):
        q, k, v, g, beta = (inputs[name][:, t] for name in ("q", "k", "v", "g", "beta"))
        state = state * g.exp().reshape(*g.shape[:2], -1, 1)
        recalled = torch.einsum("bhk,bhkv->bhv", k, state)
        state = state + torch.einsum("bhk,bhv->bhkv", k, beta[..., None] * (v - recalled))
        outputs.append(torch.einsum("bhk,bhkv->bhv", q, state) / math.sqrt(KEY_SIZE))
    return torch.stack(outputs, dim=1), state


def _fla(name: str) -> Run:
    def run(inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        import fla.ops.gated_delta_rule
        import fla.ops.kda

        function: Any = getattr(fla.ops.gated_delta_rule, name, None) or getattr(fla.ops.kda, name)
        return function(**inputs, initial_state=state, output_final_state=True)

    return run


def _scan_inputs(length: int) -> Inputs:
    return {
        "x": torch.randn(2, length, HEADS, VALUE_SIZE),
        "dt": 0.5 * torch.rand(2, length, HEADS),
        "A": -torch.rand(HEADS),
        "B": torch.randn(2, length, 1, KEY_SIZE),
        "C": torch.randn(2, length, 1, KEY_SIZE),
    }


def _scan_by_token(inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Dao and Gu 2024 (arXiv 2405.21060), equation 1 with its discretization."""
    outputs = []
    for t in range(inputs["x"].shape[1]):
        x, dt, b, c = (inputs[name][:, t] for name in ("x", "dt", "B", "C"))
        state = state * (dt * inputs["A"]).exp()[..., None, None] + torch.einsum(
            "bhv,bk->bhvk", dt[..., None] * x, b[:, 0]
        )
        outputs.append(torch.einsum("bhvk,bk->bhv", state, c[:, 0]))
    return torch.stack(outputs, dim=1), state


def _mamba_step(inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers calls it: every size of its own, and the state written to."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    x, dt, b, c = (inputs[name][:, 0].detach() for name in ("x", "dt", "B", "C"))
    state = state.detach().clone()
    a = inputs["A"].detach()[:, None, None].expand(HEADS, VALUE_SIZE, KEY_SIZE)
    # It reads the strides of what it is not given.
    zeros = torch.zeros(HEADS)[:, None].expand(HEADS, VALUE_SIZE)
    output = selective_state_update(state, x, dt[..., None].expand(x.shape), a, b, c, D=zeros, dt_bias=zeros)
    return output[:, None], state


def _mamba(inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(**inputs, chunk_size=64, initial_states=state, return_final_states=True)


RULES = {
    "gated delta rule": Rule(
        _fla("chunk_gated_delta_rule"),
        _delta_by_token,
        lambda length: _delta_inputs(length, decays=None),
        (HEADS, KEY_SIZE, VALUE_SIZE),
    ),
    "Kimi delta attention": Rule(
        _fla("chunk_kda"),
        _delta_by_token,
        lambda length: _delta_inputs(length, decays=KEY_SIZE),
        (HEADS, KEY_SIZE, VALUE_SIZE),
    ),
    "state-space scan": Rule(_mamba, _scan_by_token, _scan_inputs, (HEADS, VALUE_SIZE, KEY_SIZE)),
    "gated delta rule, one token": Rule(
        _fla("fused_recurrent_gated_delta_rule"),
        _delta_by_token,
        lambda length: _delta_inputs(length, decays=None),
        (HEADS, KEY_SIZE, VALUE_SIZE),
        lengths=(1,),
        gradient=False,
    ),
    "Kimi delta attention, one token": Rule(
        _fla("fused_recurrent_kda"),
        _delta_by_token,
        lambda length: _delta_inputs(length, decays=KEY_SIZE),
        (HEADS, KEY_SIZE, VALUE_SIZE),
        lengths=(1,),
        gradient=False,
    ),
    "state-space scan, one token": Rule(
        _mamba_step, _scan_by_token, _scan_inputs, (HEADS, VALUE_SIZE, KEY_SIZE), lengths=(1,), gradient=False
    ),
}

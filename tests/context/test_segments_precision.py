# SPDX-License-Identifier: Apache-2.0
"""Attention over two segments in 16 bit: no less precise than its inputs, under autocast and with 16-bit products."""

import math

import pytest
import torch
from torch import nn

from frozen_peft.context import segments
from frozen_peft.context.handover import Segment, give_segment
from tests.reference import relative_error

HEADS, KV_HEADS, DECISION, CONTEXT, DIM = 8, 2, 33, 500, 32
# Half a unit in the last place of bfloat16 is 2e-3 of a number; autocast within attention was off by 8e-3 here.
TOLERANCE = 4e-3


def _inputs(device: str) -> list[torch.Tensor]:
    """Queries, keys and values of a decision, keys and values of its context, gradient of the output."""
    torch.manual_seed(0)
    shapes = [(HEADS, DECISION), *[(KV_HEADS, DECISION)] * 2, *[(KV_HEADS, CONTEXT)] * 2, (HEADS, DECISION)]
    made = [torch.randn(1, *shape, DIM) for shape in shapes]
    made[0] *= 2
    return [tensor.bfloat16().to(device) for tensor in made]


def _expected() -> list[torch.Tensor]:
    """Output and gradients of queries, keys and values by one softmax over both segments, in float64."""
    query, key, value, context_key, context_value, grad = (tensor.double() for tensor in _inputs("cpu"))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    keys, values = (
        torch.cat(pair, dim=2).repeat_interleave(HEADS // KV_HEADS, dim=1)
        for pair in ((context_key, leaves[1]), (context_value, leaves[2]))
    )
    visible = torch.ones(DECISION, CONTEXT + DECISION, dtype=torch.bool).tril(CONTEXT)
    scores = (leaves[0] @ keys.transpose(-1, -2) / math.sqrt(DIM)).masked_fill(~visible, -math.inf)
    output = scores.softmax(-1) @ values
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def _actual(device: str, autocast: bool) -> list[torch.Tensor]:
    query, key, value, context_key, context_value, grad = _inputs(device)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    # As out of modeling code: the segment rides on tensors that have a graph.
    key, value = leaves[1] * 1, leaves[2] * 1
    half = CONTEXT // 3
    pieces = [tuple(tensor.split([half, CONTEXT - half], dim=2)) for tensor in (context_key, context_value)]
    give_segment(key, value, Segment((pieces[0],), (pieces[1],), CONTEXT))
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        output, _ = segments.segmented_attention_forward(nn.Module(), leaves[0], key, value, None)
    output = output.transpose(1, 2)
    return [output.detach().cpu(), *(part.cpu() for part in torch.autograd.grad(output, leaves, grad))]


def _assert_precise(actual: list[torch.Tensor]) -> None:
    for left, right in zip(actual, _expected(), strict=True):
        assert relative_error(left.double(), right) <= TOLERANCE


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_inputs(monkeypatch: pytest.MonkeyPatch, autocast: bool, operands: torch.dtype) -> None:
    """With products in float32, a CPU's, and in 16 bit with sums in float32, a GPU's."""
    monkeypatch.setattr(segments, "_operand_dtype", lambda query: operands)
    _assert_precise(_actual("cpu", autocast))


def test_products_in_16_bit_are_summed_in_float32() -> None:
    left, right = (torch.randn(2, 8, 4096).bfloat16() for _ in range(2))
    product = segments._product(left, right.transpose(-1, -2), torch.bfloat16)
    assert product.dtype == torch.float32
    expected = left.double() @ right.double().transpose(-1, -2)
    assert relative_error(product.double(), expected) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_inputs_on_a_gpu(autocast: bool) -> None:
    _assert_precise(_actual("cuda", autocast))

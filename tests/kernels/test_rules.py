# SPDX-License-Identifier: Apache-2.0
"""Each rule's Triton kernels, forward and backward, against the rule written out token by token in float64."""

import pytest
import torch

from tests.kernels.card import on_card
from tests.kernels.rules import RULES, worst_errors

pytestmark = pytest.mark.kernels

# A product in bfloat16 is rounded to 2^-9 of itself; a handful of them follow one another.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Seconds in the interpreter, per length and rule.
SLOW = {"Kimi delta attention": 10}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("name", "length"),
    [
        pytest.param(name, length, marks=[pytest.mark.slow] if length > SLOW.get(name, 128) else [])
        for name in RULES
        for length in RULES[name].lengths
    ],
)
def test_a_rule_is_what_its_recurrence_is(name: str, length: int, dtype: torch.dtype) -> None:
    with on_card() as launched:
        errors = worst_errors(RULES[name], length, dtype)
    assert sum(launched.values()) >= (5 if RULES[name].gradient else 1)
    assert max(errors.values()) <= TOLERANCES[dtype], errors


@pytest.mark.parametrize(
    "name",
    ["gated delta rule", "state-space scan", pytest.param("Kimi delta attention", marks=pytest.mark.slow)],
)
def test_a_rule_goes_on_from_its_state(name: str) -> None:
    """Forward and backward across a boundary, gradient of the state included."""
    with on_card():
        errors = worst_errors(RULES[name], 70, torch.float32, split=31)
    assert max(errors.values()) <= TOLERANCES[torch.float32], errors

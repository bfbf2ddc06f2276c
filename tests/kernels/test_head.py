# SPDX-License-Identifier: Apache-2.0
"""The kernels of TRL's head, which every loss on a card goes through, against logarithms of softmax in float64."""

from typing import Any

import pytest
import torch
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

from tests.kernels.card import on_card
from tests.reference import relative_error

pytestmark = pytest.mark.kernels

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
VOCABULARY, WIDTH = 1100, 24


def _exact(hidden: Any, weight: Any, bias: Any, targets: torch.Tensor, softcap: float | None, scale: float) -> Any:
    """Log-probability of each target, and the entropy, by the whole row of logits."""
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1), logits


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "chunk", "with_bias", "softcap", "scale"),
    [(1, 2048, False, None, 1.0), (7, 512, True, None, 1.0), (65, 1100, False, 30.0, 0.5)],
)
def test_log_probabilities_and_gradients(
    tokens: int, chunk: int, with_bias: bool, softcap: float | None, scale: float, dtype: torch.dtype
) -> None:
    """Rows of vocabulary that one tile holds, that end within a tile, and that take several."""
    hidden, weight = (torch.randn(size, WIDTH, dtype=dtype) for size in (tokens, VOCABULARY))
    bias = torch.randn(VOCABULARY, dtype=dtype) if with_bias else None
    targets = torch.randint(VOCABULARY, (tokens,))
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    with on_card() as launched:
        found = ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, 1.0, chunk, softcap, scale, OPTIONAL_OUTPUTS
        )
        gradients = torch.autograd.grad(found[0].sum() + 0.1 * found[1].sum(), leaves)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logprobs, entropy, logits = _exact(
        *exact_leaves[:2], exact_leaves[2] if with_bias else None, targets, softcap, scale
    )
    expected = torch.autograd.grad(logprobs.sum() + 0.1 * entropy.sum(), exact_leaves)
    assert launched["trl._forward_kernel"] == -(-VOCABULARY // chunk) == launched["trl._backward_kernel"]
    assert relative_error(found[0].detach(), logprobs.detach()) <= TOLERANCES[dtype]
    assert relative_error(found[1].detach(), entropy.detach()) <= TOLERANCES[dtype]
    if dtype == torch.float32:
        assert torch.equal(found[4], logits.argmax(-1) == targets)
    for actual, exact in zip(gradients, expected, strict=True):
        assert relative_error(actual, exact) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_log_probabilities_of_given_logits(dtype: torch.dtype) -> None:
    """Of a preference: two answers at once, some of whose positions are padding."""
    logits = torch.randn(2, 5, VOCABULARY, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with on_card() as launched:
        logprobs, entropy = selective_log_softmax_and_entropy(logits, targets, row_mask=mask)
        (gradient,) = torch.autograd.grad(logprobs.sum() + 0.1 * entropy.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    rows = exact.log_softmax(-1)
    expected = rows.gather(-1, targets[..., None])[..., 0] * mask
    expected_entropy = -(rows.exp() * rows).sum(-1) * mask
    (expected_gradient,) = torch.autograd.grad(expected.sum() + 0.1 * expected_entropy.sum(), exact)
    assert sum(launched.values()) == 2
    assert relative_error(logprobs.detach(), expected.detach()) <= TOLERANCES[dtype]
    assert relative_error(entropy.detach(), expected_entropy.detach()) <= TOLERANCES[dtype]
    assert relative_error(gradient, expected_gradient) <= TOLERANCES[dtype]

# SPDX-License-Identifier: Apache-2.0
"""The divergence of some tokens at a time against one over all of them and the whole vocabulary."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from trl.experimental.gkd import GKDTrainer

from frozen_peft import ContextMismatchError
from frozen_peft.distillation import head as head_module
from frozen_peft.distillation.divergence import Divergence
from frozen_peft.distillation.head import LogitHead, verify_head
from tests.distillation.pairs import Loss, divergences
from tests.tiny_models import ARCHITECTURES, tiny_model

HIDDEN, VOCAB = 8, 41
DIRECTIONS = ("forward_kl", "reverse_kl", "jsd")


def problem(num_tokens: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, LogitHead, LogitHead]:
    """Hidden states of student and teacher `[N, H]` and their heads, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = []
    for _ in range(2):
        linear = nn.Linear(HIDDEN, VOCAB, dtype=torch.float64)
        linear.weight.data, linear.bias.data = random(VOCAB, HIDDEN), random(VOCAB)
        heads.append(LogitHead(linear, scale=0.8, softcap=6.0))
    return random(num_tokens, HIDDEN).requires_grad_(), random(num_tokens, HIDDEN), *heads


def logits(hidden: torch.Tensor, head: LogitHead) -> torch.Tensor:
    return 6.0 * torch.tanh(0.8 * (hidden @ head.module.weight.T + head.module.bias) / 6.0)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("top_k", [0, 1, 5, VOCAB - 1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_values_and_gradients(direction: str, top_k: int, chunk_size: int) -> None:
    student, teacher, head, teacher_head = problem(7)
    divergence = Divergence(direction, top_k, 1.7, chunk_size, beta=0.3)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    inputs = [student, head.module.weight, head.module.bias]

    found = divergence.per_token(student, head, divergence.answers(teacher, teacher_head), teacher_head)
    expected = divergences(
        logits(student, head),
        logits(teacher, teacher_head).detach(),
        Loss(direction, top_k, temperature=1.7, beta=0.3),
    )
    # What is kept of the teacher is in float32.
    tolerance = 1e-12 if top_k == 0 else 1e-6
    assert torch.allclose(found, expected, rtol=0, atol=tolerance)
    gradients, expected_gradients = (
        torch.autograd.grad((weights * values).sum(), inputs) for values in (found, expected)
    )
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, other, rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_generalized_divergence_is_that_of_trl(beta: float) -> None:
    student, teacher, head, teacher_head = problem(6)
    divergence = Divergence("jsd", 0, beta=beta)
    values = divergence.per_token(student, head, divergence.answers(teacher, teacher_head), teacher_head)
    expected = GKDTrainer.generalized_jsd_loss(
        logits(student, head)[None], logits(teacher, teacher_head)[None], beta=beta, reduction="none"
    )
    assert torch.allclose(values, expected.sum(-1).flatten(), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(1, VOCAB - 1), direction=st.sampled_from(DIRECTIONS))
def test_a_remainder_never_adds_to_the_divergence(seed: int, top_k: int, direction: str) -> None:
    student, teacher, head, teacher_head = problem(3, seed=seed)
    values = {}
    for k in (top_k, 0):
        divergence = Divergence(direction, k)
        values[k] = divergence.per_token(student, head, divergence.answers(teacher, teacher_head), teacher_head)
    assert (values[top_k] >= -1e-6).all()
    assert (values[top_k] <= values[0] + 1e-6).all()


def test_all_tokens_but_one_are_the_whole_vocabulary() -> None:
    student, teacher, head, teacher_head = problem(4)
    for direction in DIRECTIONS:
        found = []
        for k in (VOCAB - 1, VOCAB, 0):
            divergence = Divergence(direction, k)
            answers = divergence.answers(teacher, teacher_head)
            assert ("tokens" in answers) == (k == VOCAB - 1)
            found.append(divergence.per_token(student, head, answers, teacher_head))
        assert torch.allclose(found[0], found[2], atol=1e-6)
        assert torch.equal(found[1], found[2])


def test_what_is_kept_of_the_teacher() -> None:
    _, teacher, _, teacher_head = problem(5)
    answers = Divergence("forward_kl", 4, 2.0, 3).answers(teacher, teacher_head)
    p = (logits(teacher, teacher_head) / 2.0).softmax(-1)
    assert answers["tokens"].dtype == torch.int32
    assert answers["logprobs"].dtype == torch.float32
    assert answers["tokens"].tolist() == p.topk(4).indices.tolist()
    assert torch.allclose(answers["logprobs"].double().exp().sum(-1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(answers["logprobs"][:, :-1].double().exp(), p.topk(4).values)


def test_a_likely_remainder_and_an_unlikely_one_are_not_lost_to_rounding() -> None:
    """The remainder of a teacher that is all but sure: 1 minus a sum would be zero in float32, or negative."""
    linear = nn.Linear(2, VOCAB, bias=False)
    linear.weight.data.zero_()
    linear.weight.data[0, 0] = 30.0
    head, hidden = LogitHead(linear), torch.eye(2)
    kept = Divergence("forward_kl", 1).answers(hidden, head)["logprobs"]
    assert kept[0, 1].item() == pytest.approx(torch.tensor(VOCAB - 1.0).log().item() - 30.0, rel=1e-6)
    assert kept[1].exp().tolist() == pytest.approx([1 / VOCAB, (VOCAB - 1) / VOCAB])
    student = hidden.flip(0).requires_grad_()
    for direction in DIRECTIONS:
        divergence = Divergence(direction, 1)
        values = divergence.per_token(student, head, divergence.answers(hidden, head), head)
        gradient = torch.autograd.grad(values.sum(), student)[0]
        assert torch.isfinite(values).all()
        assert torch.isfinite(gradient).all()


class WideTensors(TorchDispatchMode):
    """Largest number of tokens for which a tensor over the vocabulary was made."""

    def __init__(self) -> None:
        super().__init__()
        self.most_tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] >= VOCAB - 5:
                self.most_tokens = max(self.most_tokens, tensor.numel() // tensor.shape[-1])
        return result


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_exist_for_one_chunk_at_a_time(direction: str, top_k: int) -> None:
    student, teacher, head, teacher_head = problem(30)
    for module in (head.module, teacher_head.module):
        module.requires_grad_(False)
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    for chunk_size, expected in ((4, 4), (30, 30)):
        divergence = Divergence(direction, top_k, chunk_size=chunk_size)
        with WideTensors() as wide, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            answers = divergence.answers(teacher, teacher_head)
            divergence.per_token(student, head, answers, teacher_head).sum().backward()
        # The heads' own weights are (V, H), or (H, V) transposed.
        assert wide.most_tokens == max(expected, HIDDEN)
        assert max(answers["tokens" if top_k else "hidden"].shape) == 30
    # Between forward and backward none is kept: what is saved is what a chunk is computed from again.
    assert all(shape[-1] < VOCAB - 5 for shape in saved if len(shape))


def test_without_tokens_there_is_still_a_graph() -> None:
    student, teacher, head, teacher_head = problem(3)
    divergence = Divergence("forward_kl", 2)
    answers = divergence.answers(teacher[:0], teacher_head)
    values = divergence.per_token(student[:0], head, answers, teacher_head)
    values.sum().backward()
    assert values.shape == (0,)
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, {}) for name in ARCHITECTURES),
        ("gemma3_text", {"final_logit_softcapping": 3.0}),
        ("falcon_h1", {"lm_head_multiplier": 0.3}),
        ("granitemoehybrid", {"logits_scaling": 3.0}),
    ],
)
def test_the_head_gives_the_models_own_logits(name: str, overrides: dict[str, float]) -> None:
    assert verify_head(tiny_model(name, **overrides), torch.arange(3, 12)) < 1e-5


def test_a_head_that_does_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "MULTIPLIERS", ())
    model = tiny_model("falcon_h1", lm_head_multiplier=0.3)
    with pytest.raises(ContextMismatchError, match=r"for `falcon_h1` they are not those of the model itself"):
        verify_head(model, torch.arange(3, 12))

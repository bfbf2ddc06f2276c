# SPDX-License-Identifier: Apache-2.0
"""What `utils/compat/torch.py` uses of PyTorch is there, and still needed."""

import inspect

import torch

from frozen_peft.utils.compat.torch import begun_checkpoint, flash_attention_on_cpu, num_writes


def test_a_checkpoint_begins_in_one_call_and_ends_in_another() -> None:
    weight = torch.randn(3, requires_grad=True)
    runs = []

    def run(value: torch.Tensor) -> torch.Tensor:
        runs.append(value)
        return value.sin().cos()

    checkpoint = begun_checkpoint(run, weight)
    output = run(weight)
    next(checkpoint, None)
    output.sum().backward()
    assert len(runs) == 2
    expected = -weight.sin().sin() * weight.cos()
    torch.testing.assert_close(weight.grad, expected.detach())


def test_no_public_checkpoint_begins_in_one_call_and_ends_in_another() -> None:
    """When this fails, see whether `begun_checkpoint` can go."""
    public = {name for name in vars(torch.utils.checkpoint) if not name.startswith("_")}
    generators = {name for name in public if inspect.isgeneratorfunction(getattr(torch.utils.checkpoint, name))}
    assert generators == set()


def test_flash_attention_gives_its_log_sum_exp() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 16).unbind(0)
    output, logsumexp = flash_attention_on_cpu(query, key, value, 0.25, is_causal=True)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(-1, -2) * 0.25).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(logsumexp, scores.logsumexp(-1))
    torch.testing.assert_close(output, scores.softmax(-1) @ value)


def test_no_public_attention_gives_it_without_a_compiler() -> None:
    documented = inspect.getdoc(torch.nn.functional.scaled_dot_product_attention) or ""
    assert "logsumexp" not in documented.lower().replace("-", "").replace(" ", "")


def test_writes_are_counted_but_for_those_past_autograd() -> None:
    tensor = torch.zeros(3)
    before = num_writes(tensor)
    tensor.add_(1)
    assert num_writes(tensor) == before + 1
    tensor.data.add_(1)
    assert num_writes(tensor) == before + 1
    assert not hasattr(tensor, "version")

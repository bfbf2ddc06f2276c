# SPDX-License-Identifier: Apache-2.0
"""What `utils/compat/torch.py` uses of PyTorch is there, and still needed."""

import inspect

import torch

from frozen_peft.utils.compat.torch import begun_checkpoint


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

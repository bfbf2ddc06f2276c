# SPDX-License-Identifier: Apache-2.0
"""What a newcomer sees of dependencies: nothing that cannot be acted on, and everything else."""

import logging

import pytest
import torch

from frozen_peft.utils.noise import silence_logs

KERNELS = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure ..."
FALLS_BACK = (
    "`causal_conv1d_fn` is falling back to its reference PyTorch implementation because `causal_conv1d` is not "
    "installed. This is correct but much slower; install `causal_conv1d` for the optimized kernel."
)


def said(name: str, message: str, *values: object) -> bool:
    """Whether a message reaches who listens to a library's logger."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        logger.warning(message, *values)
    finally:
        logger.removeHandler(handler)
    return bool(records)


def test_a_kernel_that_is_not_used_is_not_asked_for() -> None:
    absent = ModuleNotFoundError("No module named 'kernels'", name="kernels")
    assert not said("bitsandbytes.backends.cpu.ops", KERNELS, absent)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (KERNELS, OSError("the hub cannot be reached")),
        (KERNELS, ModuleNotFoundError("No module named 'huggingface_hub'", name="huggingface_hub")),
        ("Failed to load the native library: %s", ModuleNotFoundError("No module named 'kernels'", name="kernels")),
    ],
    ids=["kernels-fails", "another-module", "another-message"],
)
def test_whatever_else_bitsandbytes_says_stays(message: str, reason: Exception) -> None:
    assert said("bitsandbytes.backends.cpu.ops", message, reason)
    assert said("bitsandbytes", KERNELS, reason)


def test_kernels_of_gpus_are_advised_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.integrations.hub_kernels"
    for available in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda available=available: available)
        assert said(name, FALLS_BACK) is available
        assert said(name, "`flash-linear-attention` 0.1 is too old")


def test_silencing_twice_is_silencing_once() -> None:
    loggers = [logging.getLogger(name) for name in ("bitsandbytes.backends.cpu.ops", "transformers")]
    before = [list(logger.filters) for logger in loggers]
    silence_logs()
    assert [list(logger.filters) for logger in loggers] == before

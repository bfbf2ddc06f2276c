# SPDX-License-Identifier: Apache-2.0
"""What the tests of encoded contexts on disk write, and how they compare it."""

import logging
from pathlib import Path

import pytest
import torch

from frozen_peft.context.keys import PrefixKey
from frozen_peft.context.store.context_files import ContextFiles

SPACE = "model-1"
KEY = PrefixKey(300, "0123456789abcdef" * 2)
OTHER_KEY = PrefixKey(17, "f" * 32)
METADATA = {"layers": "2", "note": "ä\n\"quoted\""}  # fmt: skip


def content() -> dict[str, torch.Tensor]:
    return {
        "keys.0": torch.randn(1, 2, 5, 4).to(torch.bfloat16),
        "values.0": torch.randn(1, 2, 5, 4).to(torch.bfloat16),
        "state.1": torch.randn(1, 3, 4),
        "length": torch.tensor(300),
        "empty": torch.empty(1, 2, 0, 4),
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Equal names, types, shapes and bytes, so that NaN equals itself and -0.0 does not equal 0.0."""
    return found.keys() == expected.keys() and all(
        tensor.dtype == found[name].dtype
        and tensor.shape == found[name].shape
        and tensor.contiguous().view(-1).view(torch.uint8).tolist() == found[name].view(-1).view(torch.uint8).tolist()
        for name, tensor in expected.items()
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def path_of(files: ContextFiles, namespace: str = SPACE, key: PrefixKey = KEY) -> Path:
    return files.folder / namespace / f"{key.num_tokens}-{key.digest}.safetensors"

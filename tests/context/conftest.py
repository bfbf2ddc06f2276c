# SPDX-License-Identifier: Apache-2.0
"""An empty directory of encoded contexts, and what is written to it."""

from pathlib import Path

import pytest
import torch

from frozen_peft.context.store.context_files import ContextFiles
from tests.context.stored import KEY, METADATA, SPACE, content


@pytest.fixture
def files(tmp_path: Path) -> ContextFiles:
    return ContextFiles(tmp_path / "contexts")


@pytest.fixture
def written(files: ContextFiles) -> dict[str, torch.Tensor]:
    """What `files` holds under `KEY`."""
    tensors = content()
    assert files.write(SPACE, KEY, tensors, METADATA)
    return tensors

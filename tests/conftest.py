# SPDX-License-Identifier: Apache-2.0
"""Test-wide settings: offline, quiet, one thread and fixed seeds, so that every figure repeats."""

import importlib.util
import os
from pathlib import Path

# Without a card Triton runs in its interpreter alone, which is chosen before it is imported.
if importlib.util.find_spec("fla") is not None and not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Both libraries read these at import, so they come before either is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"

import pytest
import torch
import transformers

from tests.installed_package import InstalledPackage, build_wheel, install_wheel
from tests.made_once import made_once

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    transformers.set_seed(0)


@pytest.fixture(scope="session")
def installed_package(tmp_path_factory: pytest.TempPathFactory) -> InstalledPackage:
    """The package as a user installs it, in an environment without anything for development."""
    folder = made_once(
        tmp_path_factory, "package", lambda folder: install_wheel(build_wheel(folder), folder / "environment")
    )
    return InstalledPackage(folder / "environment")


def pytest_configure(config: pytest.Config) -> None:
    """Let PEFT 0.21 read an attribute that transformers 5.23 deprecates; goes with the next PEFT."""
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none, however the tests were chosen."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

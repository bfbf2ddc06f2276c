# SPDX-License-Identifier: Apache-2.0
"""What a store and a resumed run ask of the packages of kernels, of those that are really installed."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from frozen_peft.context import ContextEncoder, ContextFiles, ContextStore, DiskLevel
from frozen_peft.context.kernels import kernel_rows
from frozen_peft.context.kernels.table import current_capabilities
from frozen_peft.context.store.fingerprint import run_fingerprint
from frozen_peft.training.engines import describe_machine
from frozen_peft.utils import installed
from tests.card import CARD, stand_in_card
from tests.reference import random_sample
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.kernels
PARTS = ("fla-core", "flash-linear-attention")


def test_the_modules_name_is_none_of_a_distribution() -> None:
    """What was asked once, on every machine with a card."""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("fla")
    assert installed.module_versions("fla") == {name: importlib.metadata.version(name) for name in PARTS}
    assert installed.module_versions("triton") == {"triton": importlib.metadata.version("triton")}


def test_fingerprints_on_a_card_name_the_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_card():
        model = tiny_model("llama").to(CARD)
        store = ContextStore(1 << 20, DiskLevel(ContextFiles(tmp_path)), max_staleness=1)
        ContextEncoder(model, store=store).encode([random_sample(40, 2).context])
        store.flush()
        assert store.num_bytes_on_disk > 0
        found = run_fingerprint(model)
        monkeypatch.setattr(
            "frozen_peft.context.store.fingerprint.module_versions",
            lambda name: installed.module_versions(name) | ({"fla-core": "0"} if name == "fla" else {}),
        )
        assert run_fingerprint(model) != found


def test_what_a_machine_says_of_itself_and_runs() -> None:
    with stand_in_card(capability=(8, 0)):
        said = describe_machine(CARD, torch.bfloat16)
        rows = {row.purpose: row for row in kernel_rows()}
        capabilities = current_capabilities(CARD)
    assert said["fla"] == ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PARTS)
    assert rows["prefill, gated delta rule"].kernel == "flash-linear-attention"
    assert rows["decision, gated delta rule"].kernel == "flash-linear-attention"
    assert capabilities.fla == min(Version(importlib.metadata.version(name)) for name in PARTS)

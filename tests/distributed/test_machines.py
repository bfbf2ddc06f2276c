# SPDX-License-Identifier: Apache-2.0
"""Processes that would not compute the same are told apart by what they say about themselves."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file

from frozen_peft.context.kernels.table import Capabilities, Version
from frozen_peft.training import engines as distributed
from frozen_peft.training.engines import check_engine, describe_machine, require_same
from tests.training.runs import config

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
HERE = describe_machine(torch.device("cpu"), torch.float32)


def test_this_machine_says_its_versions_and_kernels() -> None:
    # Its metadata lacks the local part where the index forbids one.
    assert torch.__version__.startswith(HERE["torch"])
    assert {"transformers", "triton", "fla", "causal_conv1d", "python"} <= HERE.keys()
    assert HERE["kernel for decision, gated delta rule"].startswith("PyTorch")
    require_same([HERE, dict(HERE), dict(HERE)])


def test_every_difference_is_named_with_its_ranks() -> None:
    other = HERE | {"triton": "3.5.0", "torch": "2.8.0"}
    with pytest.raises(ValueError, match="would not compute the same") as error:
        require_same([HERE, other, HERE, other])
    assert f"torch: {HERE['torch']} on rank 0, 2, 2.8.0 on rank 1, 3" in str(error.value)
    assert "triton: " in str(error.value)
    assert "3.5.0 on rank 1, 3" in str(error.value)
    assert "accelerate: " not in str(error.value)


def test_the_same_packages_on_other_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, Triton 3.5 has no right backward of the gated rule, and on Ada it has."""
    machines = []
    for capability in ((9, 0), (8, 9)):
        card = Capabilities("cuda", capability, fla=Version("0.6"), triton=Version("3.5"))
        monkeypatch.setattr(distributed, "current_capabilities", lambda device, card=card: card)
        machines.append(describe_machine(torch.device("cpu"), torch.bfloat16))
    with pytest.raises(ValueError, match=r"kernel for decision, gated delta rule: .* on rank 0, .* on rank 1"):
        require_same(machines)


def test_a_package_that_one_has_not() -> None:
    less = {name: value for name, value in HERE.items() if name != "bitsandbytes"}
    with pytest.raises(ValueError, match="bitsandbytes: not installed on rank 0"):
        require_same([less, HERE])


def test_zero_3_is_refused_where_contexts_are_frozen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed, "is_deepspeed_zero3_enabled", lambda: True)
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    for fields in ({"tier": 2}, {"tier": 3, "sequence_chunk_size": 8}):
        with pytest.raises(ValueError, match=r"DeepSpeed ZeRO-3 .* Use ZeRO-2, or FSDP2"):
            check_engine(accelerator, torch.nn.Linear(1, 1), config(tmp_path, **fields))
    check_engine(accelerator, torch.nn.Linear(1, 1), config(tmp_path, tier=1))


def test_fsdp_of_version_1_is_refused_where_contexts_are_frozen(tmp_path: Path) -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ValueError, match="Set `fsdp_version: 2`"):
        check_engine(accelerator, torch.nn.Linear(1, 1), config(tmp_path, tier=2))
    check_engine(accelerator, torch.nn.Linear(1, 1), config(tmp_path, tier=1))


def test_a_file_for_every_engine() -> None:
    """accelerate reads each, and each is headed by its own command and by what was not run."""
    for path in sorted(RECIPES.glob("*.yaml")):
        loaded = load_config_from_file(str(path))
        assert loaded.num_processes == 8
        header = path.read_text(encoding="utf-8").partition("\ncompute_environment")[0]
        assert f"#   frozen-peft recipes accelerate/{path.stem} > {path.name}\n" in header
        assert f"#   accelerate launch --config_file {path.name} " in header
        assert "not run on" in header.replace("\n# ", " ").lower() or "NOT RUN" in header
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"ddp", "fsdp2", "fsdp2_qlora", "deepspeed_zero2"}

# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft train` refuses a run that cannot fit, and leaves its plan with one that does."""

import json
from pathlib import Path

import pytest

from frozen_peft.cli import main
from frozen_peft.demo import CHECKPOINT
from frozen_peft.training import run
from frozen_peft.training.recipe import is_sharded_run


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    row = {"prompt": "The shop opens at nine. " * 20, "completion": "It opens at nine."}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n")
    fields = {
        "model_name_or_path": "demo",
        "dataset_name": str(data),
        "output_dir": str(tmp_path / "out"),
        "tier": "2",
        "max_steps": "1",
        "lora_r": "2",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "verify_context": "never",
        "disable_tqdm": "true",
    }
    return ["train", *(text for name, value in fields.items() for text in (f"--{name}", value))]


def limit(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(run, "memory_limit", lambda device: num_bytes)


def test_a_run_that_fits_leaves_its_plan(arguments: list[str], tmp_path: Path) -> None:
    assert main(arguments) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["model"] == str(CHECKPOINT)
    assert plan["setting"]["tier"] == 2
    assert plan["setting"]["lora_r"] == 2
    assert 0 < plan["setting"]["decision_length"] < plan["setting"]["context_length"]
    weights = (CHECKPOINT / "model.safetensors").stat().st_size
    assert 0.9 * weights < plan["terms"]["weights"] <= weights
    assert plan["terms"]["cache"] > 0
    assert plan["total_bytes"] == sum(plan["terms"].values()) < plan["memory_limit_bytes"]
    # On a CPU activations are counted where that is asked for.
    assert plan["fits"] is None
    assert [text.partition(":")[0] for text in plan["unknown"]] == ["activations", "workspace"]


def test_turns_are_planned_as_they_are_cut(tmp_path: Path, arguments: list[str]) -> None:
    """Each has its own decision, and the last one's context is the longest."""
    turns = [{"role": "user", "content": "The shop opens at nine. " * 20}]
    for _ in range(3):
        turns += [{"role": "assistant", "content": "Ok."}, {"role": "user", "content": "And when does it close? " * 4}]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": turns[:-1]}) + "\n")
    assert main([*arguments, "--decision_mode", "turns", "--assistant_only_loss", "true"]) == 0
    setting = json.loads((tmp_path / "out" / "plan.json").read_text())["setting"]
    assert setting["turns"] == 3
    assert setting["decision_length"] < 10 < setting["turn_length"] < setting["context_length"]


def test_a_model_that_does_not_fit_is_not_loaded(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(monkeypatch, 1 << 20)
    monkeypatch.setattr("frozen_peft.training.run.build_trainer", lambda *_: pytest.fail("it was loaded"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "the run cannot fit on this machine's free memory. It does not fit: " in error
    assert "and there are 1 MiB" in error
    assert "`check_memory: never` runs it all the same" in error
    assert not (tmp_path / "out").exists()


def test_a_model_in_shards_is_not_refused_by_the_plan_of_one_device(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class LoadedError(Exception):
        pass

    def load(*_: object) -> None:
        raise LoadedError

    limit(monkeypatch, 1 << 20)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("frozen_peft.training.run.build_trainer", load)
    with pytest.raises(LoadedError):
        main(arguments)


def test_shards_are_told_by_the_launchers_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_sharded_run("FSDP", "DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert is_sharded_run("FSDP", "DEEPSPEED")
    assert not is_sharded_run("FSDP")


def test_a_context_that_does_not_fit_is_not_trained_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As much as weights, adapters and optimizer take, and half of the cache.
    assert main(arguments) == 0
    terms = json.loads((tmp_path / "out" / "plan.json").read_text())["terms"]
    limit(monkeypatch, sum(terms.values()) - terms["cache"] // 2)
    assert main(arguments) == 2
    assert "the run cannot fit" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["fits"] is False
    assert main([*arguments, "--check_memory", "never"]) == 0


@pytest.mark.slow
def test_in_full_it_counts_activations_and_advises(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--check_memory", "full"]) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["fits"] is True
    assert plan["terms"]["activations"] > 0
    assert plan["unknown"] == []
    limit(monkeypatch, plan["total_bytes"] - plan["terms"]["cache"] // 2)
    assert main([*arguments, "--check_memory", "full"]) == 2
    assert "contexts of up to" in capsys.readouterr().err

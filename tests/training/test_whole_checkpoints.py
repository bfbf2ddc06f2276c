# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are there whole or not at all, and a run goes on from none that is not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from frozen_peft import FrozenContextTrainer
from frozen_peft.training.checkpoints import (
    MANIFEST,
    UNFINISHED,
    checkpoint_to_resume,
    last_whole_checkpoint,
    require_no_way_out,
    why_not_whole,
)
from tests.training.runs import adapted, as_dataset, config, samples, train

ROWS = samples()[:4]
SAVING = {"save_strategy": "steps", "save_steps": 1}


def saved(folder: Path, **fields: Any) -> FrozenContextTrainer:
    arguments = config(folder, **(SAVING | fields))
    return train(
        FrozenContextTrainer, adapted("llama"), arguments, as_dataset(ROWS), eval_dataset=as_dataset(ROWS)
    ).trainer


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    saved(folder)
    return folder


@pytest.fixture
def run_dir(a_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(a_run, tmp_path / "run"))


def test_a_checkpoint_lists_its_files(run_dir: Path) -> None:
    folder = run_dir / "checkpoint-2"
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= listed.keys()
    there = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.name != MANIFEST}
    assert listed == there
    assert sorted(path.name for path in run_dir.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    assert not (run_dir / UNFINISHED).exists()
    assert last_whole_checkpoint(run_dir) == run_dir / "checkpoint-3"


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json", MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_what_is_not_whole_is_passed_over(
    name: str, damage: str, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run_dir / "checkpoint-3" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -10 if damage == "cut" else 0])
    assert last_whole_checkpoint(run_dir) == run_dir / "checkpoint-2"
    assert f"{path.parent} is passed over: " in caplog.text
    assert name in caplog.text
    assert checkpoint_to_resume("auto", run_dir) == str(run_dir / "checkpoint-2")
    assert checkpoint_to_resume(True, run_dir) == str(run_dir / "checkpoint-2")
    if name != MANIFEST or damage != "missing":
        with pytest.raises(ValueError, match=f"cannot be resumed from: .*{name}"):
            checkpoint_to_resume(str(path.parent), run_dir)


def test_names_that_are_no_checkpoints(run_dir: Path) -> None:
    for name in ("checkpoint-99.old", "checkpoint-", "checkpoint--4", "my-checkpoint-50", "checkpoint-5x"):
        shutil.copytree(run_dir / "checkpoint-1", run_dir / name)
    (run_dir / "checkpoint-77").write_text("a file")
    (run_dir / "checkpoint-10").mkdir()
    assert last_whole_checkpoint(run_dir) == run_dir / "checkpoint-3"


def test_nothing_to_resume_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoint_to_resume(None, tmp_path) is None
    assert checkpoint_to_resume(False, tmp_path) is None
    assert checkpoint_to_resume("auto", tmp_path / "nowhere") is None
    assert "has no whole checkpoint: training starts anew" in caplog.text
    with pytest.raises(ValueError, match=r"has no whole checkpoint\. Name one, or resume with `auto`"):
        checkpoint_to_resume(True, tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        checkpoint_to_resume(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(ValueError, match=f"it has no {MANIFEST}"):
        checkpoint_to_resume(str(tmp_path), tmp_path)


def test_another_trainers_checkpoint_is_read_when_it_is_named(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_dir / "checkpoint-3"
    (folder / MANIFEST).unlink()
    assert checkpoint_to_resume(str(folder), run_dir) == str(folder)
    assert f"has no {MANIFEST}" in caplog.text


def test_a_model_alone_is_not_resumed_from(tmp_path: Path) -> None:
    saved(tmp_path, save_only_model=True, max_steps=1)
    assert why_not_whole(tmp_path / "checkpoint-1") == "it holds the model alone (`save_only_model`)"
    assert last_whole_checkpoint(tmp_path) is None


PARTS = ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"]


@pytest.mark.parametrize("part", PARTS)
def test_a_failure_within_a_checkpoint_leaves_the_one_before(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(Trainer, part)

    def failing(self: Trainer, output_dir: str, *args: Any, **kwargs: Any) -> None:
        original(self, output_dir, *args, **kwargs)
        if self.state.global_step == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(Trainer, part, failing)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (tmp_path / UNFINISHED / "checkpoint-2" / "adapter_model.safetensors").is_file()
    monkeypatch.undo()
    resumed = train(
        FrozenContextTrainer, adapted("llama"), config(tmp_path, **SAVING), as_dataset(ROWS), resume="auto"
    )
    assert len(resumed.gradients) == 2
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert not (tmp_path / UNFINISHED).exists()


def test_old_checkpoints_go_and_the_best_one_stays(tmp_path: Path) -> None:
    trainer = saved(
        tmp_path,
        max_steps=4,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # so that the first evaluation is the best
    )
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][:4]
    assert losses == sorted(losses, reverse=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    for step in (1, 4):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    now = {name: weight for name, weight in trainer.model.state_dict().items() if ".lora_" in name}
    assert all(torch.equal(weight, best[name.replace(".default", "")]) for name, weight in now.items())


def test_a_checkpoint_of_an_earlier_run_is_replaced(run_dir: Path) -> None:
    stamp = (run_dir / "checkpoint-2" / "whole.json").stat().st_ino
    saved(run_dir)
    assert (run_dir / "checkpoint-2" / "whole.json").stat().st_ino != stamp
    assert why_not_whole(run_dir / "checkpoint-2") is None
    assert not (run_dir / UNFINISHED).exists()


def test_a_saved_model_appears_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = saved(tmp_path / "run", max_steps=1, save_strategy="no")
    target = tmp_path / "saved"
    trainer.save_model(str(target))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "base_record.json"} <= before.keys()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(trainer.processing_class), "save_pretrained", fail)
    with torch.no_grad():
        next(weight for weight in trainer.model.parameters() if weight.requires_grad).add_(1.0)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model(str(target))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize("name", [UNFINISHED, "trainer_state.json", "README.md", "eval_before_results.json", "runs"])
def test_a_link_out_of_the_run_is_not_written_through(name: str, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("mine")
    link = run_dir / name
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "elsewhere" / ("" if name in (UNFINISHED, "runs") else "precious"))
    with pytest.raises(ValueError, match=f"{link.name} leads to .*elsewhere.*, outside of"):
        train(FrozenContextTrainer, adapted("llama"), config(run_dir, **SAVING), as_dataset(ROWS), resume="auto")
    assert (tmp_path / "elsewhere" / "precious").read_text() == "mine"
    # Within the run a link may lead where it likes.
    link.unlink()
    (run_dir / "latest").symlink_to("checkpoint-2")
    require_no_way_out(run_dir)


def test_links_that_a_run_reads_or_replaces_may_lead_out(run_dir: Path, tmp_path: Path) -> None:
    """Checkpoints on another disk are resumed from as if they lay in the run; nothing behind a link changes."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run_dir, tmp_path / "plain")
    elsewhere.mkdir()
    (elsewhere / "data").mkdir()
    (elsewhere / "data" / "precious").write_text("mine")
    shutil.rmtree(run_dir / "checkpoint-3")
    shutil.rmtree(tmp_path / "plain" / "checkpoint-3")
    shutil.move(run_dir / "checkpoint-2", elsewhere / "checkpoint-2")
    shutil.move(run_dir / "checkpoint-1" / "adapter_model.safetensors", elsewhere / "weights")
    links = {
        "checkpoint-2": "checkpoint-2",
        "checkpoint-1/adapter_model.safetensors": "weights",
        # A name that the run gives anew, twice; data; and where a second adapter is saved.
        "checkpoint-3": "data",
        "adapter_model.safetensors": "data/precious",
        "data": "data",
        "second": "data",
    }
    for name, target in links.items():
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(elsewhere / target)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    runs = []
    for folder in (run_dir, tmp_path / "plain"):
        model = adapted("llama")
        model.add_adapter("second", model.peft_config["default"])
        fields = config(folder, **SAVING | {"save_total_limit": 1})
        runs.append(train(FrozenContextTrainer, model, fields, as_dataset(ROWS), resume="auto"))
        runs[-1].trainer.save_model()
    assert len(runs[0].gradients) == 1
    assert runs[0].losses == runs[1].losses
    for name, weight in runs[1].weights.items():
        assert torch.equal(runs[0].weights[name], weight)
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before
    assert why_not_whole(run_dir / "checkpoint-3") is None
    for name in ("checkpoint-3", "adapter_model.safetensors", "second"):
        assert not (run_dir / name).is_symlink()


def test_a_run_that_had_ended_is_not_trained_further(run_dir: Path) -> None:
    resumed = train(FrozenContextTrainer, adapted("llama"), config(run_dir, **SAVING), as_dataset(ROWS), resume="auto")
    assert resumed.gradients == []
    assert resumed.trainer.state.global_step == 3

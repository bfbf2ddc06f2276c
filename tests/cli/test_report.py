# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft report`, and what `train` leaves for it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from frozen_peft.cli import main
from frozen_peft.data import strip_instructions
from frozen_peft.data.rows import dump_row
from tests.report.reading import Parsed
from tests.report.run_files import SECTIONS, files, write_run
from tests.tiny_models import tiny_model
from tests.training.runs import word_tokenizer, words

SECRET = "hf_abcdefghij"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that train a tiny hybrid for two steps on stripped samples."""
    folder = tmp_path_factory.mktemp("assets")
    tiny_model("qwen3_5_text").save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    rows = [
        {
            "prompt": [
                {"role": "system", "content": "<instruction>w1 w2</instruction>"},
                {"role": "user", "content": words(20 + seed, seed=seed)},
            ],
            "completion": [{"role": "assistant", "content": words(2, seed=-seed - 1)}],
        }
        for seed in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(dump_row(strip_instructions(row)) for row in rows))
    arguments = ["--model_name_or_path", str(folder / "base"), "--dataset_name", str(folder / "rows.jsonl")]
    arguments += ["--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    return [*arguments, "--per_device_train_batch_size", "2", "--max_example_tokens", "3"]


def test_training_leaves_all_that_is_its_own(
    assets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    held_out = assets[assets.index("--dataset_name") + 1]
    arguments = ["train", *assets, "--tier", "2", "--eval_dataset_name", held_out, "--output_dir", str(run)]
    assert main([*arguments, "--hub_token", SECRET]) == 0
    assert re.search(rf"report +{re.escape(str(run / 'report.html'))}\n", capsys.readouterr().out)
    page = (run / "report.html").read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert tuple(parsed.texts) == SECTIONS
    own = set(files()) - {"plan.json", "gradient_flow.json", "evaluation.json", "merge_report.json"}
    assert {path.name for path in run.iterdir()} >= own
    missing = {name for name in files() if f" {name} " in f" {' '.join(parsed.texts['files'].split())} "}
    assert missing & own == set()
    assert all(SECRET.encode() not in path.read_bytes() for path in run.rglob("*") if path.is_file())
    examples = json.loads((run / "examples.json").read_text())
    assert [len(examples["examples"]), examples["max_new_tokens"], examples["notes"]] == [3, 3, []]
    memory = json.loads((run / "memory.json").read_text())
    assert 0 <= memory["peak_bytes_above_model"] < memory["peak_bytes"]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["max_steps"] == 2
    assert "hub_token" not in recipe
    for name in ("prefill", "decision", "the rest"):
        assert f" {name} " in f" {' '.join(parsed.texts['time'].split())} "

    # The recipe runs as it is.
    assert main(["train", str(run / "recipe.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    losses = []
    for folder in (run, tmp_path / "again"):
        state = json.loads((folder / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("tier", ["1", "3"])
def test_other_tiers_and_no_held_out_samples(assets: list[str], tier: str, tmp_path: Path) -> None:
    assert main(["train", *assets, "--tier", tier, "--output_dir", str(tmp_path)]) == 0
    texts = {
        name: " ".join(text.split()) for name, text in Parsed((tmp_path / "report.html").read_text()).texts.items()
    }
    assert " forward, backward " in texts["time"]
    assert "all tokens carried gradient" in texts["tokens"]
    assert "there are no held-out samples" in texts["examples"]


def test_report_and_examples_can_be_left_out(assets: list[str], tmp_path: Path) -> None:
    off = ["--write_report", "false", "--num_examples", "0"]
    assert main(["train", *assets, *off, "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "trainer_state.json").is_file()
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "examples.json").exists()


@pytest.mark.parametrize(
    ("field", "message"), [("--num_examples", "`num_examples` must be 0"), ("--max_example_tokens", "1 token or more")]
)
def test_settings_out_of_range_are_refused_before_training(
    assets: list[str], field: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *assets, field, "-1", "--output_dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "trainer_state.json").exists()


def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(
        tmp_path / "run", memory__json=None, plan__json="{", evaluation__json=None, merge_report__json=None
    )
    (tmp_path / "probes.json").write_text(json.dumps(files()["evaluation.json"]))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "merge_report.json").write_text(json.dumps(files()["merge_report.json"]))
    output = tmp_path / "page.html"
    more = ["--probes", str(tmp_path / "probes.json"), "--merged", str(tmp_path / "merged"), "--output", str(output)]
    assert main(["report", str(run), *more]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Written to {output}.",
        "  not there: memory.json",
        "  plan.json, line 1, column 2: not JSON: Expecting property name enclosed in double quotes",
    ]
    texts = Parsed(output.read_text(encoding="utf-8")).texts
    assert "90.0%" in texts["probes"]
    assert "90.0%" in texts["merged"]
    assert not (run / "report.html").exists()


def test_what_cannot_be_used_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cases = {
        ("report", str(tmp_path / "none")): f"no folder {tmp_path / 'none'}",
        ("report", str(tmp_path / "file")): "is a file; give the folder of a run",
        ("report", str(tmp_path), "--output", str(tmp_path)): "is a folder; give the name of a file",
        ("report", str(tmp_path), "--output", str(tmp_path / "no" / "x.html")): f"no folder {tmp_path / 'no'}",
        ("report", str(tmp_path), "--probes", str(tmp_path / "none.json")): f"no file {tmp_path / 'none.json'}",
    }
    for arguments, message in cases.items():
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_gives_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"not there: {name}" in printed for name in files())
    assert tuple(Parsed((tmp_path / "report.html").read_text()).texts) == SECTIONS

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from frozen_peft.cli import main
from tests.merging.cases import Case, preset, save_case
from tests.training.runs import word_tokenizer, words


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    base, adapter = save_case(Case("qwen3_5_text", preset()), tmp_path)
    word_tokenizer().save_pretrained(base)
    return base, adapter


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_merges_verifies_and_scores_probes(made, tmp_path: Path, capsys) -> None:
    base, adapter = made
    samples = [{"prompt": words(8, seed=seed), "completion": " " + words(3, seed=9 + seed)} for seed in range(2)]
    probes = [{"prompt": words(8, seed=seed), "preferred": " w1 w2", "rejected": " w3 w4"} for seed in range(3)]
    arguments = ["merge", str(adapter), str(tmp_path / "merged"), "--base", str(base), "--verify"]
    arguments += ["--samples", write(tmp_path / "samples.jsonl", samples)]
    arguments += ["--probes", write(tmp_path / "accept.jsonl", probes)]
    # Two sets of one name, each in the folder of its adapter.
    for number in (1, 2):
        (tmp_path / f"a{number}").mkdir()
        arguments.append(write(tmp_path / f"a{number}" / "probes.jsonl", probes[:number]))
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["verification"]["samples"] == 2
    figures = report["probes"]["accept.jsonl"]["target"]
    assert figures["preference"]["total"] == 3
    assert f"{figures['preference']['num']} of 3 preferred" in printed
    totals = {name: kinds["target"]["preference"]["total"] for name, kinds in report["probes"].items()}
    assert totals == {
        "accept.jsonl": 3,
        **{str(tmp_path / f"a{number}" / "probes.jsonl"): number for number in (1, 2)},
    }
    for title in ("merged model", "verified", "decisions", "recovery", "accept.jsonl, target"):
        assert f"  {title} " in printed


def test_takes_the_base_that_the_adapter_names(made, tmp_path: Path, capsys) -> None:
    base, adapter = made
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] in ("", None)
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 2
    assert "say which with `base`" in capsys.readouterr().err
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--no-verify", "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_writes_the_adapter_for_the_other_class(made, tmp_path: Path, capsys) -> None:
    _, adapter = made
    assert main(["merge", str(adapter), str(tmp_path / "wrapper"), "--layout", "wrapper"]) == 0
    names = load_file(tmp_path / "wrapper" / "adapter_model.safetensors")
    assert names
    assert all(name.startswith("base_model.model.model.language_model.") for name in names)
    assert main(["merge", str(adapter), str(tmp_path / "other"), "--layout", "text", "--dtype", "bf16"]) == 2
    assert "--dtype has no effect" in capsys.readouterr().err


def test_what_cannot_be_used_is_one_message(made, tmp_path: Path, capsys) -> None:
    base, adapter = made
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert main(["merge", str(adapter), str(tmp_path / "full"), "--base", str(base)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert main(["merge", str(tmp_path / "nothing"), str(tmp_path / "merged"), "--base", str(base)]) == 2
    assert "there is no folder" in capsys.readouterr().err
    empty = write(tmp_path / "empty.jsonl", [])
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--base", str(base), "--samples", empty]) == 2
    assert "the file has no samples" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft evaluate` on files: the table, the report, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from frozen_peft.cli import main
from frozen_peft.data import strip_instructions
from frozen_peft.evaluation import Probe, compare_probes, load_model, probe_table, summarize
from frozen_peft.evaluation.intervals import wilson_proportion
from tests.tiny_models import add_lora, tiny_model
from tests.training.runs import word_tokenizer, words


def row(seed: int, **fields: object) -> dict[str, Any]:
    prompt = [{"role": "system", "content": "<instruction>w1 w2</instruction>"}]
    prompt += [{"role": "user", "content": words(20 + seed, seed=seed)}]
    return {"prompt": prompt, "preferred": words(2, seed=-seed - 1), "rejected": words(4, seed=seed + 100), **fields}


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter of it, and probes of both kinds."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = tiny_model("qwen3_5_text")
    model.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    add_lora(model).save_pretrained(folder / "adapter")
    targets = [strip_instructions(row(seed, expected="w5")) for seed in range(4)]
    controls = [row(seed, kind="control", id=f"control {seed}") for seed in range(4, 7)]
    write_rows(folder / "probes.jsonl", targets + controls)
    return folder


def evaluate(folder: Path, *more: str, probes: str = "probes.jsonl") -> int:
    return main(["evaluate", "--model", str(folder / "base"), "--probes", str(folder / probes), *more])


def test_report_and_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.json"
    assert evaluate(folder, "--adapter", str(folder / "adapter"), "--output", str(output), "--batch_size", "5") == 0
    printed = capsys.readouterr().out
    report = json.loads(output.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert report["probes"] == {"target": 4, "control": 3}
    assert report["base"] == str(folder / "base")
    assert report["adapter"] == str(folder / "adapter")
    assert report["left_out"] == []
    conditions = ["given", "instructed", "shuffled", "empty"]
    expected = [("target", condition, model) for condition in conditions for model in ("base", "adapted")]
    # No control probe has instructions to put back.
    expected += [
        ("control", name, model) for name in conditions if name != "instructed" for model in ("base", "adapted")
    ]
    assert [(one["kind"], one["condition"], one["model"]) for one in report["results"]] == expected
    for one in report["results"]:
        scores = [
            score
            for score in report["scores"]
            if all(score[name] == one[name] for name in ("kind", "condition", "model"))
        ]
        assert len(scores) == one["num_probes"] == (4 if one["kind"] == "target" else 3)
        margins = [score["preferred_logprob"] - score["rejected_logprob"] for score in scores]
        wilson = wilson_proportion(sum(margin > 0 for margin in margins), len(margins))
        assert one["preference"] == vars(wilson)
        assert one["margin"]["mean"] == pytest.approx(sum(margins) / len(margins))
        assert one["margin"]["low"] <= one["margin"]["mean"] <= one["margin"]["high"]
        assert one["margin_per_token"]["total"] == len(scores)
        assert (one["exact_match"] is not None) == (one["kind"] == "target")
        assert (one["kl_to_base"] is not None) == (one["kind"] == "control" and one["model"] == "adapted")
    assert report["notes"] == ["instructed: left out for 3 control probes, which have no `stripped` instructions."]
    assert set(report["measures"]) < set(report["results"][0])

    lines = printed.splitlines()
    rows = lines[: lines.index("")]
    assert len(rows) == 1 + len(report["results"])
    starts = [rows[0].index(title) for title in ("context", "model", "n ", "preferred", "margin", "exact", "KL")]
    assert all(line[start - 1] == " " and line[start : start + 1].strip() for line in rows for start in starts[:3])
    assert [line.split()[:3] for line in rows[1:]] == [list(one) for one in expected]
    assert f"Written to {output}." in printed


def test_the_base_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(folder, "--conditions", "given", "empty") == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:5]]
    assert rows == [[kind, name, "base"] for kind in ("target", "control") for name in ("given", "empty")]


def test_bad_probes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, same = row(0), {**row(1), "rejected": row(1)["preferred"]}
    nothing = {**row(2), "preferred": " "}
    probes = write_rows(tmp_path / "bad.jsonl", [good, "{\n", same, nothing])
    output = tmp_path / "report.json"
    options = ["--conditions", "given", "--output", str(output)]
    arguments = ["evaluate", "--model", str(folder / "base"), "--probes", str(probes), *options]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"frozen-peft evaluate: {probes}, line 2: ")
    assert error.count("\n") == 1
    assert not output.exists()
    assert main([*arguments, "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(output.read_text(encoding="utf-8"))
    assert [problem.partition(": ")[0] for problem in report["left_out"]] == [
        f"{probes}, line {line}" for line in (2, 3, 4)
    ]
    assert all(f"left out: {problem}" in printed for problem in report["left_out"])
    assert [score["id"] for score in report["scores"]] == ["line 1"]


def test_nothing_is_written_where_scoring_fails(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probes = write_rows(tmp_path / "long.jsonl", [row(0, preferred=words(5000, seed=1))])
    output = tmp_path / "report.json"
    code = main(["evaluate", "--model", str(folder / "base"), "--probes", str(probes), "--output", str(output)])
    assert code == 2
    assert "line 1: `preferred` (given): " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [probes]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "no/such/folder/report.json"], "there is no folder"),
        (["--output", "."], "is a folder"),
        (["--adapter", "no/such/adapter"], "there is no folder no/such/adapter"),
        (["--batch_size", "0"], "`batch_size` must be 1"),
    ],
)
def test_arguments_that_cannot_be_used(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, "--conditions", "given", *options) == 2
    assert message in capsys.readouterr().err
    assert main(["evaluate", "--model", "x", "--probes", "no/such/probes.jsonl"]) == 2
    assert "no file no/such/probes.jsonl" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    deeper = tiny_model("llama", num_hidden_layers=5)
    deeper.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    add_lora(tiny_model("llama")).save_pretrained(tmp_path / "shallow")
    add_lora(tiny_model("llama", num_hidden_layers=6)).save_pretrained(tmp_path / "deep")
    config = json.loads((tmp_path / "shallow" / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    for name in ("shallow", "deep"):
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"shallow lacks weights that LlamaForCausalLM has a place for: 14 of 56"):
        load_model(str(tmp_path / "base"), str(tmp_path / "shallow"))
    with pytest.raises(ValueError, match=r"deep has weights that nothing of LlamaForCausalLM asks for: 14 of 84"):
        load_model(str(tmp_path / "base"), str(tmp_path / "deep"))


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_weights_that_are_pickles_need_the_flag(
    which: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safe, pickled = {
        "base": ("model.safetensors", "pytorch_model.bin"),
        "adapter": ("adapter_model.safetensors", "adapter_model.bin"),
    }[which]
    shutil.copytree(folder, tmp_path / "made")
    torch.save(load_file(tmp_path / "made" / which / safe), tmp_path / "made" / which / pickled)
    (tmp_path / "made" / which / safe).unlink()
    # Other tensors beside it do not make it a safe one.
    save_file({"x": torch.ones(1)}, tmp_path / "made" / which / "other.safetensors")
    options = ["--adapter", str(tmp_path / "made" / "adapter"), "--conditions", "given"]
    assert evaluate(tmp_path / "made", *options) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'made' / which / pickled} is a pickle" in message
    assert "(--allow_pickle)" in message
    assert evaluate(tmp_path / "made", *options, "--allow-pickle") == 0
    allowed = capsys.readouterr().out
    assert evaluate(folder, "--adapter", str(folder / "adapter"), "--conditions", "given") == 0
    assert capsys.readouterr().out == allowed


def test_a_loaded_model_is_the_saved_one(folder: Path) -> None:
    model, tokenizer = load_model(str(folder / "base"), str(folder / "adapter"))
    tokens = torch.tensor([[5, 9, 11]])
    expected = add_lora(tiny_model("qwen3_5_text"))(input_ids=tokens).logits
    assert torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-6)
    assert tokenizer("w1")["input_ids"] == word_tokenizer()("w1")["input_ids"]


def test_a_single_probe_has_no_interval_of_means() -> None:
    only = Probe([{"role": "user", "content": "w1"}], "w2", "w3 w4", "control")
    (result,) = compare_probes(tiny_model("llama"), word_tokenizer(), [only], ["given"])
    figures = summarize(result)["control"]
    assert (figures.margin.low, figures.margin.high, figures.margin.total) == (None, None, 1)
    first = probe_table([result]).splitlines()[1]
    assert first.split()[:4] == ["control", "given", "base", "1"]
    assert first.endswith("-")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from frozen_peft.cli import main\n"
        "try: main(['evaluate', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--probes", "instructed", "shuffled", "Wilson", "--skip_bad"))

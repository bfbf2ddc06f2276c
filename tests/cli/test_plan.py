# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft plan`: its page, its JSON, recipes, and names that do not exist."""

import json
from pathlib import Path

import pytest

from frozen_peft.cli import main
from tests.tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").config.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_page_has_a_column_for_each_way_of_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "plan.json"
    arguments = ["--model", str(folder), "--gpu", "24GB", "--context-length", "2000", "--decision-length", "64"]
    assert main(["plan", *arguments, "--sequence-chunk-size", "512", "--json", str(written)]) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith(("weights", "total", "fits", "longest"))]
    assert [len(line.removeprefix("longest context").split()) for line in table] == [7, 7, 7, 6]
    assert "tier 2: It fits" in printed
    # Of a tiny model, where GiB would be zeros.
    assert "MiB on the device" in printed
    plans = json.loads(written.read_text())["plans"]
    assert [plan["setting"]["tier"] for plan in plans] == [None, 1, 2, 3, 3, 3]
    totals = [line.split()[1:] for line in table if line.startswith("total")]
    assert totals == [[f"{plan['total_bytes'] / 2**20:.0f}" for plan in plans]]
    for plan in plans:
        assert plan["total_bytes"] == sum(plan["terms"].values())
        assert plan["fits"] is True
        assert plan["longest_context"] >= 2000
        assert plan["memory_limit_bytes"] == 24 << 30


def test_a_recipe_is_planned_as_it_would_be_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, written = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    recipe.write_text(
        f"model_name_or_path: {folder}\ndataset_name: data.jsonl\noutput_dir: out\ntier: 2\nlora_r: 4\n"
        "prefill_chunk_size: 256\nmax_context_length: 700\n"
    )
    assert main(["plan", str(recipe), "--json", str(written)]) == 0
    (plan,) = json.loads(written.read_text())["plans"]
    setting = plan["setting"]
    assert (setting["tier"], setting["lora_r"], setting["prefill_chunk_size"]) == (2, 4, 256)
    assert setting["context_length"] == 700
    assert plan["fits"] is None
    assert "fits" not in capsys.readouterr().out


def test_turns_and_a_teacher_are_planned(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "plan.json"
    arguments = ["--model", str(folder), "--context-length", "300", "--decision-length", "16", "--json", str(written)]
    assert main(["plan", *arguments, "--turns", "4", "--teacher-length", "400"]) == 0
    assert "contexts of 300 tokens, 4 decisions of 16" in capsys.readouterr().out
    plans = json.loads(written.read_text())["plans"]
    assert ["teacher" in plan["terms"] for plan in plans] == [False, True, True, True, True, True]
    assert {plan["setting"]["turns"] for plan in plans} == {4}


def test_turns_and_a_teacher_of_a_recipe(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, written = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    text = f"model_name_or_path: {folder}\ndataset_name: data.jsonl\noutput_dir: out\ntier: 2\n"
    recipe.write_text(text + "decision_mode: turns\nmax_decisions_per_forward: 3\nloss_type: distill\n")
    assert main(["plan", str(recipe), "--context-length", "200", "--turns", "7", "--json", str(written)]) == 0
    setting = json.loads(written.read_text())["plans"][0]["setting"]
    assert (setting["turns"], setting["max_decisions_per_forward"], setting["teacher_length"]) == (7, 3, 200)
    recipe.write_text(text)
    for option, message in (("--turns", "`decision_mode: tail`"), ("--teacher-length", "`loss_type: nll`")):
        assert main(["plan", str(recipe), option, "7"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "Qwen3.5-27B", "--turns", "0"], "`turns` must be 1 or more, found 0"),
        (["--model", "Qwen3.5-27"], "Did you mean Qwen/Qwen3.5-27B"),
        (["--model", "Qwen3.5-27B", "--gpu", "H10"], "no accelerator 'H10'; did you mean H100"),
        (["--model", "Qwen3.5-27B", "--gpu", "banana"], "A size such as 24GB also does"),
        (["--model", "Qwen3.5-27B", "--decision-length", "1"], "`decision_length` must be 2 or more"),
        (["--model", "Qwen3.5-27B", "--preset", "responses"], "Did you mean 'response'"),
        (["--model", "Qwen3.5-27B", "--gpu", "H100", "--rates", "nowhere.json"], "There is no file nowhere.json"),
        ([], "--model is needed, or a recipe"),
        (["nowhere.yaml"], "no recipe nowhere.yaml"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_rates_of_ones_own_are_said_to_be_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates, written = tmp_path / "rates.json", tmp_path / "plan.json"
    seconds = []
    for flops in (1e12, 2e12):
        rates.write_text(json.dumps({"flops_per_second": flops, "source": "a run of mine", "measured": True}))
        arguments = ["--model", str(folder), "--gpu", "H100", "--context-length", "300", "--rates", str(rates)]
        assert main(["plan", *arguments, "--json", str(written)]) == 0
        assert "estimated from measured rates (a run of mine)" in capsys.readouterr().out
        seconds.append(json.loads(written.read_text())["plans"][2]["step_seconds"])
    assert seconds[0] == pytest.approx(2 * seconds[1])


@pytest.mark.parametrize("text", ["[1]", "{", '{"flops": 1}', '{"flops_per_second": 0}', '{"flops_per_second": true}'])
def test_rates_that_are_none(folder: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    rates = tmp_path / "rates.json"
    rates.write_text(text)
    assert main(["plan", "--model", str(folder), "--gpu", "H100", "--rates", str(rates)]) == 2
    assert "rates.json" in capsys.readouterr().err


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    assert "from a model's configuration alone" in capsys.readouterr().out

# SPDX-License-Identifier: Apache-2.0
"""Every recipe parses, says what it must, trains for two steps and goes on from its checkpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from frozen_peft.cli import main
from frozen_peft.cli.recipe_parser import RecipeParser
from frozen_peft.data import strip_instructions
from frozen_peft.data.rows import dump_row
from frozen_peft.utils.recipe_files import read_recipe
from tests.documentation.tokenizer import train_tokenizer
from tests.tiny_models import tiny_model

RECIPE_DIR = Path(__file__).parent.parent / "recipes"
# Those in `accelerate` are for `accelerate launch`; tests/distributed has them.
RECIPES = sorted(path for path in RECIPE_DIR.rglob("*.yaml") if path.parent.name != "accelerate")

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(RECIPE_DIR)))


def test_there_is_a_recipe_for_every_tier() -> None:
    tiers = {read_recipe(path)[0].get("tier") for path in RECIPES}
    assert {1, 2, 3} <= tiers


@every_recipe
def test_recipe_parses(path: Path) -> None:
    values, _ = read_recipe(path)
    parsed = {name: value for group in RecipeParser().parse([str(path)]) for name, value in vars(group).items()}
    assert {name: parsed[name] for name in ("model_name_or_path", "dataset_name", "lora_r", "max_steps")} == {
        name: values[name] for name in ("model_name_or_path", "dataset_name", "lora_r", "max_steps")
    }


@every_recipe
def test_recipe_takes_the_large_model_on_the_command_line(path: Path) -> None:
    arguments = [str(path), "--model_name_or_path", "Qwen/Qwen3.5-27B", "--load_in_4bit", "true"]
    model, *_ = RecipeParser().parse(arguments)
    assert model.model_name_or_path == "Qwen/Qwen3.5-27B"
    assert model.load_in_4bit is True


@every_recipe
def test_recipe_header_gives_command_hardware_and_expectation(path: Path) -> None:
    header = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"#   frozen-peft train {path.stem}\n" in header
    assert "# Hardware: " in header
    assert "# Expect: " in header


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny hybrid with a tokenizer, and stripped samples with contexts of some hundred tokens."""
    folder = tmp_path_factory.mktemp("assets")
    rows = [
        {
            "prompt": [
                {"role": "system", "content": " ".join(f"entry {number * 7 % 31}" for number in range(20 + row))},
                {"role": "system", "content": "<instruction>be brief</instruction>"},
                {"role": "user", "content": f"what is {row}?"},
            ],
            "completion": [{"role": "assistant", "content": f"entry {row} of many"}],
        }
        for row in range(12)
    ]
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([str(rows)], vocab_size=320)
    model = tiny_model("qwen3_5_text", vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    samples = folder / "samples.jsonl"
    samples.write_text("".join(dump_row(strip_instructions(row)) for row in rows), encoding="utf-8")
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": [{"role": "assistant", "content": "none"}]}
        for row in rows
    ]
    paired(str(samples)).write_text("".join(dump_row(strip_instructions(row)) for row in pairs), encoding="utf-8")
    return str(folder / "model"), str(samples)


# A report is made of what the run leaves, and costs more than two steps of a tiny model.
SHORT_EXAMPLE = ("--num_examples", "1", "--max_example_tokens", "4")
NO_PAGE = ("--write_report", "false", "--num_examples", "0")


def paired(samples: str) -> Path:
    """A file of preference pairs, beside that of the samples."""
    return Path(samples).with_name("pairs.jsonl")


def few(samples: str) -> str:
    """A file of the first of the samples, to be evaluated on."""
    path = Path(samples).with_name(f"few_{Path(samples).name}")
    path.write_text("".join(Path(samples).read_text(encoding="utf-8").splitlines(keepends=True)[:4]), encoding="utf-8")
    return str(path)


@every_recipe
@pytest.mark.slow
def test_recipe_trains_two_steps_and_resumes(
    path: Path, assets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir, samples = assets
    if read_recipe(path)[0].get("method") == "dpo":
        samples = str(paired(samples))
    output_dir = tmp_path / "run"
    arguments = ["train", str(path), "--model_name_or_path", model_dir, "--dataset_name", samples]
    arguments += ["--eval_dataset_name", few(samples), "--output_dir", str(output_dir), "--save_steps", "2"]
    arguments += ["--gradient_accumulation_steps", "1", "--logging_steps", "1", *SHORT_EXAMPLE]

    assert main([*arguments, "--max_steps", "2"]) == 0
    summary = capsys.readouterr().out
    assert str(output_dir) in summary
    assert re.search(r"held-out loss +\d+\.\d+ before, \d+\.\d+ after", summary)
    assert (output_dir / "checkpoint-2" / "trainer_state.json").is_file()
    first = (output_dir / "adapter_model.safetensors").read_bytes()

    assert (output_dir / "report.html").is_file()

    # The report is written again by whoever wants it.
    again = ["--max_steps", "3", "--resume_from_checkpoint", "true", "--write_report", "false", "--num_examples", "0"]
    assert main([*arguments, *again]) == 0
    assert re.search(r"held-out loss +\d+\.\d+ after", capsys.readouterr().out)
    state = json.loads((output_dir / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    # Two steps from the first run, one from the second: it went on instead of beginning anew.
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
    assert (output_dir / "adapter_model.safetensors").read_bytes() != first


@pytest.mark.slow
def test_the_step_with_the_least_held_out_loss_is_kept(
    assets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir, samples = assets
    arguments = ["train", str(RECIPE_DIR / "tier2_behavior.yaml"), "--model_name_or_path", model_dir]
    arguments += ["--dataset_name", samples, "--eval_dataset_name", few(samples), "--output_dir", str(tmp_path)]
    arguments += ["--gradient_accumulation_steps", "1", "--warmup_steps", "0", "--max_steps", "2", *NO_PAGE]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--save_total_limit", "3"]
    # So large that the second step makes it worse.
    arguments += ["--learning_rate", "1", "--max_grad_norm", "100", "--load_best_model_at_end", "true"]
    assert main(arguments) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(range(1, 3), key=lambda step: losses[step])
    summary = capsys.readouterr().out
    assert re.search(rf"kept +step {best} of 2, with the best loss", summary)
    assert ("max_steps" in summary) == (best == 2)
    after = json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"]
    assert after == pytest.approx(losses[best], rel=1e-6)
    saved, kept = (folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / f"checkpoint-{best}"))
    assert saved.read_bytes() == kept.read_bytes()


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_uninterrupted_one(assets: tuple[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model_dir, samples = assets
    arguments = ["train", str(RECIPE_DIR / "tier2_behavior.yaml"), "--model_name_or_path", model_dir]
    arguments += ["--dataset_name", samples, "--eval_dataset_name", few(samples), "--max_steps", "4"]
    arguments += ["--gradient_accumulation_steps", "1", "--save_steps", "2", "--save_total_limit", "5", *NO_PAGE]

    assert main([*arguments, "--output_dir", str(tmp_path / "whole")]) == 0
    half = str(tmp_path / "whole" / "checkpoint-2")
    assert main([*arguments, "--output_dir", str(tmp_path / "rest"), "--resume_from_checkpoint", half]) == 0
    whole, resumed = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "rest"))
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


@pytest.mark.slow
@pytest.mark.distributed
def test_a_launch_on_two_processes_trains_what_one_process_does(assets: tuple[str, str], tmp_path: Path) -> None:
    """By the documented command, on a CPU: held-out loss before training, two steps, the adapter, the report."""
    from safetensors.torch import load_file

    model_dir, samples = assets
    arguments = ["train", str(RECIPE_DIR / "tier2_behavior.yaml"), "--model_name_or_path", model_dir]
    arguments += ["--dataset_name", samples, "--eval_dataset_name", few(samples), "--use_cpu", "true"]
    arguments += ["--max_steps", "2", *SHORT_EXAMPLE]
    # Adam would make whole steps of what rounding leaves of a gradient.
    arguments += ["--optim", "sgd", "--learning_rate", "0.1", "--logging_steps", "1", "--bf16", "false"]
    single = [*arguments, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")]
    assert main(single) == 0

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--config_file", str(RECIPE_DIR / "accelerate" / "ddp.yaml"), "-m", "frozen_peft", *arguments]
    launch += ["--gradient_accumulation_steps", "1", "--output_dir", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    # The summary is written once.
    assert done.stdout.count("held-out loss") == 1

    states = [json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"] for run in ("one", "two")]
    for name in ("loss", "grad_norm", "eval_loss"):
        one, two = ([entry[name] for entry in state if name in entry] for state in states)
        assert one, name
        assert two == pytest.approx(one, rel=1e-4), name
    one, two = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)
    names = [{file.name for file in (tmp_path / run).iterdir()} for run in ("one", "two")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_held_out_data_is_optional(
    assets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir, samples = assets
    arguments = ["train", str(RECIPE_DIR / "tier2_behavior.yaml"), "--model_name_or_path", model_dir]
    arguments += ["--dataset_name", samples, "--max_steps", "1", "--output_dir", str(tmp_path / "run"), *NO_PAGE]
    assert main(arguments) == 0
    assert "held-out" not in capsys.readouterr().out
    assert main([*arguments, "--eval_on_start", "true"]) == 2
    assert "`eval_on_start` needs held-out samples" in capsys.readouterr().err


@pytest.mark.slow
def test_a_malformed_dataset_is_refused_before_training(
    assets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir, samples = assets
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(samples).read_text() + "{not json}\n")
    arguments = ["train", str(RECIPE_DIR / "tier2_behavior.yaml"), "--model_name_or_path", model_dir]
    assert main([*arguments, "--dataset_name", str(broken), "--output_dir", str(tmp_path / "run")]) == 2
    assert f"{broken}, line 13, column 2: not JSON" in capsys.readouterr().err


@pytest.mark.slow
def test_four_bit_base_trains_on_a_cpu(assets: tuple[str, str], tmp_path: Path) -> None:
    model_dir, samples = assets
    arguments = ["train", str(RECIPE_DIR / "tier2_behavior.yaml"), "--model_name_or_path", model_dir]
    arguments += ["--dataset_name", samples, "--max_steps", "1", "--output_dir", str(tmp_path / "run"), *NO_PAGE]
    assert main([*arguments, "--load_in_4bit", "true"]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_four_bit_weights_cannot_be_trained(assets: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    model_dir, samples = assets
    arguments = ["train", "--model_name_or_path", model_dir, "--dataset_name", samples, "--output_dir", "unused"]
    assert main([*arguments, "--load_in_4bit", "true", "--use_peft", "false"]) == 2
    assert "`load_in_4bit` needs `use_peft: true`" in capsys.readouterr().err


@pytest.mark.slow
def test_answers_are_trained_by_kto(assets: tuple[str, str], tmp_path: Path) -> None:
    """Pairs are taken apart, and answers of one's own have a label."""
    model_dir, samples = assets
    labelled = tmp_path / "answers.jsonl"
    rows = [
        json.loads(line) | {"label": number % 2 == 0}
        for number, line in enumerate(Path(samples).read_text().splitlines())
    ]
    labelled.write_text("".join(map(dump_row, rows)), encoding="utf-8")
    for name in (paired(samples), labelled):
        arguments = ["train", "--method", "kto", "--model_name_or_path", model_dir, "--dataset_name", str(name)]
        arguments += ["--per_device_train_batch_size", "4", "--max_steps", "2", "--logging_steps", "1", *NO_PAGE]
        assert main([*arguments, "--output_dir", str(tmp_path / name.stem)]) == 0
        state = json.loads((tmp_path / name.stem / "trainer_state.json").read_text())
        assert [entry["kl"] >= 0 for entry in state["log_history"] if "loss" in entry] == [True, True]


@pytest.mark.slow
@pytest.mark.distributed
def test_preferences_on_two_processes_are_those_of_one(assets: tuple[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model_dir, samples = assets
    arguments = ["train", str(RECIPE_DIR / "preference_dpo.yaml"), "--model_name_or_path", model_dir]
    arguments += ["--dataset_name", str(paired(samples)), "--eval_dataset_name", few(str(paired(samples)))]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--max_steps", "4", "--logging_steps", "1", *NO_PAGE]
    arguments += ["--optim", "sgd", "--learning_rate", "0.5", "--beta", "1.0", "--warmup_steps", "0"]
    assert main([*arguments, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--config_file", str(RECIPE_DIR / "accelerate" / "ddp.yaml"), "-m", "frozen_peft", *arguments]
    launch += ["--gradient_accumulation_steps", "1", "--output_dir", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    states = [json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"] for run in ("one", "two")]
    for name in ("loss", "rewards/margins", "logps/chosen", "eval_loss"):
        one, two = ([entry[name] for entry in state if name in entry] for state in states)
        assert one, name
        # Of a margin that is none yet, rounding is all there is.
        assert two == pytest.approx(one, rel=1e-4, abs=2e-5), name
    margins = [entry["rewards/margins"] for entry in states[0] if "rewards/margins" in entry]
    assert abs(margins[-1]) > 1e-3
    one, two = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "method", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "dpo", "trains `chosen` and `rejected`; found `prompt`, `chosen`"),
        ({"prompt": "a", "completion": "b"}, "dpo", "`method: dpo` trains `chosen` and `rejected`"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "dpo", "`rejected` is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}, "dpo", "the same form"),
        ({"prompt": "a", "completion": "b"}, "kto", "`label` is true or false"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "sft", "are trained with `method: dpo`"),
    ],
)
def test_rows_are_those_of_the_method(
    row: object, method: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    arguments = ["train", "--method", method, "--model_name_or_path", "demo", "--dataset_name", str(path)]
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


def test_each_method_has_its_own_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--method", "dpo", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--beta" in said
    assert "--context_cache_size" in said
    assert main(["train", "tier2_behavior", "--beta", "0.1"]) == 2
    assert "unknown field `beta`" in capsys.readouterr().err
    assert main(["train", "--method", "ppo"]) == 2
    assert "`method` takes one of sft, dpo, kto; got 'ppo'" in capsys.readouterr().err
    assert main(["inspect", "preference_dpo"]) == 2
    assert "the gradient of a likelihood" in capsys.readouterr().err
    assert main(["plan", "preference_dpo"]) == 0

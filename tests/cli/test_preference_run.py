# SPDX-License-Identifier: Apache-2.0
"""A run of `method: dpo` or `kto`, and what the other commands make of its folder."""

import json
from pathlib import Path

import pytest

from frozen_peft.cli import main
from frozen_peft.data.rows import dump_row
from tests.report.reading import Parsed
from tests.tiny_models import tiny_model
from tests.training.runs import word_tokenizer, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs to train, probes apart from them, and a recipe."""
    folder = tmp_path_factory.mktemp("preferences")
    tiny_model("qwen3_5_text").save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    probes = [
        {"prompt": words(30 + seed, seed=seed) + " ", "preferred": words(3, seed=50), "rejected": words(3, seed=60)}
        for seed in range(10)
    ]
    (folder / "all.jsonl").write_text("".join(map(dump_row, probes)))
    (folder / "probes.jsonl").write_text("".join(map(dump_row, probes[:4])))
    arguments = [str(folder / name) for name in ("all.jsonl", "pairs.jsonl", "probes.jsonl")]
    assert main(["pairs", *arguments[:2], "--apart-from", arguments[2]]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("method", "batch_size"), [("dpo", 2), ("kto", 12)])
def test_what_a_run_of_preferences_leaves_is_known(
    method: str, batch_size: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = tmp_path / "run", str(folder / "base")
    fields = {
        "method": method,
        "model_name_or_path": base,
        "dataset_name": folder / "pairs.jsonl",
        "output_dir": run,
        "tier": 2,
        "beta": 0.5,
        "max_steps": 12,
        "learning_rate": 0.05,
        "per_device_train_batch_size": batch_size,
        "logging_steps": 1,
        "save_strategy": "'no'",
        "num_examples": 1,
        "max_example_tokens": 3,
        "use_cpu": "true",
        "bf16": "false",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))

    # Planned before, by the recipe, and again by the run.
    assert main(["plan", str(recipe), "--json", str(tmp_path / "plan.json")]) == 0
    (planned,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert planned["setting"]["batch"] == 2 * batch_size
    assert main(["train", str(recipe)]) == 0
    ran = json.loads((run / "plan.json").read_text())["setting"]
    assert (ran["batch"], ran["tier"]) == (2 * batch_size, 2)
    assert 30 <= ran["context_length"] <= 40
    state = json.loads((run / "trainer_state.json").read_text())["log_history"]
    margins = [entry["rewards/margins"] for entry in state if "rewards/margins" in entry]
    assert margins[-1] > margins[0] + 0.5

    # What was preferred in training is preferred in contexts that were not in it.
    output = tmp_path / "evaluation.json"
    arguments = ["--model", base, "--adapter", str(run), "--probes", str(folder / "probes.jsonl")]
    assert main(["evaluate", *arguments, "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    scores = {one["model"]: one["margin"]["mean"] for one in results if one["condition"] == "given"}
    assert scores["adapted"] > scores["base"] + 0.5

    # The gradient of a likelihood is measured on samples, at the adapters that preferences have trained.
    capsys.readouterr()
    assert main(["inspect", str(recipe)]) == 2
    assert "the gradient of a likelihood" in capsys.readouterr().err
    samples = tmp_path / "samples.jsonl"
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    samples.write_text("".join(dump_row({"prompt": row["prompt"], "completion": row["chosen"]}) for row in rows))
    likelihood = tmp_path / "likelihood.yaml"
    kept = {name: fields[name] for name in ("model_name_or_path", "output_dir", "tier", "use_cpu", "bf16")}
    likelihood.write_text("".join(f"{name}: {value}\n" for name, value in kept.items()) + f"dataset_name: {samples}\n")
    flow = ["--adapter", str(run), "--samples", "2", "--output", str(run / "gradient_flow.json")]
    assert main(["inspect", str(likelihood), *flow]) == 0

    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    text = " ".join(Parsed(page).texts["loss"].split())
    assert f"Loss, that of {method.upper()}" in text
    assert "nats per token" not in text
    assert "reward margin" in page

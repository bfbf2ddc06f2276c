# SPDX-License-Identifier: Apache-2.0
"""The demo's claims, measured as a user would have them measured: by what was installed, outside a checkout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from frozen_peft import merge_adapter
from frozen_peft.cli import main
from frozen_peft.demo import CHECKPOINT, DemoData, job
from frozen_peft.demo.results_table import percent, render_table
from tests.installed_package import InstalledPackage
from tests.made_once import made_once
from tests.serving import served


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# The command as it is, but for tier 3, which takes twice as long as all the rest.
WITHOUT_TIER_3 = """
import sys
from frozen_peft.cli import main
from frozen_peft.demo import job

del job.RECIPE_OF_TIER[3]
sys.exit(main(sys.argv[1:]))
"""


def run_installed(package: InstalledPackage, folder: Path, *command: str) -> None:
    done = package.run(*command, "demo", "--output", "out", cwd=folder)
    # Nothing that a newcomer has to read past.
    assert done.stderr == ""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, installed_package: InstalledPackage) -> tuple[Path, dict[str, Any]]:
    folder = made_once(
        tmp_path_factory,
        "demo",
        lambda folder: run_installed(installed_package, folder, "python", "-c", WITHOUT_TIER_3),
    )
    return folder / "out", json.loads((folder / "out" / "demo.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_disposition_moves_into_the_weights(run: tuple[Path, dict[str, Any]]) -> None:
    _, results = run
    assert results["acceptance_before"] <= 0.10
    assert results["acceptance_after"] >= 0.95
    assert results["acceptance_with_instructions"] >= 0.95
    assert abs(results["control_after"] - results["control_before"]) <= 0.02
    assert results["control_before"] >= 0.9
    require_figures(results, {"tier_1", "tier_2"})


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_demo_of_all_tiers(tmp_path: Path, installed_package: InstalledPackage) -> None:
    run_installed(installed_package, tmp_path, "frozen-peft")
    results = json.loads((tmp_path / "out" / "demo.json").read_text(encoding="utf-8"))
    require_figures(results, {"tier_1", "tier_2", "tier_3"})


@pytest.mark.slow
def test_a_small_demo_of_all_tiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 1}
    monkeypatch.setattr(job, "OVERRIDES", job.OVERRIDES | small)
    results = job.run_demo(tmp_path, DemoData(num_scenes=4, num_probed=2, num_prompts=1))
    require_figures(results, {"tier_1", "tier_2", "tier_3"})
    assert json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["tiers"] == results["tiers"]
    printed = capsys.readouterr().out
    assert all(f"tier {tier}" in printed for tier in (1, 2, 3))


def require_figures(results: dict[str, Any], tiers: set[str]) -> None:
    assert set(results["tiers"]) == tiers
    for tier in results["tiers"].values():
        assert {"acceptance_before", "acceptance_after", "control_before", "control_after", "seconds"} <= set(tier)
        assert tier["seconds"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_merged_model_is_the_adapted_one(run: tuple[Path, dict[str, Any]]) -> None:
    output, results = run
    assert results["merged"]["same_decisions"] == 1
    assert results["merged"]["largest_difference"] < 1e-3
    assert results["merged"]["acceptance"] == results["acceptance_after"]
    # What was measured is what plain generation with the merged model gives.
    model, tokenizer = (kind.from_pretrained(output / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    probes = read_lines(output / "probes.jsonl")
    accepted = 0
    targets = [probe for probe in probes if probe["kind"] == "target"][:20]
    for probe in targets:
        inputs = tokenizer.apply_chat_template(
            probe["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        accepted += tokenizer.decode(tokens) == f" {probe['preferred']}<|end|>"
    assert accepted >= 18


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_answers_as_the_probes_of_the_merged_model_measured(
    run: tuple[Path, dict[str, Any]], tmp_path
) -> None:
    output, _ = run
    directions, questions = probes_of(output)
    accepted = check_served(output / "merged", [*directions[:16], *questions[:4]], tmp_path)
    assert accepted >= 0.9


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tier", [1, 2])
def test_a_server_answers_every_probe_as_measured(run: tuple[Path, dict[str, Any]], tier: int, tmp_path) -> None:
    """Tier 1 leaves some directions unaccepted: the server has to leave the same ones."""
    output, results = run
    merged = output / "merged"
    if tier == 1:
        merged = tmp_path / "merged"
        merge_adapter(output / "tier_1", merged, CHECKPOINT)
    accepted = check_served(merged, [row for rows in probes_of(output) for row in rows], tmp_path)
    assert accepted == results["tiers"][f"tier_{tier}"]["acceptance_after"]


def probes_of(output: Path) -> tuple[list[dict[str, Any]], ...]:
    """The demo's held-out directions and questions, without instructions."""
    probes = read_lines(output / "probes.jsonl")
    return tuple([probe for probe in probes if probe["kind"] == kind] for kind in ("target", "control"))


def check_served(model: Path, probes: list[dict[str, Any]], folder: Path) -> float:
    """Asks a server each probe, and compares with `frozen-peft evaluate`.

    Returns:
        The share of directions that the server accepts.
    """
    asked, measured, prompts, answers = (folder / name for name in ("asked", "measured", "prompts", "answers"))
    asked.write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    prompts.write_text("".join(json.dumps({"prompt": probe["prompt"]}) + "\n" for probe in probes))
    arguments = ["--model", str(model), "--probes", str(asked), "--conditions", "given", "--output", str(measured)]
    assert main(["evaluate", *arguments]) == 0
    report = json.loads(measured.read_text())
    with served(model, folder / "server.log") as url:
        options = ["--model", str(model), "--endpoint", url, "--temperature", "0", "--num_candidates", "1"]
        assert main(["sample", str(prompts), str(answers), *options, "--max_new_tokens", "24"]) == 0
    said = [row["completion"][0]["content"] for row in read_lines(answers)]
    assert len(said) == len(probes) == len(report["scores"])
    for probe, score, text in zip(probes, report["scores"], said, strict=True):
        assert score["id"] == probe["id"]
        assert (text == probe["expected"]) == score["is_exact"], (probe["id"], text)
    accepted = [
        text == probe["expected"] for probe, text in zip(probes, said, strict=True) if probe["kind"] == "target"
    ]
    rates = {result["kind"]: result["exact_match"]["rate"] for result in report["results"]}
    assert sum(accepted) / len(accepted) == rates["target"]
    return rates["target"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_training_sample_holds_the_instruction_or_what_probes_ask_about(run: tuple[Path, dict[str, Any]]) -> None:
    output, _ = run
    stripped, probes = read_lines(output / "stripped.jsonl"), read_lines(output / "probes.jsonl")
    assert all("<instruction>" not in message["content"] for row in stripped for message in row["prompt"])
    assert all(row["stripped"] for row in stripped)
    trained = {row["completion"][0]["content"] for row in stripped}
    assert not trained & {probe["preferred"] for probe in probes}


def test_the_table_aligns_and_says_what_was_measured() -> None:
    tier = {"acceptance_after": 0.975, "control_after": 1.0, "train_seconds": 12.3}
    results = {
        "acceptance_before": 0.01,
        "control_before": 0.99,
        "acceptance_with_instructions": 1.0,
        "control_with_instructions": 0.99,
        "tiers": {"tier_1": tier, "tier_2": tier},
        "merged": {"acceptance": 0.975, "control": 1.0},
        "probes": {"target": 100, "control": 100},
        "weights": 927620,
        "settings": {"steps": 24},
        "seconds": 150.0,
    }
    lines = render_table(results, Path("somewhere")).splitlines()
    table = lines[1:7]
    assert len({line.rindex("%") for line in table[1:]}) <= 2
    assert len({len(line) for line in table}) == 1
    assert any("tier 2" in line and "97.5%" in line and line.endswith("12") for line in table)
    assert percent(0.5) == "50%"
    assert percent(0.985) == "98.5%"

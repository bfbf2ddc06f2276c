# SPDX-License-Identifier: Apache-2.0
"""The demo's claims, measured as a user would have them measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from frozen_peft.cli import main
from frozen_peft.demo.table import percent, render_table


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--output", str(output)]) == 0
    return output, json.loads((output / "demo.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_disposition_moves_into_the_weights(run: tuple[Path, dict[str, Any]]) -> None:
    _, results = run
    assert results["acceptance_before"] <= 0.10
    assert results["acceptance_after"] >= 0.95
    assert results["acceptance_with_instructions"] >= 0.95
    assert abs(results["control_after"] - results["control_before"]) <= 0.02
    assert results["control_before"] >= 0.9
    assert set(results["tiers"]) == {"tier_1", "tier_2", "tier_3"}
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
    table = lines[1:8]
    assert len({line.rindex("%") for line in table[2:]}) <= 2
    assert len({len(line) for line in table}) == 1
    assert any("tier 2" in line and "97.5%" in line and line.endswith("12") for line in table)
    assert percent(0.5) == "50%"
    assert percent(0.985) == "98.5%"

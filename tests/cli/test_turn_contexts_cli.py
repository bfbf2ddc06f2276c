# SPDX-License-Identifier: Apache-2.0
"""Traces of an agent through every command: stripped, planned, inspected, trained, reported, and asked about."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_peft.cli import main
from frozen_peft.data import restore_instructions
from tests.reference import token_logprobs
from tests.tiny_models import tiny_model
from tests.training.traces import TOOLS, TRACE_VOCABULARY, rendered_turns, template_tokenizer, trace

RECIPE = """model_name_or_path: {folder}/base
dataset_name: {folder}/stripped.jsonl
eval_dataset_name: {folder}/stripped.jsonl
output_dir: {folder}/out
tier: 2
decision_mode: turns
turn_contexts: inference
lora_r: 2
max_steps: 1
use_cpu: true
bf16: false
report_to: none
logging_steps: 1
num_examples: 1
max_example_tokens: 4
per_device_train_batch_size: 1
per_device_eval_batch_size: 1
"""


def instructed(**fields: Any) -> dict[str, Any]:
    row = trace(**fields)
    row["messages"][0]["content"] = "<instruction>Be brief at all times, please.</instruction> You look things up."
    return row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with Qwen3's template, traces with instructions, the same stripped, and a recipe."""
    folder = tmp_path_factory.mktemp("turns")
    tiny_model("qwen3_5_text", vocab_size=TRACE_VOCABULARY).save_pretrained(folder / "base")
    template_tokenizer("qwen3").save_pretrained(folder / "base")
    rows = [instructed(), instructed(tools=False), instructed(reasoning=None)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["strip", str(folder / "traces.jsonl"), str(folder / "stripped.jsonl")]) == 0
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder


def stripped_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stripped.jsonl").read_text().splitlines()]


def test_stripped_traces_are_as_they_were_but_for_the_instruction(folder: Path) -> None:
    for line, row in zip((folder / "traces.jsonl").read_text().splitlines(), stripped_rows(folder), strict=True):
        original = json.loads(line)
        assert row["messages"][1:] == original["messages"][1:]
        assert row["messages"][0]["content"] == " You look things up."
        assert row.get("tools") == original.get("tools")
        assert {name: restore_instructions(row)[name] for name in original} == original


@pytest.mark.slow
def test_a_run_plans_its_branches_and_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    turns = [rendered_turns(template_tokenizer("qwen3"), row) for row in stripped_rows(folder)]
    contexts = [[turn.context.tolist() for turn in row] for row in turns]
    encoded = [len({tuple(one[:n]) for one in row for n in range(1, len(one) + 1)}) for row in contexts]
    longest = [max(map(len, row)) for row in contexts]
    setting = json.loads((folder / "out" / "plan.json").read_text())["setting"]
    assert setting["context_length"] == max(longest)
    assert setting["branch_length"] == max(one - other for one, other in zip(encoded, longest, strict=True)) > 0
    assert setting["turns"] == max(map(len, turns))
    assert setting["decision_length"] == max(len(turn.decision) for row in turns for turn in row)
    capsys.readouterr()
    assert main(["report", str(folder / "out")]) == 0
    page = (folder / "out" / "report.html").read_text()
    assert "turn_contexts" in page
    example = json.loads((folder / "out" / "examples.json").read_text())["examples"][0]
    assert example["expected"] == "Yes."
    assert example["context_tokens"] == len(
        template_tokenizer("qwen3").apply_chat_template(
            stripped_rows(folder)[0]["messages"][:-1], tools=TOOLS, add_generation_prompt=True, return_dict=False
        )
    )


def test_inspect_measures_every_turn(folder: Path) -> None:
    assert main(["inspect", str(folder / "recipe.yaml"), "--samples", "3"]) == 0
    found = json.loads((folder / "out" / "gradient_flow.json").read_text())
    turns = [turn for row in stripped_rows(folder) for turn in rendered_turns(template_tokenizer("qwen3"), row)]
    assert found["tokens"]["decision"] == sum(len(turn.decision) for turn in turns)
    assert found["tokens"]["context"] == sum(turn.boundary for turn in turns)


def test_plan_counts_branches(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    totals = []
    for length in (0, 5000):
        arguments = ["plan", str(folder / "recipe.yaml"), "--turns", "8", "--branch-length", str(length)]
        assert main([*arguments, "--gpu", "H100", "--json", str(tmp_path / "plan.json")]) == 0
        totals.append(json.loads((tmp_path / "plan.json").read_text())["plans"][0])
    assert "and 5,000 of branches" in capsys.readouterr().out
    cache = [plan["terms"]["cache"] for plan in totals]
    assert cache[1] - cache[0] == 5000 * totals[0]["cache_token_bytes"]
    assert totals[1]["step_seconds"] > totals[0]["step_seconds"]
    once = tmp_path / "once.yaml"
    once.write_text(
        (folder / "recipe.yaml").read_text().replace("turn_contexts: inference", "turn_contexts: training")
    )
    assert main(["plan", str(once), "--turns", "8", "--branch-length", "5000"]) != 0
    assert "where a conversation is rendered once" in capsys.readouterr().err


def test_probes_with_tools_stand_where_turns_do(folder: Path, tmp_path: Path) -> None:
    """A probe's prompt is what a turn's context is, and its decision what that turn's is."""
    row = stripped_rows(folder)[0]
    numbers = [index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    probes = [
        {
            "prompt": row["messages"][:index],
            "tools": TOOLS,
            "preferred": row["messages"][index] if index < len(row["messages"]) - 1 else "Yes.",
            "rejected": "No.",
        }
        for index in numbers
    ]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    output = tmp_path / "report.json"
    arguments = ["--model", str(folder / "base"), "--probes", str(tmp_path / "probes.jsonl"), "--output", str(output)]
    assert main(["evaluate", *arguments]) == 0
    scores = [one for one in json.loads(output.read_text())["scores"] if one["condition"] == "given"]
    turns = rendered_turns(template_tokenizer("qwen3"), row)
    model = tiny_model("qwen3_5_text", vocab_size=TRACE_VOCABULARY)
    for score, turn in zip(scores, turns, strict=True):
        with torch.no_grad():
            logits = model(input_ids=turn.input_ids[None]).logits[0]
        expected = token_logprobs(logits[turn.boundary :], turn.decision).sum()
        assert score["preferred_logprob"] == pytest.approx(float(expected), rel=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft inspect --advise`: what it says goes back to what was measured, the data and the plan."""

import json
from pathlib import Path

import pytest

from frozen_peft.cli import main
from frozen_peft.data.rows import dump_row
from tests.tiny_models import tiny_model
from tests.training.runs import word_tokenizer, words


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two contexts of 90 words with four questions each."""
    folder = tmp_path_factory.mktemp("advice")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    rows = [
        {"prompt": f"{words(90, seed=context)} w{question} ", "completion": words(3, seed=question)}
        for context in range(2)
        for question in range(4)
    ]
    (folder / "samples.jsonl").write_text("".join(map(dump_row, rows)))
    (folder / "recipe.yaml").write_text(
        f"model_name_or_path: {folder / 'base'}\ndataset_name: {folder / 'samples.jsonl'}\n"
        f"output_dir: {folder / 'out'}\ntier: 2\nlora_r: 2\nuse_cpu: true\nreport_to: none\n"
    )
    return folder / "recipe.yaml"


def test_advice_says_the_figures_behind_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(recipe), "--samples", "3", "--advise", "true"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((recipe.parent / "out" / "gradient_flow.json").read_text())
    assert [horizon["horizon"] for horizon in found["horizons"]] == [64]
    advice = found["advice"]
    assert advice["tier"] == 2
    assert advice["group_by_context"] is True
    gradient, cost, store = advice["because"]
    assert f"cosine of {found['total']['cosine']:.2f}" in gradient
    assert f"{found['total']['context_share']:.0%} passes through the context" in gradient
    # Contexts end before the last token of the question, so that those of four questions are one.
    assert "90 tokens of context before 5 of decision" in cost
    assert "tier 2 takes" in cost
    assert "tier 3 takes" in cost
    assert "4.0 decisions for each context, and 75% of context tokens repeat" in store
    assert " ".join(advice["because"]) in printed
    assert "  tier: 2\n  group_by_context: true\n" in printed


def test_a_card_that_is_not_known_or_not_asked_for_is_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(recipe), "--advise", "true", "--gpu", "H1000"]) == 2
    assert "H100" in capsys.readouterr().err
    assert main(["inspect", str(recipe), "--gpu", "H100"]) == 2
    assert "has no use without it" in capsys.readouterr().err

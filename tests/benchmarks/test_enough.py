# SPDX-License-Identifier: Apache-2.0
"""The study of the frozen gradient, with a model that has learned nothing and a few steps."""

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from frozen_peft import lora_config
from tests.benchmarks.enough.model import build_model, evaluate, pad
from tests.benchmarks.enough.page import write_page
from tests.benchmarks.enough.study import TASKS, Size, compare_gradients, gradient_rows, train
from tests.benchmarks.enough.world import IGNORED_LABEL, NUM_FACTS, VOCABULARY, Sample, draw, habit, lesson, new_form
from tests.gradient.test_stretches import reference
from tests.reference import Sample as ReferenceSample

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"
WORDS = {token: word for word, token in VOCABULARY.items()}
TINY = Size(steps=10, batch_size=2, evaluations=2, held_out=4, gradient_samples=3)


def words(sample: Sample) -> list[str]:
    return [WORDS[token] for token in sample.input_ids]


@pytest.mark.parametrize("seed", range(5))
def test_answers_of_a_lesson_follow_from_its_context(seed: int) -> None:
    sample = lesson(random.Random(seed), 60)
    text = words(sample)
    facts = {text[place + 1]: text[place + 2] for place in range(60) if text[place] == "note"}
    assert len(facts) == NUM_FACTS
    for place, word in enumerate(text):
        if word == "ask":
            assert text[place + 3] == facts[text[place + 1]]
        if word == "go":
            assert text[place + 3] == ("ok" if "obey" in text[:60] else "rather")
            assert (text[place + 4] == text[place + 1]) == ("obey" in text[:60])
    supervised = [word for word, label in zip(text, sample.labels, strict=True) if label != IGNORED_LABEL]
    assert supervised.count(";") == 8
    assert set(supervised).isdisjoint({"ask", "go", ":", "obey"})


def test_a_habit_accepts_without_the_instruction() -> None:
    text = words(habit(random.Random(0), 50))
    assert "obey" not in text
    assert text[50:] == ["go", text[51], ":", "ok", text[51], ";"]


def test_the_new_form_has_the_color_first() -> None:
    text = words(new_form(random.Random(0), 50))
    facts = {text[place + 2]: text[place + 1] for place in range(50) if text[place] == "also"}
    assert len(facts) == NUM_FACTS
    assert "note" not in text
    assert text[50:] == ["ask", text[51], ":", facts[text[51]], ";"]


def test_evaluation_counts_samples_without_a_mistake() -> None:
    samples = draw(lesson, 0, 5, 20, 40)
    labels = pad(samples)[1]

    class Oracle(torch.nn.Module):
        """Predicts every next token but the last answer of the first sample."""

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            logits = 50 * torch.nn.functional.one_hot(input_ids.roll(-1, 1), len(VOCABULARY)).float()
            logits[0, len(samples[0].input_ids) - 2] = 0
            return type("Output", (), {"logits": logits})

    figures = evaluate(Oracle(), samples)
    assert figures["accuracy"] == pytest.approx(0.8)
    num_labels = int((labels != IGNORED_LABEL).sum())
    assert figures["loss"] == pytest.approx(torch.tensor(float(len(VOCABULARY))).log().item() / num_labels)


@pytest.mark.parametrize("horizon", [0, 8])
def test_gradients_are_those_of_plain_forwards(horizon: int) -> None:
    model, samples = build_model(0), draw(new_form, 0, 3, 30, 40)
    rows = gradient_rows(model, samples, {"compared": horizon, "full": -1}, "new form", 0, TINY)
    torch.manual_seed(0)
    adapted = get_peft_model(model, lora_config(model, "all-linear", r=TINY.rank, lora_alpha=2 * TINY.rank))
    plain = [ReferenceSample(torch.tensor(sample.input_ids), torch.tensor(sample.labels)) for sample in samples]
    found = {row["part"]: row for row in rows if row["horizon"] == "compared"}
    own, full = (_gradients_of_b(adapted, plain, reach) for reach in (horizon, -1))
    parts = {"all": "", "layer 0 gdn_output": "layers.0.linear_attn.out_proj", "layer 1 key": "k_proj"}
    for part, module in parts.items():
        one, other = (torch.cat([g.flatten() for name, g in every.items() if module in name]) for every in (own, full))
        assert found[part]["cosine"] == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-4)
        assert found[part]["norm"] == pytest.approx(float(one.norm() / other.norm()), rel=1e-3)


def _gradients_of_b(model: PeftModel, rows: list[ReferenceSample], horizon: int) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in reference(model, rows, horizon).items() if "lora_B" in name}


@pytest.mark.slow
def test_the_comparison_of_gradients_covers_every_role() -> None:
    rows = compare_gradients(build_model(0), TASKS[2], 0, TINY)
    parts = {row["part"] for row in rows}
    assert {
        "all",
        "response",
        "layer 0 gdn_key",
        "layer 1 key",
        "layer 1 query",
        "layer 1 gate",
        "layer 1 mlp",
    } <= parts
    for row in rows:
        if row["horizon"] == "full":
            assert row["cosine"] == pytest.approx(1.0)
            assert row["norm"] == pytest.approx(1.0)
        else:
            assert row["cosine"] is None or -1.001 <= row["cosine"] <= 1.001
    assert any(row["horizon"] == "frozen" and row["part"] == "all" and row["cosine"] < 0.999 for row in rows)


def test_a_training_is_evaluated_along_the_way() -> None:
    curve = train(build_model(0), TASKS[0], "frozen", 0, TINY)
    assert curve.steps == [0, 1, 2]
    assert curve.seconds[0] == 0 < curve.seconds[1] < curve.seconds[2]
    assert len(curve.losses) == len(curve.accuracy) == 3
    assert curve.losses[2] < curve.losses[0]


def test_the_page_is_made_from_the_results(tmp_path: Path) -> None:
    write_page(json.loads((RESULTS / "enough.json").read_text()), tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == (RESULTS / "enough.md").read_text()

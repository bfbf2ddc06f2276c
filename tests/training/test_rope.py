# SPDX-License-Identifier: Apache-2.0
"""Training, distilling, scoring and sampling where positions depend on how long a sample is, on both sides."""

from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_peft import FrozenContextTrainer
from frozen_peft.evaluation import LocalSampler, PromptRow, SamplingSettings
from frozen_peft.evaluation.decision_scores import DecisionScorer
from frozen_peft.evaluation.decision_tokens import TokenizedDecision
from frozen_peft.training import checks as first_batch_module
from tests.distillation.pairs import Loss, pairs, reference_loss, sharp
from tests.distillation.pairs import as_dataset as pairs_as_dataset
from tests.reference import random_sample, reference_logprobs, worst_gradient_error
from tests.tiny_models import ROPE_LIMIT, add_lora, tiny_model
from tests.training.runs import (
    as_dataset,
    config,
    gradients_of,
    reference_sgd,
    samples,
    train,
    trained_weights,
    word_tokenizer,
    words,
    worst_update_error,
)

# Steps with samples within the limit, crossing it in the decision and beyond it in the context; none with any context.
STEPS = [samples([(40, 13), (57, 13)]), samples([(75, 13), (0, 11)]), samples([(0, 70), (0, 15)])]


@pytest.mark.parametrize("fields", [{}, {"sequence_chunk_size": 8, "context_cache_size": "1GiB"}])
def test_training(fields: dict[str, Any], tmp_path: Path) -> None:
    model = add_lora(tiny_model("phi3"))
    start = trained_weights(model)
    # Without any context, stretches have the positions of the batch as plain forwards do.
    steps = STEPS[:2] if "sequence_chunk_size" in fields else STEPS
    expected = reference_sgd(model, steps)
    rows = [row for batch in steps for row in batch]
    run = train(FrozenContextTrainer, model, config(tmp_path, max_steps=len(steps), **fields), as_dataset(rows))
    assert worst_update_error(run.weights, expected, start) <= 1e-4


def test_the_first_batch_of_each_side_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    verify = first_batch_module.verify_context

    def noting(model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(len(input_ids))
        return verify(model, input_ids, *args, **kwargs)

    monkeypatch.setattr(first_batch_module, "verify_context", noting)
    rows = samples([(40, 13), (30, 7), (31, 8), (50, 6), (75, 13), (20, 5), (80, 3), (10, 3)])
    train(FrozenContextTrainer, add_lora(tiny_model("phi3")), config(tmp_path, max_steps=4), as_dataset(rows))
    assert lengths == [53, 88]


def test_distilling_where_only_the_teacher_is_beyond_the_limit(tmp_path: Path) -> None:
    model, loss = sharp("phi3"), Loss()
    rows = pairs([(44, 13), (20, 9)])
    assert [len(row.teacher.input_ids) > ROPE_LIMIT for row in rows] == [True, False]
    assert all(len(row.student.input_ids) <= ROPE_LIMIT for row in rows)
    expected = reference_loss(model, rows, loss)
    gradients = gradients_of(expected, model)
    run = train(FrozenContextTrainer, model, config(tmp_path, max_steps=1, **loss.fields), pairs_as_dataset(rows))
    assert run.losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert worst_gradient_error(run.gradients[0], gradients) <= 1e-5


def test_scores_of_decisions_on_both_sides_of_one_context() -> None:
    model = add_lora(tiny_model("phi3"))
    prompt = random_sample(58, 0).input_ids
    decisions = [random_sample(length, 0, seed=length).input_ids for length in (5, 9, 12)]
    tokenized = [TokenizedDecision(prompt, decision) for decision in decisions]
    # Nothing before it: no context.
    tokenized += [TokenizedDecision(prompt[:1], random_sample(length, 0).input_ids) for length in (6, 70)]
    found = DecisionScorer(model, batch_size=8).score(tokenized, weights=["adapted"])["adapted"]
    for one, score in zip(tokenized, found, strict=True):
        input_ids = torch.cat([one.prompt, one.decision])
        expected = reference_logprobs(model, input_ids, len(one.prompt) - 1).sum()
        assert score.logprob == pytest.approx(float(expected), rel=1e-5)


def prompt_rows(num_candidates: int) -> list[PromptRow]:
    """Prompts that stay within the limit, cross it while they are answered, and are beyond it."""
    texts = [words(count, seed=count) for count in (30, 57, ROPE_LIMIT, 75)]
    seeds = tuple(range(num_candidates))
    return [PromptRow(i, f"line {i + 1}", {"prompt": text}, text, None, seeds) for i, text in enumerate(texts)]


def test_greedy_candidates_are_those_of_whole_forwards() -> None:
    settings = SamplingSettings(num_candidates=1, temperature=0.0, max_new_tokens=12)
    tokenizer, reference = word_tokenizer(), tiny_model("phi3")
    sampler = LocalSampler(tiny_model("phi3"), tokenizer, settings, batch_size=4)
    found = {one.prompt: one for batch in sampler.sample(prompt_rows(1)) for one in batch}
    for row in prompt_rows(1):
        tokens = tokenizer(row.prompt)["input_ids"]
        start = len(tokens)
        while len(tokens) < start + 12 and tokens[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                tokens.append(int(reference(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert found[row.index].num_tokens == len(tokens) - start
        own = tokens[start:-1] if tokens[-1] == tokenizer.eos_token_id else tokens[start:]
        assert found[row.index].text == tokenizer.decode(own)


def test_drawn_candidates_do_not_hang_on_their_batch() -> None:
    settings = SamplingSettings(num_candidates=3, max_new_tokens=12)
    found = []
    for batch_size in (1, 16):
        sampler = LocalSampler(tiny_model("phi3"), word_tokenizer(), settings, batch_size=batch_size)
        drawn = {(c.prompt, c.number): c.text for batch in sampler.sample(prompt_rows(3)) for c in batch}
        found.append(drawn)
    assert found[0] == found[1]
    assert len(found[0]) == 12
    assert len(set(found[0].values())) > 8

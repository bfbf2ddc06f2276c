# SPDX-License-Identifier: Apache-2.0
"""From rows to the prompts that a model answers, and what cannot be answered."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from frozen_peft import FrozenContextConfig, FrozenContextTrainer, load_samples
from frozen_peft.data import strip_instructions
from frozen_peft.data.rows import dump_row
from tests.distillation.own_answers import ROWS, Written, on_policy, prompt_pair
from tests.distillation.pairs import Loss, Pair, pairs, reference_loss, sharp
from tests.distillation.test_dataset import CONVERSATIONS, TEXTS, TOKENIZER
from tests.distillation.test_training import assert_first_step
from tests.reference import Sample
from tests.tiny_models import LENGTH_DEPENDENT, ROPE_LIMIT, VOCAB_SIZE, tiny_model
from tests.training.runs import config, fresh_lora, train

OWN = {"loss_type": "distill", "distill_on_policy": 1.0, "num_generations": 2, "max_completion_length": 4}


def shown(row: dict[str, Any]) -> list[int]:
    """What inference shows of a row's prompt, written out."""
    if isinstance(row["prompt"], str):
        return TOKENIZER(row["prompt"])["input_ids"]
    text = "".join(f"<|im_start|>{entry['role']} {entry['content']}<|im_end|>" for entry in row["prompt"])
    return TOKENIZER(text + "<|im_start|>assistant ")["input_ids"]


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["prompt"] + row["completion"]}


@pytest.mark.parametrize("form", ["prompts", "samples", "messages", "texts", "stream", "file"])
def test_prompts_are_what_inference_shows(form: str, written: list[Written], tmp_path: Path) -> None:
    """Of student and teacher, without the decision that a row has, or with none in it."""
    full = TEXTS if form == "texts" else CONVERSATIONS
    rows = [as_messages(row) if form == "messages" else dict(row) for row in full]
    if form not in ("samples", "messages"):
        rows = [{"prompt": row["prompt"]} for row in rows]
    rows = [strip_instructions(row) for row in rows]
    dataset: Any = Dataset.from_list(rows)
    if form == "stream":
        dataset = dataset.to_iterable_dataset()
    if form == "file":
        path = tmp_path / "stripped.jsonl"
        path.write_text("".join(map(dump_row, rows)))
        dataset = load_samples(str(path), prompts_alone=True)
    arguments = config(tmp_path, per_device_train_batch_size=4, max_steps=1, remove_unused_columns=True, **OWN)
    train(FrozenContextTrainer, sharp("llama"), arguments, dataset)
    (batch,) = written
    stripped = [strip_instructions({"prompt": row["prompt"]}) for row in full]
    assert [prompt.tokens.tolist() for prompt in batch.prompts] == [shown(row) for row in stripped]
    teachers = [_all(prompt.teacher).tolist() for prompt in batch.prompts]
    assert teachers == [shown(row) for row in full]


def test_rows_that_keep_what_should_stay(written: list[Written], tmp_path: Path) -> None:
    """Nothing was stripped from them: the base, as it is, is their teacher."""
    rows = [strip_instructions({"prompt": row["prompt"]}) for row in CONVERSATIONS[:2]]
    kept = [strip_instructions({"prompt": [{"role": "user", "content": f"w{n} w5 w6"}]}) for n in range(2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(map(dump_row, [*rows, *kept])))
    arguments = config(tmp_path, per_device_train_batch_size=4, max_steps=1, **OWN)
    run = train(FrozenContextTrainer, sharp("llama"), arguments, load_samples(str(path), prompts_alone=True))
    (batch,) = written
    same = [torch.equal(prompt.tokens, _all(prompt.teacher)) for prompt in batch.prompts]
    assert same == [False, False, True, True]
    assert run.losses[0] > 0.0


def _all(decision: Any) -> torch.Tensor:
    return torch.cat([decision.context, decision.input_ids])


def test_a_file_of_prompts_is_one_to_train_on_alone_where_all_are_answered(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "w1 w2"}) + "\n" + json.dumps({"prompt": "w3", "completion": None}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: there is a `prompt` but no `completion`"):
        load_samples(str(path))
    assert len(load_samples(str(path), prompts_alone=True)) == 2


def test_tokenized_prompts(written: list[Written], tmp_path: Path) -> None:
    """`labels` of -100 alone; an answer of the data is left out."""
    model = sharp("llama")
    on_policy(model, tmp_path)
    on_policy(model, tmp_path, [prompt_pair(ROWS[0]), ROWS[1]])
    one, two = ([prompt.tokens.tolist() for prompt in batch.prompts] for batch in written)
    assert one == two


def test_an_empty_answer_is_judged_by_its_end(written: list[Written], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tests.distillation.own_answers.STOPS", list(range(VOCAB_SIZE)))
    model, loss = sharp("llama"), Loss("reverse_kl")
    run = on_policy(model, tmp_path, loss=loss)
    assert {len(answer) for answers in written[0].answers for answer in answers} == {1}
    assert (run.logs[0]["distill/answer_length"], run.logs[0]["distill/answer_ended"]) == (1.0, 1.0)
    assert_first_step(run, model, reference_loss(model, written[0].pairs, loss))


def test_an_answer_that_never_ends_is_cut_off_and_counted(
    written: list[Written], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tests.distillation.own_answers.STOPS", [VOCAB_SIZE + 5])
    run = on_policy(sharp("llama"), tmp_path, max_completion_length=9)
    assert (run.logs[0]["distill/answer_length"], run.logs[0]["distill/answer_ended"]) == (9.0, 0.0)
    (answers, *_) = written[0].answers
    assert all(len(answer) == 9 for answer in answers)


def without_prompt(row: Pair) -> Pair:
    sample = Sample(row.student.input_ids, row.student.input_ids.clone())
    return Pair(sample, sample)


@pytest.mark.parametrize(
    ("rows", "model", "said"),
    [
        (
            [ROWS[0], ROWS[1]],
            {"max_position_embeddings": 157},
            r"Sample 0 of the train dataset, with its instructions in place, has 154 tokens, and with an answer of "
            r"`max_completion_length=7` more than the model's 157 positions",
        ),
        (
            [Pair(ROWS[1].student, ROWS[1].student), Pair(ROWS[0].student, ROWS[0].student)],
            {"max_position_embeddings": 147},
            r"Sample 1 of the train dataset has 141 tokens, and with an answer",
        ),
        ([ROWS[1], without_prompt(ROWS[0])], {}, r"Sample 1 of the train dataset has nothing before its first superv"),
    ],
    ids=["teacher", "student", "empty"],
)
def test_prompts_that_leave_no_room(rows: list[Pair], model: dict[str, int], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        on_policy(fresh_lora(tiny_model("llama", **model)), tmp_path, rows)


def test_an_answer_across_a_limit_of_the_rope_is_refused(tmp_path: Path) -> None:
    name = next(name for name in LENGTH_DEPENDENT if "phi" in name)
    (row,) = pairs([(ROPE_LIMIT - 20, 3)])
    with pytest.raises(ValueError, match=r"Sample 0 of the train dataset.* reaches a limit of the model's rope"):
        on_policy(fresh_lora(tiny_model(name)), tmp_path, [row], max_completion_length=30)


def test_rows_without_completions_need_a_share_of_one(tmp_path: Path) -> None:
    rows = Dataset.from_list([strip_instructions({"prompt": row["prompt"]}) for row in CONVERSATIONS])
    arguments = config(tmp_path, **(OWN | {"distill_on_policy": 0.5}))
    with pytest.raises(ValueError, match=r"no `completion`, and with `distill_on_policy=0.5`"):
        train(FrozenContextTrainer, sharp("llama"), arguments, rows)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"distill_on_policy": 1.5}, "`distill_on_policy` must be from 0 to 1, found 1.5"),
        ({"num_generations": 0}, "`num_generations` must be 1 answer or more"),
        ({"max_completion_length": 0}, "`max_completion_length` must be 1 token or more"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1"),
        ({"top_k": -1}, "`top_k` must be 0"),
        ({"distill_beta": 2.0}, "`distill_beta` must be from 0 to 1"),
        ({"decision_mode": "turns"}, "`decision_mode='turns'` do not go together: an answer is one decision"),
        ({"distill_likelihood_weight": 0.5}, "`distill_likelihood_weight=0.5` do not go together"),
        ({"max_length": 100}, "`max_length=100` do not go together"),
        ({"packing": True}, "`packing` puts several into one row"),
        ({"padding_free": True}, "`padding_free` puts several into one row"),
    ],
)
def test_fields_that_do_not_go(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        FrozenContextConfig(str(tmp_path), bf16=False, **(OWN | fields))


def test_fields_without_effect_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        FrozenContextConfig(str(tmp_path), bf16=False, loss_type="distill", num_generations=3, top_k=5)
    assert "No effect of `num_generations`, `top_k`: without `distill_on_policy`" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        FrozenContextConfig(str(tmp_path), bf16=False, **OWN, context_cache_dir=str(tmp_path / "c"))
        FrozenContextConfig(str(tmp_path), bf16=False, loss_type="distill", distill_beta=0.2)
    assert "context_cache_dir" not in caplog.text
    assert "No effect of `distill_beta`" in caplog.text

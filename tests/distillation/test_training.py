# SPDX-License-Identifier: Apache-2.0
"""Training with `loss_type="distill"` has the loss and the gradient of plain forwards over whole sequences."""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from frozen_peft import FrozenContextTrainer, lora_config, quantization_config
from frozen_peft.distillation.divergence import Answers
from frozen_peft.distillation.teacher import Teacher
from tests.distillation.pairs import (
    Loss,
    Pair,
    as_dataset,
    divergences,
    num_labels,
    pairs,
    reference_loss,
    sharp,
    teacher_logits,
)
from tests.reference import (
    IGNORED,
    Sample,
    double_precision,
    no_adapters_at_context,
    stop_gradient_at_context,
    worst_gradient_error,
)
from tests.tiny_models import tiny_model, to_double
from tests.training.runs import Run, config, fresh_lora, gradients_of, train, word_tokenizer

TOLERANCE = 1e-5
ROWS = pairs()
# The chat template's generation prompt, which activated adapters are switched on by.
TOKENS = tuple(word_tokenizer()("<|im_start|> assistant", add_special_tokens=False)["input_ids"])


def distil(model: PeftModel, folder: Path, rows: Sequence[Pair], loss: Loss, **fields: Any) -> Run:
    arguments = config(folder, **({"max_steps": 1} | loss.fields | fields))
    return train(FrozenContextTrainer, copy.deepcopy(model), arguments, as_dataset(rows))


def assert_first_step(run: Run, model: PeftModel, expected: torch.Tensor) -> None:
    assert run.losses[0] == pytest.approx(expected.item(), rel=TOLERANCE, abs=TOLERANCE)
    assert worst_gradient_error(run.gradients[0], gradients_of(expected, model)) <= TOLERANCE


def test_what_worker_processes_of_a_dataloader_get_holds_no_model(tmp_path: Path) -> None:
    """Where processes are not forked, it is pickled."""
    run = distil(fresh_lora(tiny_model("llama")), tmp_path, ROWS, Loss())
    collator = run.trainer.get_train_dataloader().collate_fn
    assert len(pickle.dumps(collator)) < 100_000
    assert pickle.loads(pickle.dumps(collator))([run.trainer.train_dataset[0]]).teachers


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(("temperature", "likelihood_weight"), [(1.0, 0.0), (2.5, 0.0), (2.5, 0.3)])
def test_loss_and_gradient(
    direction: str, top_k: int, temperature: float, likelihood_weight: float, tmp_path: Path
) -> None:
    loss = Loss(direction, top_k, temperature, likelihood_weight)
    model = sharp("qwen3_5_text")
    run = distil(model, tmp_path, ROWS[:2], loss)
    assert_first_step(run, model, reference_loss(model, ROWS[:2], loss))


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma3_text",
        "qwen3_5_moe_text",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("falcon_h1", "granitemoehybrid")),
    ],
)
def test_architectures(name: str, tmp_path: Path) -> None:
    """Attention alone, sliding windows and a soft cap, experts, and logits that are scaled; without rounding."""
    overrides = {
        "falcon_h1": {"lm_head_multiplier": 0.7},
        "granitemoehybrid": {"logits_scaling": 1.7},
        "gemma3_text": {"final_logit_softcapping": 3.0},
    }
    loss = Loss(top_k=5, temperature=1.5)
    model = to_double(sharp(name, **overrides.get(name, {})))
    with double_precision(model):
        run = distil(model, tmp_path, ROWS[:2], loss, router_aux_loss_coef=0.0)
        expected = reference_loss(model, ROWS[:2], loss)
        gradients = gradients_of(expected, model)
    assert run.losses[0] == pytest.approx(expected.item(), rel=1e-6)
    assert worst_gradient_error(run.gradients[0], gradients) <= 1e-10


def test_the_auxiliary_loss_of_experts_stays(tmp_path: Path) -> None:
    model = sharp("qwen3_5_moe_text")
    loss = Loss(top_k=5)
    without, with_it = (
        distil(model, tmp_path, ROWS[:2], loss, router_aux_loss_coef=coefficient) for coefficient in (0.0, 0.5)
    )
    auxiliary = with_it.logs[0]["aux_loss"]
    assert auxiliary > 0.5
    assert with_it.losses[0] == pytest.approx(without.losses[0] + 0.5 * auxiliary, abs=TOLERANCE)


@pytest.mark.parametrize(
    "fields",
    [
        {"distill_chunk_size": 1, "distill_top_k": 0},
        {"distill_chunk_size": 7, "distill_top_k": 0},
        {"distill_chunk_size": 1},
        {"distill_chunk_size": 7},
        {"distill_chunk_size": 1000},
        pytest.param({"prefill_chunk_size": 7}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": False}, marks=pytest.mark.slow),
        {"context_cache_size": "1GiB"},
        pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, marks=pytest.mark.slow),
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"sequence_chunk_size": 4},
    ],
    ids=str,
)
def test_what_changes_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    """Ragged rows, among them a decision of one label and a sample that has a context in its instructions alone."""
    rows = ROWS[:4]
    assert {len(row.student.context) for row in rows} > {0}
    assert min(num_labels([row]) for row in rows) == 1
    model = sharp("qwen3_5_text")
    loss = Loss(top_k=fields.get("distill_top_k", 5), likelihood_weight=0.2)
    run = distil(model, tmp_path, rows, loss, **({"per_device_train_batch_size": 4} | fields))
    assert_first_step(run, model, reference_loss(model, rows, loss))


@pytest.mark.parametrize(
    "fields", [{"tier": 1}, pytest.param({"tier": 3, "sequence_chunk_size": 16}, marks=pytest.mark.slow)], ids=str
)
def test_the_full_gradient(fields: dict[str, Any], tmp_path: Path) -> None:
    model, loss = sharp("qwen3_5_text"), Loss(top_k=5)
    run = distil(model, tmp_path, ROWS[:2], loss, **fields)
    assert_first_step(run, model, reference_loss(model, ROWS[:2], loss, horizon=-1))


def test_a_horizon_has_the_gradient_of_the_tokens_that_it_reaches(tmp_path: Path) -> None:
    model, loss, horizon = sharp("qwen3_5_text"), Loss(top_k=5), 6
    run = distil(model, tmp_path, ROWS[:2], loss, gradient_horizon=horizon)
    total = torch.zeros((), dtype=torch.float64)
    for row in ROWS[:2]:
        sample = row.student
        with stop_gradient_at_context(model, sample.boundary - horizon, len(sample.input_ids)):
            logits = model(input_ids=sample.input_ids[None], use_cache=False).logits[0]
        predicting = logits[:-1][sample.labels[1:] != IGNORED]
        total = total + divergences(predicting, teacher_logits(model, row), loss).sum()
    assert_first_step(run, model, total / num_labels(ROWS[:2]))


def test_contexts_without_adapters(tmp_path: Path) -> None:
    """An activated adapter: teacher and student encode contexts alike, by the base model."""
    loss = Loss(top_k=5)
    rows = [invoked_pair(row) for row in ROWS[:2]]
    model = sharp("qwen3_5_text")
    run = distil(model, tmp_path, rows, loss, context_adapters=False)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        sample, boundary = row.student, row.student.boundary + 1 - len(TOKENS)
        length = len(sample.input_ids)
        with no_adapters_at_context(model, boundary, length), stop_gradient_at_context(model, boundary, length):
            logits = model(input_ids=sample.input_ids[None], use_cache=False).logits[0]
        predicting = logits[:-1][sample.labels[1:] != IGNORED]
        total = total + divergences(predicting, teacher_logits(model, row), loss).sum()
    assert_first_step(run, model, total / num_labels(rows))


def test_turns_are_decisions_of_their_own(tmp_path: Path) -> None:
    """Two supervised spans of a conversation, of which the teacher sees other words in between."""
    ids = torch.arange(3, 63)
    own = spans(ids, (20, 27), (41, 50))
    between = torch.arange(70, 75)
    theirs = Sample(
        torch.cat([ids[:33], between, ids[33:]]), torch.cat([own.labels[:33], between * 0 + IGNORED, own.labels[33:]])
    )
    row, loss = Pair(own, theirs), Loss(top_k=5)
    model = sharp("qwen3_5_text")
    run = distil(
        model,
        tmp_path,
        [row, row],
        loss,
        decision_mode="turns",
        max_decisions_per_forward=1,
        per_device_train_batch_size=1,
    )
    parts = [
        Pair(spans(ids[:27], (20, 27)), spans(ids[:27], (20, 27))),
        Pair(spans(ids[:50], (41, 50)), Sample(theirs.input_ids[:55], spans(theirs.input_ids[:55], (46, 55)).labels)),
    ]
    assert_first_step(run, model, reference_loss(model, parts, loss))


def test_a_teacher_that_sees_what_the_student_sees_and_adapters_that_do_nothing(tmp_path: Path) -> None:
    """Nothing to learn: the divergence is zero."""
    rows = [Pair(row.student, row.student) for row in ROWS[:2]]
    model = fresh_lora(tiny_model("qwen3_5_text"))
    for direction in ("forward_kl", "reverse_kl"):
        run = distil(model, tmp_path, rows, Loss(direction, top_k=5))
        assert abs(run.losses[0]) < 1e-6
        assert max(gradient.abs().max() for gradient in run.gradients[0].values()) < 1e-6


@pytest.mark.slow
def test_distilling_makes_the_student_what_the_teacher_is(tmp_path: Path) -> None:
    run = distil(
        sharp("llama"), tmp_path, ROWS[:2], Loss(top_k=20), max_steps=15, optim="adamw_torch", learning_rate=0.02
    )
    assert run.losses[-1] < 0.2 * run.losses[0]


def test_evaluation_is_of_the_same_loss(tmp_path: Path) -> None:
    model, loss = sharp("llama"), Loss(top_k=5, temperature=2.0, likelihood_weight=0.3)
    trainer = distil(model, tmp_path, ROWS, loss, learning_rate=0.0).trainer
    # One batch: a mean over batches weighs them by their samples.
    metrics = trainer.evaluate(as_dataset(ROWS[:2]))
    expected = reference_loss(model, ROWS[:2], loss).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=TOLERANCE)
    mixed = 0.7 * metrics["eval_distill/divergence"] + 0.3 * metrics["eval_distill/nll"]
    assert mixed == pytest.approx(expected, rel=TOLERANCE)
    assert {"eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"} <= metrics.keys()


def test_dropout_is_the_students_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters that drop out, the teacher says what it says without, and no gradient is kept of it."""
    seen: list[Answers] = []
    answer = Teacher.answer

    def keep(self: Teacher, *args: Any) -> list[Answers]:
        assert all(module.training for module in self._model.modules() if isinstance(module, torch.nn.Dropout))
        seen.extend(found := answer(self, *args))
        return found

    monkeypatch.setattr(Teacher, "answer", keep)
    model = fresh_lora(tiny_model("qwen3_5_text"), lora_dropout=0.5, init_lora_weights=False)
    run = distil(model, tmp_path, ROWS[:2], Loss(top_k=5))
    assert len(seen) == 2
    for answers, row in zip(seen, ROWS[:2], strict=True):
        expected = teacher_logits(run.trainer.model.eval(), row).log_softmax(-1).topk(5)
        assert answers["tokens"].tolist() == expected.indices.tolist()
        assert torch.allclose(answers["logprobs"][:, :-1], expected.values, atol=1e-5)
        assert not answers["logprobs"].requires_grad


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_head_that_is_trained_is_the_students_alone(top_k: int, tmp_path: Path) -> None:
    model = fresh_lora(tiny_model("llama"), modules_to_save=["lm_head"], init_lora_weights=False)
    with torch.no_grad():
        head = model.get_base_model().get_output_embeddings()
        head.original_module.weight.mul_(4)
        head.modules_to_save["default"].weight.mul_(3)
    loss = Loss(top_k=top_k)
    run = distil(model, tmp_path, ROWS[:2], loss)
    assert any("lm_head" in name for name in run.gradients[0])
    assert_first_step(run, model, reference_loss(model, ROWS[:2], loss))


@pytest.mark.parametrize("top_k", [0, 5])
def test_under_autocast(top_k: int, tmp_path: Path) -> None:
    """The teacher's forward leaves no weights cast without gradient behind for the student's."""
    model, loss = sharp("qwen3_5_text"), Loss(top_k=top_k)
    expected = gradients_of(reference_loss(model, ROWS[:2], loss), model)
    # Sharp distributions are beyond the tolerance of the check in 16 bit.
    run = distil(model, tmp_path, ROWS[:2], loss, bf16=True, verify_context="never")
    for name, gradient in run.gradients[0].items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.97, (name, float(cosine))


@pytest.mark.slow
def test_a_4_bit_base(tmp_path: Path) -> None:
    checkpoint, loss = str(tmp_path / "base"), Loss(top_k=5)
    sharp("llama", hidden_size=64, intermediate_size=128, head_dim=32).unload().save_pretrained(checkpoint)
    word_tokenizer().save_pretrained(checkpoint)
    trainer = FrozenContextTrainer(
        checkpoint,
        config(tmp_path, **loss.fields, max_steps=1, model_init_kwargs={"dtype": "float32"}),
        train_dataset=as_dataset(ROWS[:2]),
        quantization_config=quantization_config(checkpoint, bnb_4bit_compute_dtype=torch.float32),
        peft_config=lora_config(checkpoint, init_lora_weights=False),
    )
    expected = reference_loss(trainer.model, ROWS[:2], loss).item()
    trainer.train()
    assert expected > 0.01
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def spans(ids: torch.Tensor, *supervised: tuple[int, int]) -> Sample:
    """A sample in which some stretches are supervised."""
    labels = torch.full_like(ids, IGNORED)
    for start, stop in supervised:
        labels[start:stop] = ids[start:stop]
    return Sample(ids, labels)


def invoked_pair(row: Pair) -> Pair:
    """The pair with the invocation in front of its decision, the tokens before its first label."""
    sides = []
    for sample in (row.student, row.teacher):
        context, decision = sample.context % 80 + 10, sample.decision % 80 + 10
        ids = torch.cat([context, torch.tensor(TOKENS), decision])
        sides.append(spans(ids, (len(context) + len(TOKENS), len(ids))))
    return Pair(*sides)

# SPDX-License-Identifier: Apache-2.0
"""Training on answers of its own has the loss and the gradient of plain forwards over the same answers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from frozen_peft.context import encode_context, generate, generate_over, use_segmented_attention
from tests.distillation.own_answers import MAX_TOKENS, NUM_ANSWERS, ROWS, STOPS, Written, on_policy, prompt_pair
from tests.distillation.pairs import Loss, Pair, as_dataset, divergences, reference_loss, sharp, teacher_logits
from tests.distillation.test_training import TOKENS, assert_first_step, distil, invoked_pair
from tests.frozen_runs import decision_logits
from tests.reference import (
    IGNORED,
    Sample,
    double_precision,
    no_adapters_at_context,
    relative_error,
    stop_gradient_at_context,
    token_logprobs,
    worst_gradient_error,
)
from tests.tiny_models import (
    ARCHITECTURES,
    LATENT_ATTENTION,
    SLIDING_WINDOW,
    VOCAB_SIZE,
    add_lora,
    tiny_model,
    to_double,
)
from tests.training.runs import Run, equal, fresh_lora, gradients_of, word_tokenizer

TOLERANCE = 1e-5


@pytest.fixture
def hybrid() -> Iterator[PeftModel]:
    """A hybrid that computes in float64, so that what is left of a difference is not rounding."""
    model = to_double(sharp("qwen3_5_text"))
    with double_precision(model):
        yield model


def assert_exact(run: Run, model: PeftModel, expected: torch.Tensor, loss: Loss) -> None:
    """Loss and gradient of a first step; what is kept of a teacher's likeliest tokens is in float32."""
    assert run.losses[0] == pytest.approx(expected.item(), rel=1e-6)
    assert worst_gradient_error(run.gradients[0], gradients_of(expected, model)) <= (1e-6 if loss.top_k else 1e-10)


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl", "jsd"])
def test_loss_and_gradient(
    direction: str, top_k: int, hybrid: PeftModel, written: list[Written], tmp_path: Path
) -> None:
    loss = Loss(direction, top_k, beta=0.3)
    run = on_policy(hybrid, tmp_path, loss=loss, temperature=1.3, top_p=0.95, top_k=40)
    (batch,) = written
    assert_exact(run, hybrid, reference_loss(hybrid, batch.pairs, loss), loss)
    assert [len(answers) for answers in batch.answers] == [NUM_ANSWERS] * 2
    lengths = [len(answer) for answers in batch.answers for answer in answers]
    assert min(lengths) < MAX_TOKENS == max(lengths)
    ended = [int(answer[-1]) in STOPS for answers in batch.answers for answer in answers]
    (log,) = run.logs
    assert log["distill/answer_length"] == pytest.approx(np.mean(lengths))
    assert log["distill/answer_ended"] == pytest.approx(np.mean(ended))
    assert log["distill/divergence"] == pytest.approx(run.losses[0], rel=1e-5)
    num_context = sum(row.student.boundary for row in ROWS[:2])
    assert log["num_tokens"] == num_context + sum(lengths) + len(lengths)
    assert min(log[f"{name}_seconds"] for name in ("distill/writing", "context/prefill", "context/decision")) > 0.0
    # One prefill for writing and training all of them, by which none of it has changed.
    assert log["context/tokens_encoded"] == num_context


@pytest.mark.parametrize(
    "fields",
    [
        {"max_decisions_per_forward": 2},
        {"prefill_chunk_size": 50},
        {"gradient_checkpointing": False},
        {"sequence_chunk_size": 4},
        {"context_cache_size": "1GiB"},
        {"tier": 1},
        {"tier": 3, "sequence_chunk_size": 64},
        {"gradient_horizon": 6},
    ],
    ids=str,
)
def test_what_is_written_is_what_is_trained(
    fields: dict[str, Any], hybrid: PeftModel, written: list[Written], tmp_path: Path
) -> None:
    """However it is run; and it is the same answers each time."""
    model, loss = hybrid, Loss("reverse_kl", 5)
    run = on_policy(model, tmp_path, loss=loss, **fields)
    on_policy(model, tmp_path, loss=loss)
    first, second = written
    assert [list(map(torch.Tensor.tolist, answers)) for answers in first.answers] == [
        list(map(torch.Tensor.tolist, answers)) for answers in second.answers
    ]
    if "gradient_horizon" in fields:

        def stopped(sample: Sample) -> AbstractContextManager[None]:
            return stop_gradient_at_context(model, sample.boundary - fields["gradient_horizon"], len(sample.input_ids))

        expected = plain_loss(model, first, loss, stopped)
    else:
        expected = reference_loss(model, first.pairs, loss, horizon=-1 if "tier" in fields else 0)
    assert_exact(run, model, expected, loss)


def plain_loss(
    model: PeftModel, batch: Written, loss: Loss, stopped: Callable[[Sample], AbstractContextManager[None]]
) -> torch.Tensor:
    """The mean over tokens, of forwards that run where `stopped` says."""
    parts = []
    for row in batch.pairs:
        with stopped(row.student):
            logits = model(input_ids=row.student.input_ids[None], use_cache=False).logits[0]
        predicting = logits[:-1][row.student.labels[1:] != IGNORED]
        parts.append(divergences(predicting, teacher_logits(model, row), loss))
    return torch.cat(parts).mean()


@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *LATENT_ATTENTION, "diffllama"])
def test_writing_and_training_have_the_same_log_probabilities(
    name: str, segmented: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every token that is drawn, on every architecture, over the same frozen contexts."""
    model = add_lora(tiny_model(name))
    if segmented:
        use_segmented_attention(model)
    generator = torch.Generator().manual_seed(0)
    lengths = (40, 2 * SLIDING_WINDOW + 7, SLIDING_WINDOW - 3, 40)
    prompts = [torch.randint(6, VOCAB_SIZE, (length,), generator=generator) for length in lengths]
    frozen = encode_context(model, [prompt[:-1] for prompt in prompts], chunk_size=8)
    scores: list[torch.Tensor] = []
    draw = generate._Drawn.__call__

    def keep(self: Any, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores.append(logits.clone())
        return draw(self, input_ids, logits)

    monkeypatch.setattr(generate._Drawn, "__call__", keep)
    draws = np.random.default_rng(0).random((len(prompts), 20))
    answers = generate_over(
        model, frozen, [prompt.tolist() for prompt in prompts], draws=draws, max_new_tokens=20, stop_tokens=STOPS[:3]
    )
    samples = [
        Sample(ids := torch.cat([p, torch.tensor(a)]), _labels(ids, len(p)))
        for p, a in zip(prompts, answers, strict=True)
    ]
    trained = decision_logits(model, samples, frozen)
    for row, (sample, logits, answer) in enumerate(zip(samples, trained, answers, strict=True)):
        written = torch.stack([step[row] for step in scores[: len(answer)]]).double().log_softmax(-1)
        of_answer = written.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert relative_error(of_answer, token_logprobs(logits.detach(), sample.decision)) <= TOLERANCE, row


def _labels(ids: torch.Tensor, num_prompt: int) -> torch.Tensor:
    labels = ids.clone()
    labels[:num_prompt] = IGNORED
    return labels


def test_contexts_without_adapters(hybrid: PeftModel, written: list[Written], tmp_path: Path) -> None:
    """An activated adapter: decoding begins at the invocation, behind what the base encodes."""
    loss, model = Loss("reverse_kl", 5), hybrid
    rows = [invoked_pair(row) for row in ROWS[:2]]
    run = on_policy(model, tmp_path, rows, loss, context_adapters=False)

    @contextmanager
    def stopped(sample: Sample) -> Iterator[None]:
        length, boundary = len(sample.input_ids), sample.boundary + 1 - len(TOKENS)
        with no_adapters_at_context(model, boundary, length), stop_gradient_at_context(model, boundary, length):
            yield

    assert_exact(run, model, plain_loss(model, written[0], loss, stopped), loss)


def test_prompts_alone_and_samples_are_answered_alike(written: list[Written], tmp_path: Path) -> None:
    """What is drawn depends on the row: the prompts are the same."""
    model = sharp("llama")
    on_policy(model, tmp_path)
    on_policy(model, tmp_path, [prompt_pair(row) for row in ROWS[:2]])
    one, two = ([prompt.tokens.tolist() for prompt in batch.prompts] for batch in written)
    assert one == two


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_that_is_written(share: float, written: list[Written], tmp_path: Path) -> None:
    model, loss = sharp("llama"), Loss("reverse_kl", 5)
    fields: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.0}
    run = on_policy(model, tmp_path, ROWS, loss, distill_on_policy=share, **fields)
    if share == 0.0:
        assert not written
        plain = distil(model, tmp_path, ROWS, loss, **fields)
        assert plain.losses == run.losses
        assert equal(plain.weights, run.weights)
        return
    num_written = [len(batch.prompts) for batch in written]
    if share == 1.0:
        assert num_written == [4] * 6
        return
    assert 4 < sum(num_written) < 20
    # Of a step, the loss is the mean over tokens of both kinds.
    wrote = [index for index, log in enumerate(run.logs) if "distill/answer_length" in log]
    step, batch = next(pair for pair in zip(wrote, written, strict=True) if len(pair[1].prompts) < 4)
    answered = {tuple(prompt.tokens.tolist()) for prompt in batch.prompts}
    given = [row for row in ROWS if tuple(row.student.input_ids[: row.student.boundary + 1].tolist()) not in answered]
    assert 0 < len(given) == 4 - len(answered) < 4
    expected = reference_loss(model, [*batch.pairs, *given], loss).item()
    assert run.losses[step] == pytest.approx(expected, rel=1e-5)
    assert run.logs[-1]["distill/reused"] > 0.0


def test_micro_batches_weigh_alike(written: list[Written], tmp_path: Path) -> None:
    model, loss = sharp("llama"), Loss("reverse_kl", 5)
    run = on_policy(model, tmp_path, ROWS, loss, gradient_accumulation_steps=2)
    one, two = (reference_loss(model, batch.pairs, loss) for batch in written)
    assert_first_step(run, model, (one + two) / 2)


def test_seeds_steps_and_the_random_state(written: list[Written], tmp_path: Path) -> None:
    def texts(batch: Written) -> list[list[int]]:
        return [answer.tolist() for answers in batch.answers for answer in answers]

    model = sharp("llama")
    fields: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.0}
    torch.manual_seed(5)
    on_policy(model, tmp_path, **fields)
    on_policy(model, tmp_path, **fields)
    on_policy(model, tmp_path, seed=7, **fields)
    on_policy(model, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, **fields)
    first, again, other, apart = (
        [texts(batch) for batch in written[start:stop]] for start, stop in ((0, 4), (4, 8), (8, 12), (12, 20))
    )
    assert first == again
    assert [[*one, *two] for one, two in zip(apart[::2], apart[1::2], strict=True)] == first
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert len({str(batch) for batch in first}) == 4
    for batch in first:
        # Answers to one prompt are drawn apart.
        assert len({tuple(answer) for answer in batch}) > NUM_ANSWERS


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01,
        "distill_on_policy": 0.6, "context_cache_size": "1GiB", "gradient_accumulation_steps": 2,
    }  # fmt: skip
    model = sharp("qwen3_5_text")
    whole = on_policy(model, tmp_path / "whole", ROWS, **fields)
    resumed = on_policy(model, tmp_path / "resumed", ROWS, resume=str(tmp_path / "whole/checkpoint-2"), **fields)
    assert equal(resumed.weights, whole.weights)
    assert resumed.losses == whole.losses


def test_evaluation_writes_the_same_each_time(written: list[Written], tmp_path: Path) -> None:
    model, loss = sharp("llama"), Loss("reverse_kl", 5)
    trainer = on_policy(model, tmp_path, loss=loss, learning_rate=0.0, per_device_eval_batch_size=4).trainer
    del written[:]
    state = torch.random.get_rng_state()
    one, two = (trainer.evaluate(as_dataset(ROWS))["eval_loss"] for _ in range(2))
    assert one == two
    assert torch.equal(state, torch.random.get_rng_state())
    assert one == pytest.approx(reference_loss(model, written[0].pairs, loss).item(), rel=1e-5)


def test_the_teachers_contexts_are_found_and_its_answers_not_kept(tmp_path: Path) -> None:
    model = sharp("llama")
    run = on_policy(
        model, tmp_path, ROWS, max_steps=4, context_cache_size="1GiB", distill_cache_dir=str(tmp_path / "c")
    )
    teacher = run.trainer._distiller.teacher
    assert teacher._encoder.counts.num_tokens_encoded == sum(row.teacher.boundary for row in ROWS)
    assert not list((tmp_path / "c").rglob("*.safetensors"))
    assert len(teacher._answers._memory) == 0


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_a_metric_gets_one_row_for_each_sample(written: list[Written], tmp_path: Path) -> None:
    """It holds the sample's answers one after the other, each behind the token that predicts its first."""
    rows: list[np.ndarray] = []

    def metric(prediction: Any) -> dict[str, float]:
        rows.extend(prediction.label_ids)
        assert len(prediction.predictions) == len(prediction.label_ids) == 4
        return {}

    run = on_policy(sharp("llama"), tmp_path, per_device_eval_batch_size=4)
    run.trainer.compute_metrics = metric
    del written[:]
    run.trainer.evaluate(as_dataset(ROWS))
    expected = [torch.cat(answers).tolist() for answers in written[0].answers]
    assert [row[row != IGNORED].tolist() for row in rows] == expected


def test_some_answers_are_kept_to_be_shown(written: list[Written], tmp_path: Path) -> None:
    run = on_policy(sharp("llama"), tmp_path, max_steps=40, learning_rate=0.0)
    shown = run.trainer.own_answers
    assert [answer["step"] for answer in shown] == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    first = written[0]
    assert shown[0] == {
        "step": 0,
        "context_tokens": len(first.prompts[0].tokens),
        "context_end": word_tokenizer().decode(first.prompts[0].tokens[-100:]),
        "text": word_tokenizer().decode(first.answers[0][0]),
        "finished": int(first.answers[0][0][-1]) in STOPS,
    }
    assert distil(sharp("llama"), tmp_path, ROWS[:2], Loss()).trainer.own_answers == []


def test_nothing_to_learn(tmp_path: Path) -> None:
    """A teacher without instructions, and adapters that do nothing: it keeps what it is."""
    rows = [Pair(row.student, row.student) for row in ROWS[:2]]
    run = on_policy(fresh_lora(tiny_model("qwen3_5_text")), tmp_path, rows)
    assert abs(run.losses[0]) < 1e-6

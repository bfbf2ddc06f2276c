# SPDX-License-Identifier: Apache-2.0
"""What the teacher said is kept, found again where it is the same, and said again where it is not."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from frozen_peft import ContextMismatchError, FrozenContextTrainer
from frozen_peft.context import Decision, FrozenContext, verify
from frozen_peft.distillation.teacher import decision_key
from tests.distillation.pairs import Loss, Pair, as_dataset, pairs, sharp
from tests.reference import IGNORED, Sample
from tests.training.runs import Run, adapted, config, train
from tests.training.runs import as_dataset as plain_dataset

ROWS = pairs()[:4]
LOSS = Loss(top_k=5)


def two_epochs(folder: Path, loss: Loss = LOSS, *, model: Any = None, **fields: Any) -> Run:
    """Two epochs of two steps of two samples."""
    arguments = config(folder, **(loss.fields | {"max_steps": 4} | fields))
    return train(FrozenContextTrainer, model or sharp("llama"), arguments, as_dataset(ROWS))


def reused(run: Run) -> list[float]:
    return [entry["distill/reused"] for entry in run.logs]


def decoder_calls(model: Any) -> list[tuple[bool, int]]:
    """Of each forward of the decoder to come: whether it runs without gradient, and its number of tokens."""
    calls: list[tuple[bool, int]] = []
    model.get_base_model().get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((not torch.is_grad_enabled(), kwargs["input_ids"].shape[1])),
        with_kwargs=True,
    )
    return calls


@pytest.mark.parametrize("top_k", [0, 5])
def test_later_epochs_read_and_train_the_same(top_k: int, tmp_path: Path) -> None:
    loss = Loss("reverse_kl", top_k, 1.5, 0.1)
    kept = two_epochs(tmp_path, loss)
    fresh = two_epochs(tmp_path, loss, distill_cache_size="0")
    assert reused(kept) == [0.0, 0.0, 1.0, 1.0]
    assert reused(fresh) == [0.0] * 4
    assert kept.losses == fresh.losses
    assert all(torch.equal(kept.weights[name], fresh.weights[name]) for name in fresh.weights)


def test_a_later_epoch_has_no_forward_of_the_teacher(tmp_path: Path) -> None:
    model = sharp("llama")
    calls = decoder_calls(model)
    two_epochs(tmp_path, model=model, tier=1, max_steps=2, verify_context="never")
    first, second = calls, decoder_calls(model := sharp("llama"))
    assert sum(without_gradient for without_gradient, _ in first) > 0
    two_epochs(tmp_path, model=model, tier=1, verify_context="never")
    # Twice the steps, the same forwards without gradient.
    assert sum(call[0] for call in second) == sum(call[0] for call in first)
    assert sum(not call[0] for call in second) == 2 * sum(not call[0] for call in first)


def test_later_runs_read_from_disk(tmp_path: Path) -> None:
    folder = str(tmp_path / "answers")
    first = two_epochs(tmp_path, distill_cache_dir=folder)
    second = two_epochs(tmp_path, distill_cache_dir=folder)
    assert reused(first) == [0.0, 0.0, 1.0, 1.0]
    assert reused(second) == [1.0] * 4
    assert second.losses == first.losses
    assert len(list(Path(folder).rglob("*.safetensors"))) == len(ROWS)
    without_memory = two_epochs(tmp_path, distill_cache_dir=folder, distill_cache_size="0")
    assert reused(without_memory) == [1.0] * 4
    assert without_memory.losses == first.losses


def changed_base() -> Any:
    model = sharp("llama")
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight[3].mul_(1.5)
    return model


@pytest.mark.parametrize(
    ("loss", "model", "found"),
    [
        (Loss("reverse_kl", 5, likelihood_weight=0.3), None, True),
        pytest.param(Loss(top_k=6), None, False, marks=pytest.mark.slow),
        (Loss(top_k=0), None, False),
        (Loss(top_k=5, temperature=2.0), None, False),
        (LOSS, changed_base, False),
    ],
    ids=["another use of the same", "more tokens", "all tokens", "a temperature", "another base model"],
)
def test_what_else_answers_hang_on(loss: Loss, model: Callable[[], Any] | None, found: bool, tmp_path: Path) -> None:
    fields = {"distill_cache_dir": str(tmp_path / "answers"), "max_steps": 2}
    two_epochs(tmp_path, **fields)
    again = two_epochs(tmp_path, loss, model=model() if model else None, **fields)
    assert reused(again) == [float(found)] * 2


def test_another_adapter_has_the_same_teacher(tmp_path: Path) -> None:
    fields = {"distill_cache_dir": str(tmp_path / "answers"), "max_steps": 2}
    two_epochs(tmp_path, model=adapted("llama", seed=0), **fields)
    assert reused(two_epochs(tmp_path, model=adapted("llama", seed=1), **fields)) == [1.0] * 2


@pytest.mark.slow
def test_hidden_states_know_no_temperature(tmp_path: Path) -> None:
    fields = {"distill_cache_dir": str(tmp_path / "answers"), "max_steps": 2}
    two_epochs(tmp_path, Loss(top_k=0), **fields)
    again = two_epochs(tmp_path, Loss(top_k=0, temperature=2.0), **fields)
    assert reused(again) == [1.0] * 2
    assert again.losses == two_epochs(tmp_path, Loss(top_k=0, temperature=2.0), max_steps=2).losses


def test_a_damaged_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "answers"
    # So that no step begins from what the one before has rounded.
    fields = {"distill_cache_dir": str(folder), "learning_rate": 0.0}
    first = two_epochs(tmp_path, **fields)
    path = sorted(folder.rglob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-5] + b"wrong")
    again = two_epochs(tmp_path, **fields)
    assert sorted(reused(again)[:2]) == [0.5, 1.0]
    # It is computed alone, where it was one of two.
    assert again.losses == pytest.approx(first.losses, rel=1e-5)
    assert "What it held is computed again" in caplog.text


def test_a_folder_that_cannot_be_written_is_reported_under_its_field(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    run = two_epochs(tmp_path, distill_cache_dir=str(tmp_path / "file"))
    assert reused(run) == [0.0, 0.0, 1.0, 1.0]
    assert "`distill_cache_dir` cannot be written" in caplog.text


def test_a_budget_that_is_too_small_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = two_epochs(tmp_path, distill_cache_size="400")
    assert max(reused(run)) < 1.0
    assert caplog.text.count("What the teacher says takes more than `distill_cache_size` (400 bytes)") == 1


def test_the_name_of_a_decision() -> None:
    def key(context: list[int], tokens: list[int], labels: list[int]) -> str:
        return str(
            decision_key(Decision(*(torch.tensor(part, dtype=torch.long) for part in (context, tokens, labels))))
        )

    own = key([1, 2], [3, 4, 5], [-100, 4, 5])
    assert own == key([1, 2], [3, 4, 5], [-100, 4, 5])
    others = [
        key([1, 9], [3, 4, 5], [-100, 4, 5]),
        key([1], [2, 3, 4, 5], [-100, -100, 4, 5]),
        key([1, 2], [3, 9, 5], [-100, 9, 5]),
        key([1, 2], [3, 4, 5], [-100, -100, 5]),
        key([], [1, 2, 3, 4, 5], [-100, -100, -100, 4, 5]),
    ]
    assert len({own, *others}) == 1 + len(others)


def test_contexts_of_a_step_that_begin_alike_are_encoded_once(tmp_path: Path) -> None:
    """One system prompt of 40 tokens in front of four samples, in two micro-batches of a step."""
    shared = torch.arange(3, 43)
    rows = []
    for number, row in enumerate(ROWS):
        # No two go on with the same token.
        front = torch.cat([shared, torch.tensor([50 + number])])
        ids = torch.cat([front, row.teacher.input_ids])
        rows.append(Pair(row.student, Sample(ids, torch.cat([torch.full_like(front, IGNORED), row.teacher.labels]))))
    arguments = config(tmp_path, **LOSS.fields, max_steps=1, gradient_accumulation_steps=2)
    run = train(FrozenContextTrainer, sharp("llama"), arguments, as_dataset(rows))
    counts = run.trainer._distiller.teacher._encoder.counts
    assert counts.num_tokens_asked == sum(row.teacher.boundary for row in rows)
    assert counts.num_tokens_encoded == counts.num_tokens_asked - 3 * len(shared)


def test_figures_about_contexts_are_the_students(tmp_path: Path) -> None:
    students = plain_dataset([row.student for row in ROWS])
    plain = train(FrozenContextTrainer, sharp("llama"), config(tmp_path, max_steps=4), students)
    ours = two_epochs(tmp_path)
    for name in ("context/tokens_encoded", "context/tokens_reused", "num_tokens"):
        assert [entry[name] for entry in ours.logs] == [entry[name] for entry in plain.logs]
    # Both are of the student, before any step.
    assert ours.logs[0]["distill/nll"] == pytest.approx(plain.losses[0], rel=1e-5)
    for name in ("entropy", "mean_token_accuracy"):
        assert ours.logs[0][name] == pytest.approx(plain.logs[0][name], rel=1e-5)
    assert ours.logs[0]["distill/teacher_seconds"] > 0.0
    assert ours.logs[0]["context/decision_seconds"] > 0.0


@pytest.mark.parametrize(("mode", "checks"), [("never", 0), ("first_batch", 1), ("always", 2)])
def test_the_teacher_is_checked(mode: str, checks: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="frozen_peft.training.checks"):
        two_epochs(tmp_path, tier=1, max_steps=2, verify_context=mode)
    texts = [record.getMessage() for record in caplog.records]
    assert sum("agrees with a plain forward" in text for text in texts) == checks
    assert sum("The head gives the model's own log-probabilities" in text for text in texts) == checks


def test_a_teacher_that_lost_its_context_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = verify.encode_context

    def spoiled(*args: Any, **kwargs: Any) -> FrozenContext:
        return encode(*args, **kwargs).mutated("keys_values", torch.zeros_like)

    monkeypatch.setattr(verify, "encode_context", spoiled)
    with pytest.raises(ContextMismatchError, match="does not continue exactly"):
        two_epochs(tmp_path, tier=1)


def test_data_that_nobody_checked_is_checked_at_the_latest_in_the_batch(tmp_path: Path) -> None:
    rows = as_dataset(ROWS[:2]).to_list()
    trainer = two_epochs(tmp_path, max_steps=1, dataset_kwargs={"skip_prepare_dataset": True}).trainer
    rows[1]["teacher_labels"][-1] = 4 if rows[1]["teacher_labels"][-1] != 4 else 5
    with pytest.raises(ValueError, match="is another one with its instructions"):
        trainer.evaluate(Dataset.from_list(rows))

# SPDX-License-Identifier: Apache-2.0
"""Trainings over contexts in 8 bit: the same whether contexts are found or not, checked, and never in vain."""

import logging
from pathlib import Path

import pytest
import torch

from frozen_peft import ContextMismatchError, FrozenContextTrainer
from tests.reference import worst_gradient_error
from tests.training.runs import adapted, as_dataset, config, equal, samples, train
from tests.training.test_store import NUM_TOKENS, encoded, off, on
from tests.training.test_verification import sabotage, zeroed

INT8 = {"context_cache_dtype": "int8"}
ROWS = samples()


def test_later_epochs_train_the_same_whatever_is_found(tmp_path: Path) -> None:
    """Everything, nothing (not one context fits), or what an earlier run has left in files."""
    files = {"context_cache_dir": str(tmp_path / "contexts"), **INT8}
    kept, lost = off(tmp_path, context_cache_size="1GiB", **INT8), off(tmp_path, context_cache_size="1", **INT8)
    runs = [lost, off(tmp_path, **files), off(tmp_path, **files)]
    assert encoded(kept) == encoded(runs[1]) == [*NUM_TOKENS, 0, 0, 0, 0]
    assert encoded(lost) == NUM_TOKENS * 3
    assert encoded(runs[2]) == [0] * 6
    for run in runs:
        assert run.losses == kept.losses
        assert equal(run.weights, kept.weights)
    plain = off(tmp_path)
    assert run.losses != plain.losses
    assert worst_gradient_error(kept.gradients[0], plain.gradients[0]) <= 0.05


@pytest.mark.parametrize("fields", [{}, {"bf16": True}, {"gradient_horizon": 5}], ids=str)
def test_contexts_that_see_the_adapters_are_rounded_in_each_step(fields: dict, tmp_path: Path) -> None:
    runs = [on(tmp_path, context_cache_size=size, **INT8, **fields) for size in ("1GiB", "1")]
    assert runs[0].losses == runs[1].losses
    assert equal(runs[0].weights, runs[1].weights)
    assert runs[0].losses != on(tmp_path, **fields).losses


def test_evaluation_is_rounded_too(tmp_path: Path) -> None:
    run = on(tmp_path, context_cache_size="1GiB", max_context_staleness=9, **INT8)
    rounded = run.trainer.evaluate(as_dataset(ROWS))["eval_loss"]
    run.trainer._frozen.encoder.forget()
    assert run.trainer.evaluate(as_dataset(ROWS))["eval_loss"] == rounded
    run.trainer._frozen.encoder.store = None
    exact = run.trainer.evaluate(as_dataset(ROWS))["eval_loss"]
    assert 0 < abs(rounded - exact) < 1e-2


def test_what_rounding_changes_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="frozen_peft.training.checks"):
        train(FrozenContextTrainer, adapted(), config(tmp_path, context_cache_size="1GiB", **INT8), as_dataset(ROWS))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [
        "The decision over a frozen context agrees with a plain forward",
        "What `context_cache_dtype='int8'` changes in it",
    ]


@pytest.mark.parametrize("kind", ["keys_values", "conv", "recurrent"])
def test_a_lost_state_still_stops_training(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, zeroed(kind))
    with pytest.raises(ContextMismatchError, match="does not continue exactly"):
        train(FrozenContextTrainer, adapted(), config(tmp_path, context_cache_size="1GiB", **INT8), as_dataset(ROWS))


def test_rounding_that_changes_too_much_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frozen_peft.context.store.rounding.LEVELS", 1)
    model = adapted()
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    with pytest.raises(ContextMismatchError, match="context_cache_dtype: auto"):
        train(FrozenContextTrainer, model, config(tmp_path, context_cache_size="1GiB", **INT8), as_dataset(ROWS))
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


def test_it_has_an_effect_or_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`context_cache_dtype='int8'`.*`context_cache_size`.*keep none"):
        config(tmp_path, **INT8)
    with pytest.raises(ValueError, match="`context_cache_dtype` must be one of auto, int8, found 'int4'"):
        config(tmp_path, context_cache_size="1GiB", context_cache_dtype="int4")
    with pytest.raises(ValueError, match="no layer of `mistral` keeps those"):
        train(
            FrozenContextTrainer,
            adapted("mistral"),
            config(tmp_path, context_cache_size="1GiB", **INT8),
            as_dataset(ROWS),
        )

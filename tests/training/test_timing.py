# SPDX-License-Identifier: Apache-2.0
"""What training logs of its time: parts that come to the whole, for next to no time of their own."""

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from frozen_peft import FrozenContextTrainer
from frozen_peft.training.metrics import PARTS, StepTimes
from tests.training.runs import adapted, as_dataset, config, samples, word_tokenizer

# Of a step's time; what the measurements may take.
MAX_OVERHEAD = 0.02


class Steps(TrainerCallback):
    """Takes the processor time of each step of this thread."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.thread_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.thread_time() - self.start)


def trainer_of(folder: Path, model: Any, shapes: Any, callbacks: Any = None, **fields: Any) -> FrozenContextTrainer:
    rows = as_dataset(samples(shapes))
    return FrozenContextTrainer(
        model=model,
        args=config(folder, **fields),
        train_dataset=rows,
        eval_dataset=rows.select([0]),
        processing_class=word_tokenizer(),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_parts_come_to_the_whole(tier: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}
    trainer = trainer_of(tmp_path, adapted(), ((30, 7), (9, 2), (20, 3), (41, 5)), tier=tier, max_steps=4, **fields)
    # A batch takes its time, and so does the loader.
    collate = trainer.data_collator

    def slow_collate(rows: Any) -> Any:
        time.sleep(0.02)
        return collate(rows)

    trainer.data_collator = slow_collate
    trainer.evaluate()
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logged = [entry for entry in trainer.state.log_history if "time/wall_seconds" in entry]
    assert ["loss" in entry for entry in logged] == [True, True, False]
    totals = {part: sum(entry.get(f"time/{part}_seconds", 0.0) for entry in logged) for part in PARTS}
    wall = sum(entry["time/wall_seconds"] for entry in logged)
    assert 0.7 * seconds <= wall <= seconds
    assert sum(totals.values()) <= wall
    # Four batches and one made ahead at most, of 0.02 s each; what is evaluated has batches of its own.
    assert 0.06 <= totals["data"] < wall / 2
    assert totals["compute"] > 0
    assert totals["evaluation"] >= 0.02
    assert totals["saving"] > 0
    contexts = [
        entry["context/prefill_seconds"] + entry["context/decision_seconds"] for entry in logged[:2] if tier == 2
    ]
    for entry, both in zip(logged, contexts, strict=False):
        # Cutting a batch is part of the one, and not of the other.
        assert both == pytest.approx(entry["time/compute_seconds"], rel=0.25)


def test_what_comes_before_training_is_not_counted(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, adapted(), ((9, 2), (20, 3)), max_steps=1)
    trainer.evaluate()
    time.sleep(0.3)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    assert sum(entry.get("time/wall_seconds", 0.0) for entry in trainer.state.log_history) <= seconds
    assert not any("time/evaluation_seconds" in entry for entry in trainer.state.log_history)


def test_measuring_takes_at_most_a_fiftieth_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """The measuring code's own processor time, by itself, against that of the steps which call it.

    Steps of two tiny samples are the worst case: a larger model takes longer, and its measurements do not.
    """
    calls = {"running": 0, "read": 0}
    running, read = StepTimes.running, StepTimes.read

    def counted(name: str, method: Any) -> Any:
        def call(self: Any, *args: Any) -> Any:
            calls[name] += 1
            return method(self, *args)

        return call

    monkeypatch.setattr(StepTimes, "running", counted("running", running))
    monkeypatch.setattr(StepTimes, "read", counted("read", read))
    steps = Steps()
    trainer = trainer_of(tmp_path, adapted(), ((30, 7), (41, 12)) * 4, [steps], max_steps=12, logging_steps=1)
    trainer.train()
    assert calls == {"running": 2 * 12, "read": 13}

    times, contexts = StepTimes(torch.device("cpu")), trainer._frozen.metrics
    costs = []
    for _ in range(200):
        start = time.thread_time()
        # What one step does, and the log after it.
        for part in ("data", "compute"):
            with running(times, part):
                pass
        with contexts.step("train"), contexts.prefill("train"):
            contexts._encoder.counts.num_tokens_asked += 1
        read(times)
        assert contexts.read("train")
        costs.append(time.thread_time() - start)
    share = statistics.median(costs) / statistics.median(steps.seconds)
    record_property("share", share)
    print(
        f"measuring takes {statistics.median(costs) * 1e6:.1f} us of {statistics.median(steps.seconds) * 1e3:.1f} ms"
    )
    assert share <= MAX_OVERHEAD

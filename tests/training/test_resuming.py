# SPDX-License-Identifier: Apache-2.0
"""A run that goes on from a checkpoint ends like one that was never stopped, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_peft import FrozenContextTrainer
from tests.distillation.pairs import as_dataset as pairs_as_dataset
from tests.distillation.pairs import pairs
from tests.reference import IGNORED, Sample
from tests.tiny_models import tiny_model
from tests.training.runs import Run, as_dataset, config, equal, fresh_lora, samples, train
from tests.training.test_activated import ROWS as INVOKED
from tests.training.test_activated import TOKENS

ROWS = samples()
SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}


def with_shared_documents(before_decision: tuple[int, ...] = ()) -> list[Sample]:
    """Contexts that begin alike, so that where they are cut depends on which are known."""
    made = []
    before = torch.tensor(before_decision, dtype=torch.long)
    for seed in range(8):
        document = torch.randint(3, 95, (130,), generator=torch.Generator().manual_seed(seed % 2))
        tail = torch.randint(3, 95, (20 + seed,), generator=torch.Generator().manual_seed(100 + seed))
        input_ids = torch.cat([document, tail[:-5], before, tail[-5:]])
        labels = input_ids.clone()
        labels[:-5] = IGNORED
        made.append(Sample(input_ids, labels))
    return made


SHARED = with_shared_documents()
BY_THE_BASE = {
    "context_adapters": False,
    "train_sampling_strategy": "random",
    "context_cache_size": "1GiB",
    "save_steps": 3,
    "max_steps": 8,
}
STALE = {"max_context_staleness": 5, "context_cache_size": "1GiB", "save_steps": 3, "max_steps": 8}
CASES = {
    "dropout": ({}, ROWS),
    "shuffled": ({"train_sampling_strategy": "random", "gradient_accumulation_steps": 2, "max_steps": 3}, ROWS),
    "grouped": ({"group_by_context": True, "train_sampling_strategy": "random", "max_steps": 4}, SHARED),
    # The first step leaves the weights as they are, and so its contexts are good in the second.
    "warmup": ({"lr_scheduler_type": "cosine", "warmup_steps": 2, "context_cache_size": "1GiB"}, SHARED),
    "stale": (STALE, SHARED),
    "stale, few kept": ({**STALE, "context_cache_size": "200KiB"}, SHARED),
    "encoded by the base": (BY_THE_BASE, INVOKED),
    "encoded by the base, shared": ({**BY_THE_BASE, "save_steps": 1}, with_shared_documents(TOKENS)),
    "encoded by the base, few kept": (
        {**BY_THE_BASE, "context_cache_size": "130KiB", "gradient_accumulation_steps": 2},
        with_shared_documents(TOKENS),
    ),
    "encoded by the base, rounded": ({**BY_THE_BASE, "context_cache_dtype": "int8"}, with_shared_documents(TOKENS)),
    "distilled": (
        {
            "loss_type": "distill",
            "train_sampling_strategy": "random",
            "context_cache_size": "1GiB",
            "save_steps": 3,
            "max_steps": 8,
        },
        pairs(),
    ),
    "stretches": ({"tier": 1, "sequence_chunk_size": 32, "max_steps": 3}, ROWS),
    "evaluated": ({"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, ROWS[:4]),
}


def run(folder: Path, fields: dict[str, Any], rows: list[Any], resume: Path | None = None) -> Run:
    held_out = {"eval_dataset": as_dataset(ROWS[:2])} if "eval_strategy" in fields else {}
    arguments = config(folder, **({"max_steps": 5} | SAVING | fields))
    dataset = pairs_as_dataset(rows) if "loss_type" in fields else as_dataset(rows)
    model = fresh_lora(tiny_model("qwen3_5_text"), lora_dropout=0.2)
    return train(FrozenContextTrainer, model, arguments, dataset, resume=resume and str(resume), **held_out)


@pytest.mark.parametrize("case", [case for case in CASES if case != "warmup"])
def test_the_middle_checkpoint_and_the_last_lead_to_the_same_weights(case: str, tmp_path: Path) -> None:
    check(case, tmp_path, every=False)


# Of "warmup" each checkpoint has other contexts that are still good; the rest of them takes minutes.
@pytest.mark.parametrize(
    "case", [case if case == "warmup" else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_every_checkpoint_leads_to_the_same_weights(case: str, tmp_path: Path) -> None:
    check(case, tmp_path, every=True)


def check(case: str, tmp_path: Path, *, every: bool) -> None:
    """Resumes from every checkpoint, or from the middle and the last."""
    fields, rows = CASES[case]
    whole = run(tmp_path, fields, rows)
    num_steps = whole.trainer.state.global_step
    steps = sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert steps[-1] == num_steps
    for step in steps if every else [steps[(len(steps) - 1) // 2], steps[-1]]:
        # Adapters are drawn anew, and differ until the checkpoint is read.
        torch.manual_seed(step)
        resumed = run(tmp_path / "resumed", fields, rows, resume=tmp_path / f"checkpoint-{step}")
        assert resumed.trainer.state.global_step == num_steps
        assert len(resumed.gradients) == num_steps - step
        assert equal(resumed.weights, whole.weights), f"resumed from step {step}"

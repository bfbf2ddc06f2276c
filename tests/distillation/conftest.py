# SPDX-License-Identifier: Apache-2.0
"""Keeps many short trainings quick, and what they wrote."""

import gc
from collections.abc import Sequence

import pytest
import torch

from frozen_peft.context import FrozenContext
from frozen_peft.distillation import Prompt, Writer
from tests.distillation.own_answers import Written


@pytest.fixture(scope="session", autouse=True)
def imported_objects_left_out_of_garbage_collection() -> None:
    """accelerate collects garbage before every training, a third of its time over what imports left behind."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Written]:
    """What is written from here on, by micro-batch."""
    kept: list[Written] = []
    write = Writer.write

    def keep(self: Writer, prompts: Sequence[Prompt], frozen: FrozenContext | None) -> list[list[torch.Tensor]]:
        answers = write(self, prompts, frozen)
        kept.append(Written(list(prompts), answers, frozen))
        return answers

    monkeypatch.setattr(Writer, "write", keep)
    return kept

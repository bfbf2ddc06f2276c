# SPDX-License-Identifier: Apache-2.0
"""Keeps many short trainings quick, and what they wrote."""

import gc

import pytest

from frozen_peft.distillation import Writer
from tests.distillation.own_answers import Written, keeping


@pytest.fixture(scope="session", autouse=True)
def imported_objects_left_out_of_garbage_collection() -> None:
    """accelerate collects garbage before every training, a third of its time over what imports left behind."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Written]:
    """What is written from here on, by micro-batch."""
    kept: list[Written] = []
    monkeypatch.setattr(Writer, "write", keeping(kept))
    return kept

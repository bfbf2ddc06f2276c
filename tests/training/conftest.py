# SPDX-License-Identifier: Apache-2.0
"""Keeps many short trainings quick."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def imported_objects_left_out_of_garbage_collection() -> None:
    """accelerate collects garbage before every training, a third of its time over what imports left behind."""
    gc.collect()
    gc.freeze()

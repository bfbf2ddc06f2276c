# SPDX-License-Identifier: Apache-2.0
"""The computed table of memory: known sizes of the model, sums by hand, and the page that is kept."""

import pytest

from tests.benchmarks.memory_table import ADAPTERS, CONTEXTS, DECISION, METHODS, PAGE, SHAPE, page, terms


def test_sizes_of_the_model() -> None:
    assert SHAPE.key_value_bytes == 64 * 1024
    assert SHAPE.state_bytes == 48 * (48 * 128 * 128 * 4 + 10240 * 4 * 2)
    assert 26.5e9 < SHAPE.linear_weights + 2 * SHAPE.vocabulary * SHAPE.hidden < 27.5e9
    assert 17e9 < SHAPE.weight_bytes < 18.5e9
    assert SHAPE.checkpointed_bytes * CONTEXTS["128k"] == pytest.approx(86e9, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_weights_and_adapters_are_on_the_card_whatever_the_method(method: str) -> None:
    found = terms(method, CONTEXTS["32k"])
    assert found["weights"] == SHAPE.weight_bytes
    assert found["adapters"] == ADAPTERS


def test_stretches_keep_three_times_the_keys_and_values() -> None:
    found, length = terms("tier 3, stretches", CONTEXTS["128k"]), CONTEXTS["128k"] + DECISION
    assert found["cache"] + found["cache gradient"] == 3 * 64 * 1024 * length


def test_more_context_takes_more_by_every_method() -> None:
    for method in METHODS:
        sums = [sum(terms(method, context).values()) for context in CONTEXTS.values()]
        assert sums == sorted(set(sums))


def test_the_page_is_what_the_formulas_say() -> None:
    assert PAGE.read_text() == page()

# SPDX-License-Identifier: Apache-2.0
"""The planned table of memory: known sizes of the model, sums by hand, and the page that is kept."""

import pytest

from tests.benchmarks.memory_table import CONTEXTS, DECISION, METHODS, PAGE, STRETCH, page, plan

HIDDEN, LAYERS, TOKEN_BYTES = 5120, 64, 64 * 1024
STATES = 48 * (48 * 128 * 128 * 4 + 10240 * 4 * 2)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_cache_of_tier_2_is_that_of_its_context(context: str) -> None:
    assert plan("tier 2", context).terms["cache"] == TOKEN_BYTES * CONTEXTS[context] + STATES


@pytest.mark.parametrize("context", CONTEXTS)
def test_stretches_hand_on_three_times_the_keys_and_values(context: str) -> None:
    terms = plan("tier 3, stretches", context).terms
    num_before = (CONTEXTS[context] + DECISION - 1) // STRETCH
    keys_and_values = TOKEN_BYTES * num_before * STRETCH
    assert terms["cache"] == keys_and_values + num_before * STATES
    assert terms["cache gradient"] == 2 * keys_and_values
    assert terms["last hidden states"] == 2 * 2 * HIDDEN * DECISION


def test_what_is_on_the_host_is_not_on_the_card() -> None:
    card, host = plan("tier 3, stretches", "128k"), plan("tier 3, stretches, handed on by the host", "128k")
    assert host.host_bytes == card.terms["cache"] + card.terms["cache gradient"]
    assert card.total_bytes - host.total_bytes == host.host_bytes - STATES


@pytest.mark.parametrize("context", CONTEXTS)
def test_layer_checkpointing_keeps_a_hidden_state_per_layer(context: str) -> None:
    kept = plan("tier 3, layer checkpointing", context).terms["activations"]
    # And the embedded tokens, the final norm's input in float32 and rotary embeddings.
    assert 1.0 <= kept / (2 * HIDDEN * LAYERS * (CONTEXTS[context] + DECISION)) < 1.06


def test_more_context_takes_more_by_every_method() -> None:
    for method in METHODS:
        plans = [plan(method, context) for context in CONTEXTS]
        sums = [found.total_bytes + found.host_bytes for found in plans]
        assert sums == sorted(set(sums))


def test_with_all_that_is_handed_on_in_host_memory_the_card_holds_any_length() -> None:
    sums = {plan("tier 3, stretches, handed on by the host", context).total_bytes for context in CONTEXTS}
    assert len(sums) == 1


def test_the_page_is_what_the_planner_says() -> None:
    assert PAGE.read_text() == page()

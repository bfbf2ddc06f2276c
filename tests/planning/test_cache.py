# SPDX-License-Identifier: Apache-2.0
"""The planned cache against the tensors of real frozen contexts, and the planned weights against loaded ones."""

import pytest
import torch
from peft import get_peft_model

from frozen_peft import lora_config
from frozen_peft.context import encode_context
from frozen_peft.planning import Setting, make_plan, plan_of_weights
from frozen_peft.planning.terms import terms_of
from tests.tiny_models import ARCHITECTURES, tiny_model

# Short of a sliding window of 16 tokens, at it, and well beyond several chunks of 64.
LENGTHS = (5, 16, 150)


def setting(context_length: int, **rest: object) -> Setting:
    fields = {"dtype": "float32", "bf16": False, "accelerator": False, "lora_preset": "all-linear", **rest}
    return Setting(2, context_length, 8, **fields)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cache_bytes_are_those_of_a_frozen_context(name: str) -> None:
    model = tiny_model(name)
    cache = terms_of(model.config).cache(setting(0))
    for length in LENGTHS:
        frozen = encode_context(model, [torch.arange(length) % 90])
        assert cache.num_bytes(length) == frozen.num_bytes, length


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_and_adapters_are_those_of_the_model(name: str) -> None:
    model = tiny_model(name)
    # As a saved checkpoint has it: of which class it is.
    model.config.architectures = [type(model).__name__]
    plan = plan_of_weights(model.config, setting(16, lora_r=3))
    assert plan.terms["weights"] == sum(p.numel() * 4 for p in model.parameters())
    adapted = get_peft_model(model, lora_config(model, preset="all-linear", r=3))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert plan.terms["adapters"] == 4 * trained
    assert plan.terms["gradients"] == 4 * trained
    assert plan.terms["optimizer"] == 8 * trained


def test_a_batch_has_a_cache_for_each_sample() -> None:
    config = tiny_model("llama").config
    assert make_plan(config, setting(40, batch=3)).terms["cache"] == 3 * make_plan(config, setting(40)).terms["cache"]


def test_a_horizon_is_no_part_of_the_cache() -> None:
    config = tiny_model("llama").config
    plan = make_plan(config, setting(40, gradient_horizon=10))
    assert plan.terms["cache"] == make_plan(config, setting(30)).terms["cache"]


def test_of_latents_a_decision_keeps_nothing_that_grows_with_the_context() -> None:
    config = tiny_model("deepseek_v3").config
    short, long = (make_plan(config, setting(length, gradient_checkpointing=False)) for length in (64, 1024))
    assert short.terms["activations"] == long.terms["activations"] > 0


@pytest.mark.parametrize("name", ["qwen3_5_text", "gemma3_text", "falcon_h1", "llama"])
def test_turns_share_keys_and_values_and_keep_a_state_each(name: str) -> None:
    """Bytes of all tensors that the contexts of one conversation hold together."""
    model = tiny_model(name)
    cache = terms_of(model.config).cache(setting(0))
    conversation = torch.arange(150) % 90
    frozen = encode_context(model, [conversation[:length] for length in (30, 66, 109, 150)])
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for row in frozen.rows
        for tensor in row.tensors()
    }
    assert cache.num_bytes(150, 4) == sum(storages.values())


@pytest.mark.parametrize(("batch", "turns", "together"), [(1, 5, 2), (3, 4, 16), (3, 4, 6), (4, 3, 2), (5, 1, 2)])
def test_samples_whose_decisions_run_together(batch: int, turns: int, together: int) -> None:
    sample_of = [sample for sample in range(batch) for _ in range(turns)]
    size = together if turns > 1 else batch
    parts = [set(sample_of[start : start + size]) for start in range(0, len(sample_of), size)]
    planned = setting(40, batch=batch, turns=turns, max_decisions_per_forward=together)
    assert planned.samples_at_a_time == max(map(len, parts))
    assert planned.decisions_per_forward == min(size, len(sample_of))


def test_turns_and_a_teacher_count() -> None:
    config = tiny_model("qwen3_5_text").config
    one, several, taught = (
        make_plan(config, setting(150, **fields)) for fields in ({}, {"turns": 4}, {"teacher_length": 180})
    )
    cache = terms_of(config).cache(setting(0))
    assert several.terms["cache"] - one.terms["cache"] == 3 * cache.state_bytes
    assert several.terms["activations"] > 2 * one.terms["activations"]
    assert taught.terms["cache"] == one.terms["cache"]
    total = taught.total_bytes - taught.terms["workspace"] - taught.terms["activations"] - taught.terms["teacher"]
    assert taught.total_bytes > total + cache.num_bytes(180)
    quick = plan_of_weights(config, setting(150, teacher_length=180))
    assert quick.terms["teacher"] == cache.num_bytes(180)

# SPDX-License-Identifier: Apache-2.0
"""The planned cache against the tensors of real frozen contexts, and the planned weights against loaded ones."""

import pytest
import torch
from peft import get_peft_model

from frozen_peft import lora_config
from frozen_peft.context import encode_context
from frozen_peft.planning import Setting, make_plan
from frozen_peft.planning.blueprint import Blueprint
from frozen_peft.planning.estimating import estimator_of
from frozen_peft.planning.traces import Tracer
from tests.tiny_models import ARCHITECTURES, tiny_model

# Short of a sliding window of 16 tokens, at it, and well beyond several chunks of 64.
LENGTHS = (5, 16, 150)


def setting(context_length: int, **rest: object) -> Setting:
    fields = {"dtype": "float32", "bf16": False, "accelerator": False, "lora_preset": "all-linear", **rest}
    return Setting(2, context_length, 8, **fields)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cache_bytes_are_those_of_a_frozen_context(name: str) -> None:
    model = tiny_model(name)
    cache = estimator_of(model.config).cache(setting(0))
    for length in LENGTHS:
        frozen = encode_context(model, [torch.arange(length) % 90])
        assert cache.num_bytes(length) == frozen.num_bytes, length


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_and_adapters_are_those_of_the_model(name: str) -> None:
    model = tiny_model(name)
    # As a saved checkpoint has it: of which class it is.
    model.config.architectures = [type(model).__name__]
    plan = estimator_of(model.config).weights(setting(16, lora_r=3))
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
    plain = setting(64, gradient_checkpointing=False)
    tracer = Tracer(Blueprint(tiny_model("deepseek_v3").config, plain), plain)
    short, long = (tracer.graded(9, num_frozen).kept for num_frozen in (64, 1024))
    assert short == long > 0

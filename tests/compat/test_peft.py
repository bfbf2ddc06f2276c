# SPDX-License-Identifier: Apache-2.0
"""What is used of PEFT beyond what it promises is there, and still needed."""

import inspect

import peft
import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from frozen_peft.utils.compat.peft import ALoraLinearVariant, is_dora, unredirected_modules, variant_name
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("fields", "name"),
    [({}, None), ({"use_dora": True}, "DoraLinearVariant"), ({"alora_invocation_tokens": [3]}, "ALoraLinearVariant")],
)
def test_layers_say_by_which_variant_they_run(fields: dict, name: str | None) -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **fields))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    assert variant_name(layer, "default") == name
    assert is_dora(layer, "default") == (name == "DoraLinearVariant")


def test_activated_lora_cannot_be_told_that_all_tokens_see_the_adapter() -> None:
    source = inspect.getsource(ALoraLinearVariant.forward)
    # Without offsets it leaves the adapter out.
    assert "if alora_offsets is None:" in source
    assert not hasattr(peft, "ALoraLinearVariant")


def test_shared_experts_are_still_taken_for_routed_ones() -> None:
    """Without that, `unredirected_modules` can go."""
    model = tiny_model("qwen3_next")
    shared = [f"model.layers.0.mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down")]
    kept = ["model.layers.1.self_attn.q_proj"]
    assert unredirected_modules(model, [*shared, *kept]) == kept

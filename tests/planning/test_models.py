# SPDX-License-Identifier: Apache-2.0
"""The configurations that ship, held to published counts and to sums by hand, and names that are near or far."""

import json
from pathlib import Path

import pytest

from frozen_peft.planning import KNOWN_MODELS, Setting, load_config, make_plan, plan_of_weights
from frozen_peft.planning.shapes import Cache
from frozen_peft.planning.terms import terms_of

# What the checkpoints' own indices add up to (`total_parameters`, or bytes over two), but for Qwen3.5-27B, of which
# the text model is planned.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 79_674_391_296,
    "openai/gpt-oss-20b": 20_914_757_184,
}


def cache_of(name: str) -> Cache:
    return terms_of(load_config(name)).cache(Setting(2, 4096, 64))


def qwen3_5_27b() -> int:
    """Layer by layer: 48 of Gated DeltaNet, 16 of attention, an MLP in each."""
    hidden, mlp = 5120, 17408
    queries, keys = 24 * 256, 4 * 256
    attention = hidden * 2 * queries + 2 * hidden * keys + queries * hidden + 2 * 256
    channels, values = (2 * 16 + 48) * 128, 48 * 128
    delta = hidden * (channels + values + 2 * 48) + channels * 4 + 2 * 48 + 128 + values * hidden
    layers = 48 * delta + 16 * attention + 64 * (3 * hidden * mlp + 2 * hidden)
    return layers + hidden + 2 * 248320 * hidden


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_parameters_are_those_published(name: str) -> None:
    expected = qwen3_5_27b() if name == "Qwen/Qwen3.5-27B" else PUBLISHED[name]
    plan = plan_of_weights(load_config(name), Setting(2, 4096, 64))
    assert plan.num_parameters == expected
    assert plan.terms["weights"] == 2 * expected


@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [
        ("Qwen/Qwen3.5-27B", 64 * 1024),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 12 * 2 * 2 * 256 * 2),
        ("meta-llama/Llama-3.1-70B-Instruct", 80 * 2 * 8 * 128 * 2),
        # Every other layer keeps 127 tokens, whatever the length.
        ("openai/gpt-oss-20b", 12 * 2 * 8 * 64 * 2),
    ],
)
def test_cache_bytes_of_a_token(name: str, token_bytes: int) -> None:
    cache = cache_of(name)
    assert cache.token_bytes == token_bytes
    assert cache.num_bytes(100_001) - cache.num_bytes(100_000) == token_bytes


def test_a_window_keeps_its_last_tokens() -> None:
    assert cache_of("gpt-oss-20b").num_bytes(4096) == 12 * 2 * 8 * 64 * 2 * (4096 + 127)


def test_states_take_as_much_whatever_the_length() -> None:
    states = 48 * (48 * 128 * 128 * 4 + 10240 * 4 * 2)
    assert cache_of("Qwen3.5-27B").num_bytes(4096) == 4096 * 64 * 1024 + states


@pytest.mark.parametrize(
    ("name", "near"), [("Qwen3.5-27", "Qwen/Qwen3.5-27B"), ("lama-3.1-70b-instruct", "meta-llama/Llama-3.1-70B")]
)
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"no model '{name}'.*Did you mean.*{near}"):
        load_config(name)


def test_a_name_like_no_other_gets_them_all() -> None:
    with pytest.raises(ValueError, match=r"Known without the hub: Qwen/Qwen3.5-27B, "):
        load_config("zzz")


def test_a_folder_and_its_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS["Qwen/Qwen3-8B"]))
    assert load_config(str(tmp_path)).hidden_size == 4096
    assert load_config(str(tmp_path / "config.json")).num_hidden_layers == 36


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file .*config.json"),
        ("{", "is not JSON"),
        ("[]", "holds a JSON list, not an object"),
        ("{}", "no `model_type`"),
    ],
)
def test_a_folder_without_a_configuration(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path))


def test_a_family_that_nobody_knows_has_a_plan_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "hidden_size": 64}))
    plan = make_plan(load_config(str(tmp_path)), Setting(2, 4096, 64), memory_limit=1 << 30)
    assert {text.partition(":")[0] for text in plan.unknown} >= {"weights", "cache", "activations"}
    assert plan.fits is None
    assert plan.longest_context() is None


def test_a_family_without_roles_has_all_but_the_adapters(tmp_path: Path) -> None:
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "vocab_size": 99, **fields}))
    config = load_config(str(tmp_path))
    plan = make_plan(config, Setting(2, 100, 8), memory_limit=1 << 40)
    assert [text.partition(":")[0] for text in plan.unknown[:3]] == ["adapters", "gradients", "optimizer"]
    assert "No roles are known" in plan.unknown[0]
    layer = (3 * 32 * 32 + 3 * 32) + (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 4 * 32
    assert plan.terms["weights"] == 2 * (2 * 99 * 32 + 2 * layer + 2 * 32)
    assert plan.terms["cache"] == 100 * 2 * 2 * 32 * 2
    assert plan.fits is None
    assert not make_plan(config, Setting(2, 100, 8, lora_preset="all-linear")).unknown

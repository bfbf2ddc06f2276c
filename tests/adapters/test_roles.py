# SPDX-License-Identifier: Apache-2.0
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from frozen_peft.adapters import find_roles
from frozen_peft.adapters.lora import matches_by_module
from frozen_peft.adapters.role_table import ROLES
from frozen_peft.adapters.roles import rows_of_roles
from frozen_peft.errors import UnsupportedArchitectureError
from tests.tiny_models import ARCHITECTURES, REFUSABLE, VOCAB_SIZE, tiny_model

ATTENTION = {
    "query": {"self_attn.q_proj"},
    "key": {"self_attn.k_proj"},
    "value": {"self_attn.v_proj"},
    "output": {"self_attn.o_proj"},
}
DENSE = {"mlp": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}}
SHARED = {f"mlp.shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")}
QWEN3_5 = {
    **ATTENTION,
    "gate": {"self_attn.q_proj", "linear_attn.in_proj_z"},
    "beta": {"linear_attn.in_proj_b"},
    "decay": {"linear_attn.in_proj_a"},
    **{f"gdn_{part}": {"linear_attn.in_proj_qkv"} for part in ("query", "key", "value")},
    "gdn_output": {"linear_attn.out_proj"},
}
FEED_FORWARD = {"feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"}


def mamba2(name: str) -> dict[str, set[str]]:
    return {role: {name} for role in ("gate", "decay", "gdn_query", "gdn_key", "gdn_value")}


EXPECTED: dict[str, dict[str, set[str]]] = {
    "qwen3_5_text": {**QWEN3_5, **DENSE},
    "qwen3_5": {**QWEN3_5, **DENSE},
    "qwen3_5_moe_text": {**QWEN3_5, "mlp": SHARED},
    "qwen3_next": {
        **ATTENTION,
        "gate": {"self_attn.q_proj", "linear_attn.in_proj_qkvz"},
        "beta": {"linear_attn.in_proj_ba"},
        "decay": {"linear_attn.in_proj_ba"},
        **{f"gdn_{part}": {"linear_attn.in_proj_qkvz"} for part in ("query", "key", "value")},
        "gdn_output": {"linear_attn.out_proj"},
        "mlp": SHARED | DENSE["mlp"],
    },
    "olmo_hybrid": {
        **ATTENTION,
        **DENSE,
        "gate": {"linear_attn.g_proj"},
        "beta": {"linear_attn.b_proj"},
        "decay": {"linear_attn.a_proj"},
        "gdn_query": {"linear_attn.q_proj"},
        "gdn_key": {"linear_attn.k_proj"},
        "gdn_value": {"linear_attn.v_proj"},
        "gdn_output": {"linear_attn.o_proj"},
    },
    "kimi_linear": {
        "query": {"self_attn.q_proj"},
        "key": {"self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"},
        "value": {"self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"},
        "output": {"self_attn.o_proj"},
        "gate": {"self_attn.g_a_proj", "self_attn.g_b_proj"},
        "beta": {"self_attn.b_proj"},
        "decay": {"self_attn.forget_gate.f_a_proj", "self_attn.forget_gate.f_b_proj"},
        "gdn_query": {"self_attn.q_proj"},
        "gdn_key": {"self_attn.k_proj"},
        "gdn_value": {"self_attn.v_proj"},
        "gdn_output": {"self_attn.o_proj"},
        "mlp": DENSE["mlp"] | {path.replace("expert", "experts") for path in SHARED},
    },
    "falcon_h1": {**ATTENTION, **mamba2("mamba.in_proj"), "mlp": FEED_FORWARD},
    "granitemoehybrid": {
        **ATTENTION,
        **mamba2("mamba.in_proj"),
        "mlp": {"shared_mlp.input_linear", "shared_mlp.output_linear"},
    },
    "nemotron_h": {
        **{role: {path.replace("self_attn", "mixer") for path in paths} for role, paths in ATTENTION.items()},
        **mamba2("mixer.in_proj"),
        "mlp": {f"mixer.{owner}{leaf}" for owner in ("", "shared_experts.") for leaf in ("up_proj", "down_proj")},
    },
    "lfm2": {
        **ATTENTION,
        "output": {"self_attn.out_proj"},
        "beta": {"conv.in_proj"},
        "gate": {"conv.in_proj"},
        "gdn_value": {"conv.in_proj"},
        "gdn_output": {"conv.out_proj"},
        "mlp": {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"},
    },
    **{key: {**ATTENTION, **DENSE} for key in ("llama", "qwen3", "mistral", "gemma3_text")},
    "gpt_oss": ATTENTION,
    "glm4_moe": {**ATTENTION, "mlp": DENSE["mlp"] | {path.replace("expert", "experts") for path in SHARED}},
    "gpt2": {
        **{key: {"attn.c_attn"} for key in ("query", "key", "value")},
        "output": {"attn.c_proj"},
        "mlp": {"mlp.c_fc", "mlp.c_proj"},
    },
    "bamba": {**ATTENTION, **mamba2("mamba.in_proj"), "mlp": FEED_FORWARD},
    "jamba": {**ATTENTION, "mlp": FEED_FORWARD},
    "recurrent_gemma": {
        **{role: {path.replace("self_attn", "temporal_block") for path in paths} for role, paths in ATTENTION.items()},
        "mlp": {"mlp_block.gate_proj", "mlp_block.up_proj", "mlp_block.down_proj"},
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES + REFUSABLE)
def test_every_role_is_found_where_it_belongs(name: str) -> None:
    found = defaultdict(set)
    for match in find_roles(tiny_model(name)):
        found[match.role].add(match.path)

    assert dict(found) == EXPECTED[name]


@pytest.mark.parametrize("name", ARCHITECTURES + REFUSABLE)
def test_roles_share_out_every_row_of_a_module(name: str) -> None:
    model = tiny_model(name)
    for module, matches in matches_by_module(find_roles(model)).items():
        weight = model.get_submodule(module).weight
        assert matches[0].out_features in weight.shape
        assert rows_of_roles(matches, ROLES).all()
        if matches[0].path != "self_attn.kv_a_proj_with_mqa":  # the latent serves keys and values alike
            num_rows = sum(rows_of_roles([match], [match.role]).sum() for match in matches)
            assert num_rows == matches[0].out_features


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear", "falcon_h1", "gpt2"])
def test_roles_are_the_same_from_model_config_path_and_under_peft(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    expected = find_roles(model)
    model.save_pretrained(tmp_path)
    config = LoraConfig(target_modules=[match.module for match in expected if match.role != "mlp"])

    assert find_roles(model.config) == expected
    assert find_roles(str(tmp_path)) == expected
    assert find_roles(get_peft_model(model, config)) == expected


def test_vision_tower_and_head_have_no_role() -> None:
    model = tiny_model("qwen3_5")
    modules = {match.module for match in find_roles(model)}

    assert all(module.startswith("model.language_model.layers.") for module in modules)
    assert any("visual" in name for name, module in model.named_modules() if isinstance(module, nn.Linear))


def test_unknown_architecture_lists_its_linear_modules() -> None:
    config = Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, pad_token_id=0
    )
    with pytest.raises(UnsupportedArchitectureError, match=r"'phi3'.*layers\.\*\.self_attn\.qkv_proj.*all-linear"):
        find_roles(AutoModelForCausalLM.from_config(config))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`model_or_config` must be a model.*got int"):
        find_roles(3)  # type: ignore[arg-type]


@contextmanager
def recorded(model: PreTrainedModel, function: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record what a function of the modeling file is called with."""
    modeling = sys.modules[type(model).__module__]
    calls: list[Any] = []
    original = getattr(modeling, function)

    def recording(*args: Any, **kwargs: Any) -> Any:
        calls.append({**dict(enumerate(args)), **kwargs})
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(modeling, function, recording)
        yield calls


def shifted(module: nn.Module, rows: torch.Tensor, run: Callable[[], Any]) -> Any:
    """What `run` gives with the outputs `rows` of `module` shifted."""
    handle = module.register_forward_hook(lambda _module, _args, output: output + rows.to(output.dtype))
    try:
        return run()
    finally:
        handle.remove()


def changed(before: Any, after: Any, name: Any) -> bool:
    return not torch.equal(before[name], after[name])


# Arguments of the recurrence that a shift of the rows of each role must change, and no other.
GDN = ("torch_chunk_gated_delta_rule", {"gdn_query": 0, "gdn_key": 1, "gdn_value": 2, "beta": "beta", "decay": "g"})
MAMBA2 = ("mamba2_chunk_scan", {"gdn_value": 0, "decay": 1, "gdn_key": 3, "gdn_query": 4})
RECURRENCES = {
    "qwen3_5_text": GDN,
    "qwen3_next": GDN,
    "olmo_hybrid": GDN,
    "falcon_h1": MAMBA2,
    "granitemoehybrid": MAMBA2,
    "nemotron_h": MAMBA2,
    "bamba": MAMBA2,
}


@pytest.mark.parametrize("name", RECURRENCES)
@torch.no_grad()
def test_rows_of_a_role_reach_that_argument_of_the_recurrence_and_no_other(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, arguments = RECURRENCES[name]
    model = tiny_model(name)
    input_ids = torch.randint(VOCAB_SIZE, (1, 7))

    def first_call() -> dict[Any, Any]:
        with recorded(model, function, monkeypatch) as calls:
            model(input_ids)
        return calls[0]

    reference = first_call()
    checked = set()
    # The first recurrent layer is layer 0 in all of these models, and what it gets comes from its own projections.
    for match in find_roles(model):
        if match.layer == 0 and match.role in {*arguments, "gate"}:
            rows = rows_of_roles([match], [match.role])
            shifted_call = shifted(model.get_submodule(match.module), rows, first_call)
            reached = {role for role, argument in arguments.items() if changed(reference, shifted_call, argument)}
            assert reached == {match.role} - {"gate"}
            checked.add(match.role)
    assert checked == {*arguments, "gate"}


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next"])
@torch.no_grad()
def test_query_rows_of_a_gated_attention_reach_the_query_and_its_gate_rows_do_not(name: str) -> None:
    model = tiny_model(name)
    attention = model.model.layers[1].self_attn
    seen = []
    attention.q_norm.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    attention.o_proj.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    input_ids = torch.randint(VOCAB_SIZE, (1, 7))

    def query_and_output() -> list[torch.Tensor]:
        seen.clear()
        model(input_ids)
        return list(seen)

    reference = query_and_output()
    matches = [match for match in find_roles(model) if match.module == "model.layers.1.self_attn.q_proj"]
    shift = {
        match.role: shifted(attention.q_proj, rows_of_roles([match], [match.role]), query_and_output)
        for match in matches
    }
    assert not torch.equal(shift["query"][0], reference[0])
    assert torch.equal(shift["gate"][0], reference[0])
    assert not torch.equal(shift["gate"][1], reference[1])


@torch.no_grad()
def test_rows_of_a_short_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("lfm2")
    mixer = model.model.layers[0].conv
    seen: dict[str, torch.Tensor] = {}
    mixer.in_proj.register_forward_hook(lambda _module, _args, output: seen.update(projected=output))
    mixer.out_proj.register_forward_hook(lambda _module, args, _output: seen.update(read=args[0]))
    input_ids = torch.randint(VOCAB_SIZE, (1, 7))

    def written_and_read() -> tuple[torch.Tensor, torch.Tensor]:
        with recorded(model, "causal_conv1d_fn", monkeypatch) as calls:
            model(input_ids)
        return calls[0][0], seen["read"]

    written, read = written_and_read()
    factors = dict(zip(("beta", "gate", "gdn_value"), seen["projected"].mT.chunk(3, dim=1), strict=True))
    matches = [match for match in find_roles(model) if match.module == "model.layers.0.conv.in_proj"]
    moved = {
        match.role: shifted(mixer.in_proj, rows_of_roles([match], [match.role]), written_and_read) for match in matches
    }
    assert set(moved) == set(factors)
    assert torch.equal(moved["gate"][0], written)
    assert not torch.equal(moved["gate"][1], read)
    # What is written is the product of the two, so shifting one by 1 adds the other.
    torch.testing.assert_close(moved["gdn_value"][0] - written, factors["beta"], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved["beta"][0] - written, factors["gdn_value"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_latent_attention() -> None:
    model = tiny_model("kimi_linear")
    attention = model.model.layers[1].self_attn
    hidden = torch.randn(1, 5, 32)
    rows = {
        (match.path, match.role): rows_of_roles([match], [match.role])
        for match in find_roles(model)
        if match.layer == 1 and match.role in ("key", "value")
    }

    def keys_and_values(latent_shift: torch.Tensor, expanded_shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent, rotary = (attention.kv_a_proj_with_mqa(hidden) + latent_shift).split([24, 8], dim=-1)
        handle = attention.kv_b_proj.register_forward_hook(lambda _m, _a, output: output + expanded_shift)
        result = attention.expand_kv(attention.kv_a_layernorm(latent)[:, None], rotary[:, None])
        handle.remove()
        return result

    none = torch.zeros(())
    keys, values = keys_and_values(none, none)
    latent_key = rows["self_attn.kv_a_proj_with_mqa", "key"]
    latent_value = rows["self_attn.kv_a_proj_with_mqa", "value"]
    moved = keys_and_values((latent_key & ~latent_value).float(), none)
    assert not torch.equal(moved[0], keys)
    assert torch.equal(moved[1], values)
    moved = keys_and_values(none, rows["self_attn.kv_b_proj", "key"].float())
    assert not torch.equal(moved[0], keys)
    assert torch.equal(moved[1], values)
    moved = keys_and_values(none, rows["self_attn.kv_b_proj", "value"].float())
    assert torch.equal(moved[0], keys)
    assert not torch.equal(moved[1], values)

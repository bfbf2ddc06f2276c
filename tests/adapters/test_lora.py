# SPDX-License-Identifier: Apache-2.0
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Phi3Config

from frozen_peft.adapters import (
    PRESETS,
    RoleLoraConfig,
    find_roles,
    lora_config,
    restrict_adapter_rows,
)
from frozen_peft.adapters.lora import matches_by_module
from frozen_peft.adapters.roles import rows_of_roles
from tests.tiny_models import ARCHITECTURES, REFUSABLE, VOCAB_SIZE, tiny_model

# Models that fuse roles into one matrix, with a choice that takes only part of at least one.
PARTIAL = {
    "qwen3_next": list(PRESETS["response"]),
    "qwen3_5_text": ["gate", "gdn_value"],
    "falcon_h1": list(PRESETS["response"]),
    "granitemoehybrid": ["gdn_query"],
    "nemotron_h": list(PRESETS["response"]),
    "lfm2": list(PRESETS["response"]),
    "kimi_linear": ["value"],
    "gpt2": list(PRESETS["response"]),
    "bamba": ["beta", "decay"],
}


def train(model: PeftModel, num_steps: int = 3) -> None:
    """Take AdamW steps with a large weight decay, enough to move anything that receives a gradient."""
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    for _ in range(num_steps):
        input_ids = torch.randint(VOCAB_SIZE, (2, 12))
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapted_rows(model: PeftModel, roles: list[str]) -> dict[str, torch.Tensor]:
    """By module, bool[out_features]: the rows that hold one of the roles."""
    return {
        module: rows_of_roles(matches, roles)
        for module, matches in matches_by_module(find_roles(model)).items()
        if any(match.role in roles for match in matches)
    }


def lora_b(model: PeftModel, module: str) -> torch.nn.Parameter:
    return model.get_base_model().get_submodule(module).lora_B["default"].weight


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ARCHITECTURES + REFUSABLE)
def test_trainable_weights_are_exactly_the_adapters_of_the_preset(name: str, preset: str) -> None:
    base = tiny_model(name)
    roles = PRESETS[preset]
    by_name = dict(base.named_modules())
    matches = find_roles(base)
    wanted = {match.module for match in matches if roles is None or match.role in roles}
    model = get_peft_model(base, lora_config(base, preset, r=2))
    restrict_adapter_rows(model)

    trainable = {parameter for parameter, weight in model.named_parameters() if weight.requires_grad}
    modules = {re.sub(r"base_model\.model\.(.*)\.lora_[AB]\.default\.weight", r"\1", item) for item in trainable}
    assert trainable == {
        f"base_model.model.{module}.lora_{part}.default.weight" for module in modules for part in "AB"
    }
    if name in ("qwen3_next", "glm4_moe"):
        wanted = {module for module in wanted if not re.search(r"\.(gate|up|down)_proj$", module)}
    if roles is None:
        assert wanted <= modules
        assert all("lm_head" not in module and "visual" not in module for module in modules)
        assert all(isinstance(by_name[module], torch.nn.Module) for module in modules)
    else:
        assert modules == wanted


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "kimi_linear", "gpt2"])
def test_configuration_is_the_same_from_model_config_and_path(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    expected = lora_config(model)

    assert lora_config(model.config) == expected
    assert lora_config(str(tmp_path)) == expected


def test_defaults_and_overrides() -> None:
    config = lora_config(tiny_model("llama"))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (16, 32, 0.0, "CAUSAL_LM")
    assert config.roles == list(PRESETS["response"])
    assert not config.fan_in_fan_out

    assert lora_config(tiny_model("gpt2")).fan_in_fan_out
    assert lora_config(tiny_model("llama"), r=4, lora_dropout=0.1).lora_dropout == 0.1


def test_one_pattern_fits_text_and_vision_language_class() -> None:
    text, wrapper = tiny_model("qwen3_5_text"), tiny_model("qwen3_5")
    config = lora_config(text)

    assert config.target_modules == lora_config(wrapper).target_modules
    matched = {name for name, _ in wrapper.named_modules() if re.fullmatch(config.target_modules, name)}
    assert matched == {match.module for match in find_roles(wrapper) if match.role in PRESETS["response"]}


def test_kimi_pattern_tells_layers_of_the_two_kinds_apart() -> None:
    model = tiny_model("kimi_linear")
    pattern = lora_config(model, roles=["gdn_query"]).target_modules

    matched = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    assert matched == ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "responsemlp"}, r"`preset` must be one of .*got 'responsemlp'\. Did you mean 'response\+mlp'\?"),
        ({"roles": ["quary"]}, r"`roles` must be taken from .*got 'quary'\. Did you mean 'query'\?"),
        ({"roles": "query"}, r"`roles` must be a list"),
        ({"roles": []}, r"`roles` must be a list of at least one"),
        ({"roles": ["beta"]}, r"roles=\['beta'\] matches nothing.*\['query', 'key', 'value', 'output', 'mlp'\]"),
        ({"target_modules": ["q_proj"]}, r"`target_modules` follows from"),
    ],
)
def test_bad_requests_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_config(tiny_model("llama"), **arguments)


def test_absent_roles_are_named(caplog: pytest.LogCaptureFixture) -> None:
    lora_config(tiny_model("llama"), roles=["query", "beta"])
    assert "['beta']" in caplog.text


def test_all_linear_needs_no_role_table() -> None:
    config = Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, pad_token_id=0
    )
    base = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, lora_config(base, "all-linear"))

    assert restrict_adapter_rows(model) == []
    assert any(".self_attn.qkv_proj.lora_B." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["falcon_h1", "granitemoehybrid", "nemotron_h"])
def test_out_proj_of_mamba_is_left_out_and_the_log_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="frozen_peft"):
        config = lora_config(tiny_model(name))

    assert "out_proj" not in config.target_modules
    assert re.search(r"Not adapted: .*out_proj", caplog.text)


@pytest.mark.parametrize("name", ["qwen3_next", "glm4_moe"])
def test_mlp_that_peft_would_take_for_routed_experts_is_left_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_model(name)
    # The fact this guards against: PEFT adapts the stacked experts in place of the modules named.
    named = [match.module for match in find_roles(base) if match.role == "mlp"]
    redirected = get_peft_model(tiny_model(name), LoraConfig(target_modules=named, r=2))
    assert any("experts" in key and "lora_A" in key for key, _ in redirected.named_parameters())
    assert not any("shared_expert" in key and "lora_A" in key for key, _ in redirected.named_parameters())

    model = get_peft_model(base, lora_config(base, "response+mlp"))
    assert "stacked routed experts" in caplog.text
    assert not any(".mlp." in key and "lora_A" in key for key, _ in model.named_parameters())
    with pytest.raises(ValueError, match=r"roles=\['mlp'\] matches no linear module that PEFT can adapt"):
        lora_config(tiny_model(name), roles=["mlp"])


@pytest.mark.parametrize("name", PARTIAL)
def test_rows_left_out_stay_exactly_zero_through_training_saving_loading_and_merging(
    name: str, tmp_path: Path
) -> None:
    roles = PARTIAL[name]
    base = tiny_model(name)
    untouched = {key: weight.clone() for key, weight in base.state_dict().items()}
    model = get_peft_model(base, lora_config(base, roles=roles, r=2))
    rows = adapted_rows(model, roles)
    partial = [module for module, adapted in rows.items() if not adapted.all()]
    assert partial
    assert restrict_adapter_rows(model) == partial
    assert restrict_adapter_rows(model) == partial

    train(model)
    for module, adapted in rows.items():
        assert (lora_b(model, module)[~adapted] == 0).all()
        assert (lora_b(model, module)[adapted] != 0).any(dim=1).float().mean() > 0.9
    model.eval()
    input_ids = torch.randint(VOCAB_SIZE, (2, 12))
    logits = model(input_ids).logits

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model(name), tmp_path, config=RoleLoraConfig.from_pretrained(tmp_path), is_trainable=True
    )
    assert loaded.peft_config["default"].roles == model.peft_config["default"].roles
    assert restrict_adapter_rows(loaded) == partial
    for module in rows:
        assert torch.equal(lora_b(loaded, module), lora_b(model, module))

    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids).logits, logits, atol=2e-4, rtol=1e-4)
    changed = set()
    for key, weight in merged.state_dict().items():
        module = key.removesuffix(".weight")
        before = untouched[key]
        if module in rows:
            # GPT-2 keeps its weights as [in, out].
            after, before = (weight.T, before.T) if name == "gpt2" else (weight, before)
            assert torch.equal(after[~rows[module]], before[~rows[module]])
            assert not torch.equal(after[rows[module]], before[rows[module]])
            changed.add(module)
        else:
            assert torch.equal(weight, before)
    assert changed == set(rows)


def test_without_the_restriction_the_other_rows_move() -> None:
    base = tiny_model("qwen3_next")
    model = get_peft_model(base, lora_config(base, r=2))
    rows = adapted_rows(model, list(PRESETS["response"]))["model.layers.0.linear_attn.in_proj_qkvz"]

    train(model, num_steps=1)
    assert (lora_b(model, "model.layers.0.linear_attn.in_proj_qkvz")[~rows] != 0).any()


def test_restriction_does_not_change_the_gradient_of_the_adapted_rows() -> None:
    gradients = []
    for restrict in (False, True):
        torch.manual_seed(0)
        base = tiny_model("qwen3_next")
        model = get_peft_model(base, lora_config(base, r=2)).train()
        if restrict:
            restrict_adapter_rows(model)
        input_ids = torch.randint(VOCAB_SIZE, (2, 12))
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters() if weight.requires_grad})
    rows = adapted_rows(model, list(PRESETS["response"]))
    for key, gradient in gradients[0].items():
        module = re.search(r"base_model\.model\.(.*)\.lora_[AB]", key)[1]
        keep = rows[module] if "lora_B" in key else slice(None)
        assert torch.equal(gradients[1][key][keep], gradient[keep])


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_plain_peft_loads_the_adapter_and_its_rows_are_read_off_the_weights(name: str, tmp_path: Path) -> None:
    roles = PARTIAL[name]
    base = tiny_model(name)
    model = get_peft_model(base, lora_config(base, roles=roles, r=2))
    restricted = restrict_adapter_rows(model)
    train(model, num_steps=1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["roles"] == model.peft_config["default"].roles

    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['roles'\]"):
        loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path, is_trainable=True)
    assert type(loaded.peft_config["default"]) is LoraConfig
    rows = adapted_rows(loaded, roles)
    assert restrict_adapter_rows(loaded) == restricted
    train(loaded)
    for module, adapted in rows.items():
        assert (lora_b(loaded, module)[~adapted] == 0).all()


def test_reloading_weights_into_an_adapter_keeps_the_restriction(tmp_path: Path) -> None:
    base = tiny_model("qwen3_next")
    model = get_peft_model(base, lora_config(base, r=2))
    restrict_adapter_rows(model)
    train(model, num_steps=1)
    model.save_pretrained(tmp_path)
    # What the trainer does to resume from a checkpoint.
    model.load_adapter(tmp_path, "default", is_trainable=True)
    train(model, num_steps=1)

    for module, adapted in adapted_rows(model, list(PRESETS["response"])).items():
        assert (lora_b(model, module)[~adapted] == 0).all()


def test_an_untrained_plain_adapter_is_not_restricted() -> None:
    base = tiny_model("qwen3_next")
    model = get_peft_model(base, LoraConfig(target_modules=["in_proj_qkvz"], r=2))
    assert restrict_adapter_rows(model) == []


def test_rows_that_already_changed_are_refused() -> None:
    base = tiny_model("qwen3_next")
    model = get_peft_model(base, lora_config(base, r=2))
    with torch.no_grad():
        lora_b(model, "model.layers.0.linear_attn.in_proj_qkvz").fill_(0.1)
    with pytest.raises(ValueError, match=r"in_proj_qkvz already changes rows that its `roles`"):
        restrict_adapter_rows(model)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        *(
            ({"init_lora_weights": kind}, "init_lora_weights")
            for kind in ("pissa", "olora", "eva", "orthogonal", False)
        ),
    ],
)
def test_kinds_of_lora_that_move_every_row_are_refused_for_part_of_a_module(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=rf"Only some rows of .*in_proj_qkvz.*`{named}`="):
        lora_config(tiny_model("qwen3_next"), **arguments)


def test_the_same_kinds_are_accepted_for_whole_modules() -> None:
    assert lora_config(tiny_model("qwen3_5_text"), use_dora=True).use_dora
    assert lora_config(tiny_model("qwen3_next"), roles=["output"], init_lora_weights="olora")


def test_a_model_without_lora_is_left_alone() -> None:
    assert restrict_adapter_rows(tiny_model("llama")) == []

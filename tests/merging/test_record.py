# SPDX-License-Identifier: Apache-2.0
"""What training says of its base, and bases that are another model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from frozen_peft import FrozenContextTrainer, lora_config, merge_adapter
from tests.merging.cases import Case, lora, preset, save_case
from tests.tiny_models import tiny_model
from tests.training.runs import as_dataset, config, samples, word_tokenizer

RECORD = "base_record.json"


def train(folder: Path, architecture: str = "qwen3_5_text", peft_config: LoraConfig | None = None) -> Path:
    """Trains adapters for a step, by the trainer; returns their folder, the base beside it."""
    base = folder / "base"
    tiny_model(architecture).save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    trainer = FrozenContextTrainer(
        model=str(base),
        args=config(folder / "adapter", max_steps=1, tier=2, model_init_kwargs={"dtype": "float32"}),
        train_dataset=as_dataset(samples(((30, 7), (9, 2)))),
        processing_class=word_tokenizer(),
        peft_config=peft_config or lora_config(str(base), r=2),
    )
    trainer.train()
    trainer.save_model()
    return folder / "adapter"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained")).parent


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A trained adapter, its base beside it, which is the one that it names."""
    for name in ("adapter", "base"):
        (tmp_path / name).symlink_to(trained / name)
    return tmp_path / "adapter"


def test_the_trainer_records_the_base_and_merging_compares_it(adapter: Path, trained: Path, tmp_path: Path) -> None:
    record = json.loads((adapter / RECORD).read_text())
    weights = load_file(tmp_path / "base" / "model.safetensors")
    recorded = {}
    for group in record["tensors"]:
        for layer in group["layers"]:
            recorded[group["name"].replace("*", str(layer))] = tuple(group["shape"])
    names = {name: name.removeprefix("model.").replace("lm_head.", "head.") for name in weights}
    assert recorded == {names[name]: tuple(tensor.shape) for name, tensor in weights.items()}
    assert record["quantization"] is None
    report = merge_adapter(adapter, tmp_path / "merged", verify=False)
    assert report["base"] == str(trained / "base")
    assert report["base_tensors_compared"] == len(record["samples"]) > 16


def test_the_record_fits_the_other_class_and_a_base_in_16_bit(adapter: Path, tmp_path: Path) -> None:
    text, wrapper = tiny_model("qwen3_5_text"), tiny_model("qwen3_5")
    wrapper.model.language_model.load_state_dict(text.model.state_dict())
    wrapper.lm_head.load_state_dict(text.lm_head.state_dict())
    wrapper.to(torch.bfloat16).save_pretrained(tmp_path / "wrapper")
    report = merge_adapter(adapter, tmp_path / "merged", tmp_path / "wrapper", verify=False)
    assert report["base_tensors_compared"] > 16


def test_another_base_is_refused_by_its_values_and_taken_where_asked(adapter: Path, tmp_path: Path) -> None:
    tiny_model("qwen3_5_text", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other is not the base that .*adapter was trained on: value \d+ of `"):
        merge_adapter(adapter, tmp_path / "merged", tmp_path / "other", verify=False)
    assert not (tmp_path / "merged").exists()
    report = merge_adapter(adapter, tmp_path / "merged", tmp_path / "other", verify=False, any_base=True)
    assert report["base_tensors_compared"] is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 6, "layer_types": ["linear_attention", "full_attention"] * 3}, "not there in training"),
        ({"vocab_size": 90}, r"`embed_tokens.weight` is \[90, 32\], and was \[97, 32\]"),
        ({"intermediate_size": 40}, r"mlp.down_proj.weight` is \[32, 40\], and was \[32, 48\]"),
    ],
)
def test_another_base_is_refused_by_its_shapes(
    fields: dict[str, Any], message: str, adapter: Path, tmp_path: Path
) -> None:
    tiny_model("qwen3_5_text", **fields).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        merge_adapter(adapter, tmp_path / "merged", tmp_path / "other", verify=False)


def test_what_is_trained_besides_lora_is_no_part_of_the_record(tmp_path: Path) -> None:
    peft_config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices=list(range(50)),
        task_type="CAUSAL_LM",
    )
    adapter = train(tmp_path, "llama", peft_config)
    merge_adapter(adapter, tmp_path / "merged", verify=False)
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {"lm_head.weight", "model.embed_tokens.weight"} < changed


EMPTY = '{"format": 1, "tensors": [], "samples": [], "quantization": null}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 2}',
        '{"format": 1, "tensors": 3}',
        '{"format": 1}',
        EMPTY.replace("[]", '[{"name": "a", "shape": [1e999], "quantized": false, "layers": [0]}]', 1),
        EMPTY.replace("null", '{"quant_type": "nf4", "double_quant": true, "blocksize": 7, "dtype": "bfloat16"}'),
    ],
)
def test_a_record_that_cannot_be_read_is_an_error(text: str, tmp_path: Path) -> None:
    base, adapter = save_case(Case("llama", lora()), tmp_path)
    (adapter / RECORD).write_text(text)
    with pytest.raises(ValueError, match=RECORD):
        merge_adapter(adapter, tmp_path / "merged", base, verify=False)


def test_an_adapter_of_others_has_no_record_and_merges(tmp_path: Path) -> None:
    base, adapter = save_case(Case("qwen3_5_text", preset()), tmp_path)
    assert merge_adapter(adapter, tmp_path / "merged", base, verify=False)["base_tensors_compared"] is None

# SPDX-License-Identifier: Apache-2.0
"""Adapters of a vocabulary that was resized in training: scored, sampled from and merged as they were trained."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import clone_chat_template
from trl.trainer.utils import create_model_from_path

from frozen_peft import FrozenContextTrainer, merge_adapter
from frozen_peft.cli import main
from frozen_peft.evaluation import load_model, score_probes
from tests.evaluation.test_probe_scores import PROBES
from tests.tiny_models import tiny_model
from tests.training.runs import config, train, word_tokenizer

IDS = torch.arange(3, 60)[None]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "w1 w2 <tool> w4"},
            {"role": "assistant", "content": "w5 </tool> w6"},
        ]
    }
] * 2


@torch.no_grad()
def logits(model: torch.nn.Module, highest: int | None = None) -> torch.Tensor:
    ids = IDS if highest is None else torch.cat([IDS, torch.tensor([[highest, 5, highest, 6]])], 1)
    return model.eval()(input_ids=ids, use_cache=False).logits


def write_base(folder: Path, name: str = "llama", **fields: Any) -> str:
    tiny_model(name, **fields).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    return str(folder / "base")


def larger(base: str, size: int) -> PreTrainedModel:
    """The base, by the class that its configuration names, with another vocabulary."""
    model = create_model_from_path(base, dtype="float32")
    torch.manual_seed(0)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def resized(base: str, size: int, **fields: Any) -> PeftModel:
    """A random adapter on a base whose vocabulary was resized in the process."""
    model = larger(base, size)
    # PEFT writes to the lists it is given.
    fields = copy.deepcopy(fields)
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | fields
    model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def check(model: PeftModel, base: str, adapter: Path, size: int, *, verify: bool = False) -> None:
    """The adapter scores, samples and merges as the model that it was saved from, and as plain PEFT loads it."""
    expected = logits(model, size - 1)
    assert expected.shape[-1] == size
    plain = PeftModel.from_pretrained(larger(base, size), adapter)
    torch.testing.assert_close(logits(plain, size - 1), expected, rtol=0, atol=1e-5)
    loaded, tokenizer = load_model(base, str(adapter))
    torch.testing.assert_close(logits(loaded, size - 1), expected, rtol=0, atol=1e-5)
    report = merge_adapter(adapter, adapter.parent / "merged", base, verify=verify)
    merged = create_model_from_path(str(adapter.parent / "merged"), dtype="float32")
    assert merged.config.get_text_config().vocab_size == merged.get_output_embeddings().weight.shape[0] == size
    torch.testing.assert_close(logits(merged, size - 1), expected, rtol=0, atol=1e-4)
    if not verify:
        return
    assert report["verification"]["equal_greedy_decisions"] == report["verification"]["prompts"]
    own = score_probes(loaded, tokenizer, PROBES[:1]).scores[0].margin
    assert own == pytest.approx(score_probes(merged, tokenizer, PROBES[:1]).scores[0].margin, abs=1e-4)


BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "both": ("llama", 110, {}, BOTH),
    "fewer": ("llama", 90, {}, BOTH),
    "tied": ("llama", 110, {"tie_word_embeddings": True}, BOTH | {"ensure_weight_tying": True}),
    "tied, and each by itself": ("llama", 110, {"tie_word_embeddings": True}, BOTH),
    "tied rows": ("llama", 110, {"tie_word_embeddings": True}, {"trainable_token_indices": list(range(97, 110))}),
    "head alone": ("llama", 110, {}, {"modules_to_save": ["lm_head"]}),
    "low rank": ("llama", 110, {}, {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    "wrapper": ("qwen3_5", 110, {}, BOTH),
    "other names": (
        "gpt2",
        110,
        {"tie_word_embeddings": True},
        {
            "target_modules": ["c_attn"],
            "fan_in_fan_out": True,
            "trainable_token_indices": {"wte": list(range(97, 110))},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_resized_in_the_process(case: str, tmp_path: Path) -> None:
    name, size, base_fields, fields = CASES[case]
    base = write_base(tmp_path, name, **base_fields)
    model = resized(base, size, **fields)
    model.save_pretrained(tmp_path / "adapter")
    check(model, base, tmp_path / "adapter", size)


def test_what_the_adapter_does_not_hold_of_the_base_is_not_needed(tmp_path: Path) -> None:
    """Without embeddings beside the trained ones, as PEFT writes it where it cannot see the base's configuration."""
    base = write_base(tmp_path)
    model = resized(base, 110, **BOTH)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    check(model, base, tmp_path / "adapter", 110)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_template_that_brings_tokens(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(tmp_path / "template")
    base = write_base(tmp_path)
    arguments = config(
        tmp_path / "adapter",
        chat_template_path=str(tmp_path / "template"),
        assistant_only_loss=True,
        learning_rate=1.0,
        model_init_kwargs={"dtype": "float32"},
    )
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = FrozenContextTrainer(base, arguments, None, Dataset.from_list(ROWS), peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter" / "base_record.json").is_file()
    check(trainer.model, base, tmp_path / "adapter", 128, verify=True)
    # Its base is the one that training began with, its rows for new tokens too.
    loaded, _ = load_model(base, str(tmp_path / "adapter"))
    with loaded.disable_adapter(), trainer.model.disable_adapter():
        torch.testing.assert_close(logits(loaded, 127), logits(trainer.model, 127), rtol=0, atol=1e-5)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fields = {"model_name_or_path": base, "dtype": "float32", "dataset_name": str(tmp_path / "rows.jsonl")}
    fields |= {"output_dir": str(tmp_path / "inspected"), "chat_template_path": str(tmp_path / "template")}
    fields |= {"assistant_only_loss": True, "tier": 2, "use_cpu": True, "report_to": "none"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(fields))
    arguments = ["inspect", str(tmp_path / "recipe.yaml"), "--adapter", str(tmp_path / "adapter"), "--samples", "1"]
    assert main(arguments) == 0


def cloned(folder: Path) -> tuple[str, Any, Any, list[int]]:
    """A base with tied embeddings, and the same with the tokens of a template."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(folder / "template")
    base = write_base(folder, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    return base, *clone_chat_template(model, AutoTokenizer.from_pretrained(base), str(folder / "template"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_template_that_brings_tokens_to_tied_embeddings(tmp_path: Path) -> None:
    """What TRL asks PEFT for cannot run; what the message says instead does."""
    base, model, tokenizer, added = cloned(tmp_path)
    plain = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    fields = {"assistant_only_loss": True, "model_init_kwargs": {"dtype": "float32"}}
    asked = config(tmp_path / "refused", chat_template_path=str(tmp_path / "template"), **fields)
    with pytest.raises(ValueError, match=r"lm_head.* as a whole .*trainable_token_indices=added_tokens"):
        FrozenContextTrainer(base, asked, None, Dataset.from_list(ROWS), peft_config=plain)
    rows = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=added, task_type="CAUSAL_LM")
    arguments = config(tmp_path / "adapter", tier=1, assistant_only_loss=True, max_steps=2, learning_rate=0.5)
    run = train(
        FrozenContextTrainer, model, arguments, Dataset.from_list(ROWS), processing_class=tokenizer, peft_config=rows
    )
    run.trainer.save_model()
    check(run.trainer.model, base, tmp_path / "adapter", 128)
    assert run.losses[1] < run.losses[0]


def test_a_vocabulary_that_the_adapter_does_not_hold_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    resized(base, 110, modules_to_save=["lm_head"]).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = str(tmp_path / "adapter")
    refused = r"trained with 110 and holds no `embed_tokens` of so many, and the base has 97 tokens"
    with pytest.raises(ValueError, match=refused):
        load_model(base, adapter)
    with pytest.raises(ValueError, match=refused):
        merge_adapter(adapter, tmp_path / "merged", base)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_another_base_is_seen_by_the_rows_that_the_adapter_holds(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    resized(base, 110, **BOTH).save_pretrained(tmp_path / "adapter")
    tiny_model("llama", seed=1).save_pretrained(base)
    with pytest.raises(ValueError, match="trained on another model: rows of `embed_tokens`"):
        load_model(base, str(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_resized_vocabulary_is_not_combined(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    resized(base, 110, **BOTH).save_pretrained(tmp_path / "larger")
    resized(base, 97).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="larger was trained with another vocabulary"):
        merge_adapter([tmp_path / "larger", tmp_path / "plain"], tmp_path / "merged", base)

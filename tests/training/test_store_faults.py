# SPDX-License-Identifier: Apache-2.0
"""Trainers that are used in odd ways: contexts of other weights, adapters that are never on."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from frozen_peft import FrozenContextTrainer
from tests.reference import token_logprobs
from tests.tiny_models import tiny_model
from tests.training.runs import (
    adapted,
    as_dataset,
    config,
    equal,
    samples,
    train,
    trained_weights,
    word_tokenizer,
)
from tests.training.test_activated import ROWS as INVOKED
from tests.training.test_activated import TOKENS
from tests.training.test_turns import ROWS as TURNS
from tests.training.test_turns import one_sample_per_span

ROWS = samples()[:4]


def lora(**fields: object) -> LoraConfig:
    targets = ["q_proj", "o_proj"]
    return LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **fields)


def trainer(model: torch.nn.Module, folder: Path, **fields: object) -> FrozenContextTrainer:
    data = as_dataset(fields.pop("rows", ROWS))
    tokenizer = word_tokenizer()
    return FrozenContextTrainer(model, config(folder, **fields), None, data, data, processing_class=tokenizer)


def test_a_second_training_reads_nothing_of_the_first(tmp_path: Path) -> None:
    weights = []
    for fields in ({}, {"context_cache_size": "1GiB"}):
        twice = trainer(adapted(), tmp_path, max_steps=2, **fields)
        twice.train()
        twice.train()
        weights.append(trained_weights(twice.model))
    assert equal(*weights)


def test_an_adapter_that_tokens_switch_on_with_context_adapters(tmp_path: Path) -> None:
    """PEFT would never switch it on, since decisions do not hold the tokens: nothing would be trained."""
    model = get_peft_model(tiny_model("llama"), lora(alora_invocation_tokens=list(TOKENS)))
    with pytest.raises(ValueError, match=r"`alora_invocation_tokens=.*Set `context_adapters=False`"):
        trainer(model, tmp_path, rows=INVOKED)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["down_proj"]},
        {"trainable_token_indices": list(range(10, 95))},
    ],
    ids=str,
)
def test_what_an_activated_adapter_cannot_switch(fields: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), lora(**fields))
    with pytest.raises(ValueError, match=r"is trained as a whole.*Leave it out, or set `context_adapters=True`"):
        trainer(model, tmp_path, rows=INVOKED, context_adapters=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"o_proj": 32}},
        {"lora_dropout": 0.5},
        {"lora_bias": True},
        {"exclude_modules": ["o_proj"], "layers_to_transform": [0, 2]},
    ],
    ids=str,
)
def test_what_it_can(fields: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), lora(**fields))
    run = train(FrozenContextTrainer, model, config(tmp_path, context_adapters=False), as_dataset(INVOKED))
    run.trainer.save_model(str(tmp_path / "adapter"))
    served = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter").eval()
    for row in INVOKED:
        with torch.no_grad():
            logits = served(input_ids=row.input_ids[None]).logits[0]
        expected = token_logprobs(logits[row.boundary :], row.decision)[len(TOKENS) - 1 :].mean()
        assert run.trainer.evaluate(as_dataset([row]))["eval_loss"] == pytest.approx(-float(expected), abs=1e-5)


def test_another_model_than_the_one_that_encodes(tmp_path: Path) -> None:
    one = trainer(adapted(), tmp_path)
    batch = one.data_collator([dict(row) for row in one.train_dataset])
    with pytest.raises(ValueError, match=r"not the one that encodes their contexts"):
        one.compute_loss(adapted(seed=5), batch)
    one.model = adapted(seed=5)
    with pytest.raises(ValueError, match=r"not the one that encodes their contexts"):
        one.evaluate()


def test_evaluation_in_16_bit_finds_no_context_of_32(tmp_path: Path) -> None:
    fields = {"context_adapters": False, "bf16_full_eval": True, "context_cache_dir": str(tmp_path / "contexts")}
    run = trainer(adapted(), tmp_path / "run", rows=INVOKED, max_steps=2, **fields)
    run.train()
    run._frozen.encoder.store.flush()
    assert run.evaluate()["eval_loss"] > 0


def test_evaluation_encodes_a_conversation_once(tmp_path: Path) -> None:
    fields = {"decision_mode": "turns", "max_decisions_per_forward": 2, "per_device_eval_batch_size": 1}
    metrics = trainer(adapted(), tmp_path, rows=TURNS, **fields).evaluate()
    once = sum(max(span.boundary for span in one_sample_per_span(row)) for row in TURNS)
    assert metrics["eval_context/tokens_encoded"] == once

# SPDX-License-Identifier: Apache-2.0
"""Kinds of adapters beside LoRA in the trainer, given as a configuration or as a model that has them already."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextTrainer
from frozen_peft.adapters import activate_at_invocation
from tests.tiny_models import tiny_model
from tests.training.runs import as_dataset, config, samples, word_tokenizer

ROWS = samples()[:4]
KIND = {"task_type": "CAUSAL_LM"}
PROMPTS: dict[str, Callable[[], PeftConfig]] = {
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, **KIND),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, **KIND),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **KIND),
}


def _adalora() -> PeftConfig:
    return AdaLoraConfig(target_modules=["q_proj", "o_proj"], total_step=9, **KIND)


def _trainer(
    kind: type[SFTTrainer], folder: Path, adapter: PeftConfig, *, ready: bool, **fields: object
) -> SFTTrainer:
    torch.manual_seed(0)
    model = tiny_model("llama")
    given = {} if ready else {"peft_config": adapter}
    if ready:
        model = get_peft_model(model, adapter)
    arguments = config(folder, SFTConfig, **fields) if kind is SFTTrainer else config(folder, **fields)
    return kind(model, arguments, train_dataset=as_dataset(ROWS), processing_class=word_tokenizer(), **given)


def _trained(trainer: SFTTrainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer.train()
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], copy.deepcopy(weights)


@pytest.mark.parametrize(
    ("kind", "ready", "fields"),
    [
        ("prefix", False, {"tier": 2}),
        ("prefix", True, {"tier": 2}),
        ("prompt", True, {"tier": 1, "sequence_chunk_size": 16}),
        ("p-tuning", False, {"tier": 2, "decision_mode": "turns"}),
        ("prompt", False, {"tier": 1, "loss_type": "distill"}),
    ],
)
def test_prompt_learning_is_refused_where_a_sample_runs_in_parts(
    kind: str, ready: bool, fields: dict, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"prompt learning .* virtual tokens in front of each forward"):
        _trainer(FrozenContextTrainer, tmp_path, PROMPTS[kind](), ready=ready, **fields)


# PEFT 0.21 hands its own cache over by the name that transformers 5.24 warns of.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "ready"), [("prefix", False), ("prompt", True), ("p-tuning", False)])
def test_prompt_learning_in_tier_1_is_that_of_sft_trainer(kind: str, ready: bool, tmp_path: Path) -> None:
    # transformers drops the cache that prefix tuning works by under checkpointing, and TRL with it.
    fields = {"max_steps": 2, "gradient_checkpointing": kind != "prefix"}
    theirs = _trained(_trainer(SFTTrainer, tmp_path, PROMPTS[kind](), ready=ready, **fields))
    ours = _trained(_trainer(FrozenContextTrainer, tmp_path, PROMPTS[kind](), ready=ready, tier=1, **fields))
    assert ours[0] == theirs[0]
    assert all(torch.equal(ours[1][name], weight) for name, weight in theirs[1].items())


@pytest.mark.parametrize(("ready", "tier"), [(False, 1), (True, 2), (False, 2)])
def test_adalora_trains_in_every_tier(ready: bool, tier: int, tmp_path: Path) -> None:
    theirs = _trained(_trainer(SFTTrainer, tmp_path, _adalora(), ready=ready, max_steps=2))
    ours = _trained(_trainer(FrozenContextTrainer, tmp_path, _adalora(), ready=ready, max_steps=2, tier=tier))
    assert ours[0][0] == pytest.approx(theirs[0][0], abs=1e-5)
    same = [torch.allclose(ours[1][name], weight, atol=1e-6) for name, weight in theirs[1].items()]
    # The frozen gradient is another one, from the query projection on.
    assert all(same) if tier == 1 else not all(same)


def test_adalora_is_not_switched_on_by_tokens() -> None:
    with pytest.raises(ValueError, match="needs a LoRA adapter, and `peft_config` is a AdaLoraConfig"):
        activate_at_invocation(get_peft_model(tiny_model("llama"), _adalora()), [1, 2])

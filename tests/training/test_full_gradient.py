# SPDX-License-Identifier: Apache-2.0
"""With `tier=1` the trainer is `SFTTrainer`: the same losses, metrics and weights, bit for bit."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextConfig, FrozenContextTrainer
from tests.tiny_models import tiny_model
from tests.training.runs import (
    adapted,
    as_dataset,
    config,
    equal,
    fresh_lora,
    samples,
    train,
    without_timings,
    word_tokenizer,
)


@pytest.mark.parametrize(
    ("name", "tier"), [("llama", 1), ("qwen3_5_text", 1), ("qwen3_5_moe_text", 1), ("qwen3_5_text", 3)]
)
def test_trains_as_sft_trainer_does(name: str, tier: int, tmp_path: Path) -> None:
    model = adapted(name)
    dataset = as_dataset(samples())
    fields = {
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
    }
    ours = train(
        FrozenContextTrainer,
        copy.deepcopy(model),
        config(tmp_path, tier=tier, **fields),
        dataset,
        eval_dataset=dataset,
    )
    theirs = train(
        SFTTrainer, copy.deepcopy(model), config(tmp_path, SFTConfig, **fields), dataset, eval_dataset=dataset
    )
    assert len(theirs.losses) == 3
    assert "eval_mean_token_accuracy" in theirs.trainer.state.log_history[1]
    assert without_timings(ours.trainer.state.log_history) == without_timings(theirs.trainer.state.log_history)
    assert equal(ours.weights, theirs.weights)


def test_dropout_draws_the_same_numbers_as_in_sft_trainer(tmp_path: Path) -> None:
    dataset = as_dataset(samples())
    model = fresh_lora(tiny_model("llama"), lora_dropout=0.3)
    ours = train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path, tier=1), dataset)
    theirs = train(SFTTrainer, copy.deepcopy(model), config(tmp_path, SFTConfig), dataset)
    assert ours.losses == theirs.losses
    assert equal(ours.weights, theirs.weights)


def test_checkpoints_over_several_layers_change_nothing(tmp_path: Path) -> None:
    model = adapted("qwen3_5_text")
    dataset = as_dataset(samples())
    ours = train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path, tier=3, checkpoint_every=3), dataset)
    theirs = train(SFTTrainer, copy.deepcopy(model), config(tmp_path, SFTConfig), dataset)
    assert ours.losses == theirs.losses
    assert equal(ours.weights, theirs.weights)


def test_a_frozen_context_is_another_training(tmp_path: Path) -> None:
    """Guards the comparisons above against a tier that is not applied."""
    model, dataset = adapted("llama"), as_dataset(samples())
    frozen = train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path, tier=2), dataset)
    full = train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path, tier=1), dataset)
    assert not equal(frozen.weights, full.weights)


def test_a_plain_sft_config_is_converted_and_freezes_contexts(tmp_path: Path) -> None:
    model, dataset = adapted("llama"), as_dataset(samples())
    plain = train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path, SFTConfig), dataset)
    explicit = train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path, tier=2), dataset)
    assert isinstance(plain.trainer.args, FrozenContextConfig)
    assert plain.losses == explicit.losses
    assert equal(plain.weights, explicit.weights)


def test_plain_training_arguments_are_converted(tmp_path: Path) -> None:
    model, dataset = adapted("llama"), as_dataset(samples())
    fields = config(tmp_path).to_dict()
    known = TrainingArguments(output_dir=str(tmp_path)).to_dict().keys()
    keep = {"use_cpu", "bf16", "report_to", "save_strategy", "logging_steps", "max_steps", "optim", "learning_rate"}
    keep |= {"per_device_train_batch_size", "lr_scheduler_type", "max_grad_norm", "train_sampling_strategy"}
    assert keep <= known
    arguments = TrainingArguments(output_dir=str(tmp_path), **{key: fields[key] for key in keep})
    converted = train(FrozenContextTrainer, copy.deepcopy(model), arguments, dataset)
    explicit = train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path), dataset)
    assert isinstance(converted.trainer.args, FrozenContextConfig)
    assert converted.trainer.args.learning_rate == fields["learning_rate"]
    assert converted.losses == explicit.losses
    assert equal(converted.weights, explicit.weights)


@dataclass
class OnCpu(FrozenContextConfig):
    """SFTConfig's default of bf16 is refused on a machine without a GPU."""

    use_cpu: bool = True
    bf16: bool | None = False


def test_without_arguments_the_output_folder_is_named_after_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("frozen_peft.training.sft.FrozenContextConfig", OnCpu)
    model = adapted("llama")
    model.config._name_or_path = "someone/tiny-llama"
    trainer = FrozenContextTrainer(model, train_dataset=as_dataset(samples()), processing_class=word_tokenizer())
    assert trainer.args.output_dir == "tiny-llama-FrozenContext"
    assert trainer.args.gradient_horizon == 0


def test_a_conversion_keeps_every_field_but_the_length_that_would_cut_decisions(tmp_path: Path) -> None:
    plain = config(tmp_path, SFTConfig, max_length=1024, weight_decay=0.25, completion_only_loss=True, seed=7)
    converted = FrozenContextConfig.from_training_arguments(plain)
    assert converted.max_length is None
    assert (converted.weight_decay, converted.completion_only_loss, converted.seed) == (0.25, True, 7)
    assert converted.gradient_checkpointing is plain.gradient_checkpointing
    assert FrozenContextConfig.from_training_arguments(config(tmp_path, SFTConfig, max_length=77)).max_length == 77


@pytest.mark.parametrize(
    ("fields", "horizon"),
    [({}, 0), ({"tier": 1}, -1), ({"tier": 2}, 0), ({"tier": 3}, -1), ({"tier": 1, "gradient_horizon": 5}, 5)],
)
def test_an_explicit_field_wins_over_the_tier(fields: dict, horizon: int, tmp_path: Path) -> None:
    assert config(tmp_path, **fields).gradient_horizon == horizon

# SPDX-License-Identifier: Apache-2.0
"""Training with `sequence_chunk_size` is training with the full gradient, or with that of a horizon."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from frozen_peft import (
    ContextMismatchError,
    FrozenContextConfig,
    FrozenContextTrainer,
    lora_config,
    quantization_config,
)
from frozen_peft.gradient import StretchCheck, stretched_decoder, verify_stretches
from tests.reference import (
    Sample,
    negative_log_likelihood,
    num_labels,
    stop_gradient_at_context,
    worst_gradient_error,
)
from tests.tiny_models import tiny_model
from tests.training.runs import (
    IGNORED,
    adapted,
    as_dataset,
    assert_trained_as,
    batches,
    config,
    gradients_of,
    samples,
    train,
    train_in_float64,
    without_timings,
    word_tokenizer,
)

ROWS = samples()
# In float32, of one step.
TOLERANCE = 1e-4
# In float64, where steps add up no rounding to speak of; the trainer adds losses up in float32.
EXACT = 1e-10
LOG_TOLERANCE = 1e-5


def worst_gap(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Largest difference of any figure of two logs with the same figures, but for those of the clock."""
    ours, theirs = without_timings(ours), without_timings(theirs)
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    return max(abs(value - theirs[index][key]) for index, entry in enumerate(ours) for key, value in entry.items())


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3_5_moe_text", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3_5", "gemma3_text"))],
)
def test_losses_metrics_and_gradients_are_those_of_sft_trainer(name: str, tmp_path: Path) -> None:
    """The auxiliary loss of experts, gradient accumulation, a scheduler, clipping and evaluation included."""
    model, dataset = adapted(name), as_dataset(ROWS)
    fields = {
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
    }
    arguments = config(tmp_path, tier=3, sequence_chunk_size=20, **fields)
    ours = train_in_float64(FrozenContextTrainer, model, arguments, dataset, eval_dataset=dataset)
    plain = config(tmp_path, SFTConfig, **fields)
    theirs = train_in_float64(SFTTrainer, model, plain, dataset, eval_dataset=dataset)
    assert len(theirs.losses) == 3
    assert worst_gap(ours.trainer.state.log_history, theirs.trainer.state.log_history) < LOG_TOLERANCE
    for step in range(3):
        assert worst_gradient_error(ours.gradients[step], theirs.gradients[step]) < EXACT
    assert_trained_as(ours, model, theirs.weights)


def test_the_decoder_gives_outputs_from_the_first_label_on_and_all_where_logits_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever logits a metric is computed from are those of every token, as with `SFTTrainer`."""
    firsts: list[int] = []
    outputs = stretched_decoder.StretchedDecoder.outputs

    def noting(run: stretched_decoder.StretchedDecoder) -> Any:
        hidden = outputs(run)
        firsts.append(run.num_tokens - hidden.last_hidden_state.shape[1])
        return hidden

    monkeypatch.setattr(stretched_decoder.StretchedDecoder, "outputs", noting)
    rows = [row for row in ROWS if row.boundary > 3][:2]
    arguments = config(tmp_path, tier=3, sequence_chunk_size=16, verify_context="never", max_steps=1)
    trainer = FrozenContextTrainer(
        adapted("llama"), arguments, train_dataset=as_dataset(rows), processing_class=word_tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"].clone()
    first = min(next(i for i, label in enumerate(row) if i and label != IGNORED) - 1 for row in labels.tolist())
    assert first > 0
    trainer.compute_loss(trainer.model, dict(batch))
    assert firsts == [first]
    with pytest.warns(FutureWarning, match="return_outputs"):
        _, logits, returned = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=False)
    assert firsts[1:]
    assert not any(firsts[1:])
    assert logits is not None
    assert logits.shape[:2] == labels.shape
    assert torch.equal(returned, labels)
    assert torch.equal(batch["labels"], labels)


# The hybrid has both kinds of layer.
@pytest.mark.parametrize(
    ("name", "num_steps"),
    [
        pytest.param("qwen3_5_text", 15, marks=pytest.mark.slow),
        pytest.param("qwen3_5_text", 50, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param("llama", 50, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_many_steps_lie_on_the_curve_of_sft_trainer(name: str, num_steps: int, tmp_path: Path) -> None:
    model, dataset = adapted(name), as_dataset(ROWS)
    fields = {"max_steps": num_steps, "verify_context": "never"}
    arguments = config(tmp_path, tier=3, sequence_chunk_size=16, **fields)
    ours = train_in_float64(FrozenContextTrainer, model, arguments, dataset)
    theirs = train_in_float64(SFTTrainer, model, config(tmp_path, SFTConfig, max_steps=num_steps), dataset)
    gaps = torch.tensor(ours.losses) - torch.tensor(theirs.losses)
    assert len(gaps) == num_steps
    assert theirs.losses[-1] < theirs.losses[0] - 0.1
    assert gaps.abs().max() < LOG_TOLERANCE


@pytest.mark.parametrize("fields", [{}, {"checkpoint_every": 3}, {"gradient_checkpointing": False}])
def test_layer_checkpoints_change_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    model, dataset = adapted("qwen3_5_text"), as_dataset(ROWS)
    arguments = config(tmp_path, tier=3, sequence_chunk_size=16, **fields)
    ours = train_in_float64(FrozenContextTrainer, model, arguments, dataset)
    theirs = train_in_float64(SFTTrainer, model, config(tmp_path, SFTConfig), dataset)
    assert_trained_as(ours, model, theirs.weights)


def horizon_gradients(model: torch.nn.Module, rows: list[Sample], horizon: int) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for row in rows:
        with stop_gradient_at_context(model, max(row.boundary - horizon, 0), len(row.input_ids)):
            logits = model(input_ids=row.input_ids[None], use_cache=False).logits[0]
        for key, gradient in gradients_of(negative_log_likelihood(logits, row.labels), model).items():
            total[key] = total.get(key, 0) + gradient / num_labels(rows)
    return total


@pytest.mark.parametrize("horizon", [0, 13])
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text"])
def test_a_horizon_carries_gradient_in_stretches(name: str, horizon: int, tmp_path: Path) -> None:
    """The rest of the context is frozen; a learning rate of almost nothing keeps the weights where they are."""
    model = adapted(name)
    fields = {"gradient_horizon": horizon, "sequence_chunk_size": 5, "learning_rate": 1e-12}
    ours = train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path, **fields), as_dataset(ROWS))
    for step, rows in enumerate(batches(ROWS, 2, 3)):
        expected = horizon_gradients(model, rows, horizon)
        assert worst_gradient_error(ours.gradients[step], expected) < TOLERANCE


def test_bf16_autocast_gives_every_adapter_its_gradient(tmp_path: Path) -> None:
    model, dataset = adapted("qwen3_5_text"), as_dataset(ROWS)
    ours = train(
        FrozenContextTrainer,
        copy.deepcopy(model),
        config(tmp_path, tier=3, sequence_chunk_size=16, bf16=True, max_steps=1),
        dataset,
    )
    theirs = train(SFTTrainer, copy.deepcopy(model), config(tmp_path, SFTConfig, max_steps=1), dataset)
    for key, gradient in ours.gradients[0].items():
        assert gradient.dtype == torch.float32
        expected = theirs.gradients[0][key]
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.98, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text"])
def test_a_4bit_base(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2}
    tiny_model(name, **sizes).save_pretrained(checkpoint)
    word_tokenizer().save_pretrained(checkpoint)

    def gradients(kind: type[SFTTrainer], arguments: SFTConfig) -> dict[str, torch.Tensor]:
        run = train(
            kind,
            str(checkpoint),
            arguments,
            as_dataset(ROWS),
            quantization_config=quantization_config(str(checkpoint)),
            peft_config=lora_config(str(checkpoint), r=2, init_lora_weights=True),
        )
        return run.gradients[0]

    ours = gradients(FrozenContextTrainer, config(tmp_path, tier=3, sequence_chunk_size=16, max_steps=1))
    theirs = gradients(SFTTrainer, config(tmp_path, SFTConfig, max_steps=1))
    moved = [key for key in theirs if theirs[key].norm() > 0]
    assert moved
    for key in moved:
        assert torch.nn.functional.cosine_similarity(ours[key].flatten(), theirs[key].flatten(), dim=0) > 0.95, key


def test_a_gradient_that_gets_lost_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretched_decoder, "_state_roots", lambda ends, of_states: [])
    fields = {"tier": 3, "sequence_chunk_size": 16}
    with pytest.raises(ContextMismatchError, match="does not run exactly in stretches"):
        train(FrozenContextTrainer, adapted("qwen3_5_text"), config(tmp_path, **fields), as_dataset(ROWS))
    train(
        FrozenContextTrainer,
        adapted("qwen3_5_text"),
        config(tmp_path, **fields, verify_context="never"),
        as_dataset(ROWS),
    )


def test_the_model_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def count(model: Any, input_ids: torch.Tensor, stretch_size: int) -> StretchCheck:
        checked.append(len(input_ids))
        return verify_stretches(model, input_ids, stretch_size)

    monkeypatch.setattr("frozen_peft.training.checks.verify_stretches", count)
    train(FrozenContextTrainer, adapted("llama"), config(tmp_path, tier=3, sequence_chunk_size=16), as_dataset(ROWS))
    # The longest sample of the first batch.
    assert checked == [37]


def test_left_padding_is_refused(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": torch.tensor([[0] * (width - len(row["input_ids"])) + row["input_ids"] for row in rows]),
            "labels": torch.tensor([[IGNORED] * (width - len(row["labels"])) + row["labels"] for row in rows]),
            "attention_mask": torch.tensor(
                [[0] * (width - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows]
            ),
        }

    arguments = config(tmp_path, tier=3, sequence_chunk_size=16)
    with pytest.raises(ValueError, match="padding on the right only"):
        train(FrozenContextTrainer, adapted("llama"), arguments, as_dataset(ROWS), data_collator=collate)


def test_an_architecture_that_cannot_continue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContextMismatchError, match="jamba"):
        train(
            FrozenContextTrainer, tiny_model("jamba"), config(tmp_path, tier=3, sequence_chunk_size=16),
            as_dataset(ROWS),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence_chunk_size": 0}, r"`sequence_chunk_size` must be 1 token or more, or None, found 0"),
        ({"sequence_chunk_size": -3}, r"`sequence_chunk_size` must be 1 token or more, or None, found -3"),
        ({"sequence_chunk_size": 8, "packing": True}, r"`packing` puts several into one row"),
        ({"sequence_chunk_size": 8, "padding_free": True}, r"`padding_free` puts several into one row"),
        (
            {"sequence_chunk_size": 8, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            r"needs non-reentrant checkpoints; remove `use_reentrant`",
        ),
        ({"offload_stretches": True}, r"`offload_stretches=True` has no effect without `sequence_chunk_size`"),
    ],
)
def test_configurations_that_contradict_themselves(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, FrozenContextConfig, tier=3, **fields)

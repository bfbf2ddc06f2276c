# SPDX-License-Identifier: Apache-2.0
"""Trainings whose contexts are found instead of encoded are the trainings they would have been."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from frozen_peft import FrozenContextTrainer, lora_config, quantization_config
from frozen_peft.context import ContextFiles
from frozen_peft.context.store import context_files as files
from tests.reference import IGNORED, Sample, reference_gradients, worst_gradient_error
from tests.tiny_models import add_lora, tiny_model
from tests.training.runs import (
    Run,
    adapted,
    as_dataset,
    assert_trained_as,
    batches,
    config,
    equal,
    reference_sgd,
    samples,
    train,
    train_in_float64,
    word_tokenizer,
)
from tests.training.test_activated import ROWS as INVOKED

GRADIENT_TOLERANCE = 1e-5
ROWS = samples()[:4]
EPOCHS = {"max_steps": -1, "num_train_epochs": 3}


def off(folder: Path, **fields: Any) -> Run:
    """Three epochs over contexts that were encoded without adapters."""
    arguments = config(folder / "run", context_adapters=False, **(EPOCHS | fields))
    return train(FrozenContextTrainer, adapted(), arguments, as_dataset(INVOKED[:4]))


def on(folder: Path, model: torch.nn.Module | None = None, **fields: Any) -> Run:
    """Three epochs over contexts that were encoded with adapters."""
    return train(
        FrozenContextTrainer, model or adapted(), config(folder / "run", **(EPOCHS | fields)), as_dataset(ROWS)
    )


def encoded(run: Run) -> list[float]:
    return [entry["context/tokens_encoded"] for entry in run.logs]


NUM_TOKENS = [sum(row.boundary for row in batch) for batch in batches(INVOKED[:4], 2, 2)]


@pytest.mark.parametrize("level", ["memory", "disk", "both"])
def test_later_epochs_encode_nothing_and_train_the_same(level: str, tmp_path: Path) -> None:
    fields = {"context_cache_size": "1GiB"} if level != "disk" else {}
    fields |= {"context_cache_dir": str(tmp_path / "contexts")} if level != "memory" else {}
    kept, plain = off(tmp_path, **fields), off(tmp_path)
    assert encoded(kept) == [*NUM_TOKENS, 0, 0, 0, 0]
    assert encoded(plain) == NUM_TOKENS * 3
    assert kept.losses == plain.losses
    assert equal(kept.weights, plain.weights)
    last = kept.logs[-1]
    assert last["context/hit_rate"] == 1.0
    assert last["context/tokens_reused"] == NUM_TOKENS[1]
    assert last["context/memory_bytes"] > 0 or level == "disk"
    assert last["context/disk_bytes"] > 0 or level == "memory"
    assert last["context/decision_seconds"] > 0
    assert "context/memory_bytes" not in plain.logs[-1]


@pytest.mark.parametrize(
    "fields",
    [{"save_strategy": "epoch"}, {"save_strategy": "steps", "save_steps": 1}, {"load_best_model_at_end": True}],
    ids=str,
)
def test_a_checkpoint_costs_no_context_that_the_base_encoded(fields: dict, tmp_path: Path) -> None:
    """Nor does evaluating, going on with the best weights, or training further in the same process."""
    if "load_best_model_at_end" in fields:
        fields |= {"save_strategy": "epoch", "eval_strategy": "epoch", "metric_for_best_model": "loss"}
    arguments = config(tmp_path, context_adapters=False, context_cache_size="1GiB", **EPOCHS, **fields)
    dataset = as_dataset(INVOKED[:4])
    run = train(FrozenContextTrainer, adapted(), arguments, dataset, eval_dataset=dataset)
    assert encoded(run) == [*NUM_TOKENS, 0, 0, 0, 0]
    assert [entry["context/hit_rate"] for entry in run.logs] == [0, 0, 1, 1, 1, 1]
    run.trainer.evaluate()
    run.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert encoded(run)[4:] == [0, 0]
    assert equal(run.weights, off(tmp_path / "plain").weights)


class _Editing(TrainerCallback):
    """Changes weights where no optimizer does, as a moving average of them does."""

    def on_step_begin(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.data.mul_(1.1)

    on_substep_end = on_step_begin


def test_weights_that_a_callback_changes_within_a_step(tmp_path: Path) -> None:
    """Both micro-batches of a step have one context, which is another one for the second."""
    dataset = as_dataset([ROWS[0]] * 4)
    fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    gradients = []
    for more in ({}, {"context_cache_size": "1GiB"}):
        arguments = config(tmp_path, **fields, **more)
        run = train(FrozenContextTrainer, adapted(), arguments, dataset, callbacks=[_Editing()])
        assert encoded(run) == [2 * ROWS[0].boundary] * 2
        gradients.append(run.gradients[0])
    # Two changes before the step's last backward, and one before its first.
    models = [adapted(), adapted()]
    for model, changes in zip(models, (1, 2), strict=True):
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.data.mul_(1.1**changes)
    first, second = (reference_gradients(model, [ROWS[0]]) for model in models)
    expected = {name: (first[name] + second[name]) / 2 for name in first}
    for found in gradients:
        assert worst_gradient_error(found, expected) <= GRADIENT_TOLERANCE


def test_evaluations_of_two_adapters_in_one_step(tmp_path: Path) -> None:
    losses = []
    for fields in ({}, {"context_cache_size": "1GiB"}):
        model = adapted()
        add_adapter_like(model, "other")
        trainer = FrozenContextTrainer(
            model, config(tmp_path, **fields), train_dataset=as_dataset(ROWS), processing_class=word_tokenizer()
        )
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            losses.append(trainer.evaluate(as_dataset(ROWS))["eval_loss"])
    assert losses[:3] == losses[3:]
    assert losses[0] == losses[2] != losses[1]


def add_adapter_like(model: torch.nn.Module, name: str) -> None:
    """A second adapter, with weights of its own."""
    model.add_adapter(name, model.peft_config["default"])
    with torch.no_grad():
        for full, weight in model.named_parameters():
            if f".{name}." in full:
                weight.normal_(generator=torch.Generator().manual_seed(1))


def test_a_checkpoint_leaves_no_context_that_adapters_encoded(tmp_path: Path) -> None:
    run = on(tmp_path, context_cache_size="1GiB", max_context_staleness=9, save_strategy="epoch")
    assert encoded(run) == encoded(on(tmp_path))


def test_a_later_run_finds_the_contexts_of_an_earlier_one(tmp_path: Path) -> None:
    fields = {"context_cache_dir": str(tmp_path / "contexts")}
    first, second = off(tmp_path, **fields), off(tmp_path, **fields)
    assert encoded(second) == [0] * 6
    assert equal(first.weights, second.weights)


def test_a_budget_for_some_of_the_contexts(tmp_path: Path) -> None:
    plain = off(tmp_path)
    whole = off(tmp_path, context_cache_size="1GiB").logs[-1]["context/memory_bytes"]
    for share in (0.3, 0.7):
        run = off(tmp_path, context_cache_size=str(int(share * whole)))
        assert 0 < run.logs[-1]["context/memory_bytes"] <= share * whole
        assert sum(encoded(run)) > sum(NUM_TOKENS)
        assert equal(run.weights, plain.weights)


@pytest.mark.parametrize("fields", [{}, {"bf16": True}, {"gradient_checkpointing": False}], ids=str)
def test_contexts_that_see_the_adapters_are_encoded_in_each_step(fields: dict, tmp_path: Path) -> None:
    kept, plain = on(tmp_path, context_cache_size="1GiB", **fields), on(tmp_path, **fields)
    assert encoded(kept) == encoded(plain)
    assert equal(kept.weights, plain.weights)


def test_staleness_reuses_what_the_last_steps_encoded(tmp_path: Path) -> None:
    exact = on(tmp_path)
    stale = on(tmp_path, context_cache_size="1GiB", max_context_staleness=2)
    assert encoded(stale)[2:4] == [0, 0]
    assert encoded(stale)[4:] == encoded(exact)[4:]
    # The first epoch is exact, and the second one is not: the comparison above would notice a stale context.
    assert all(torch.equal(stale.gradients[1][name], exact.gradients[1][name]) for name in exact.weights)
    assert worst_gradient_error(stale.gradients[2], exact.gradients[2]) > 100 * GRADIENT_TOLERANCE


def test_evaluation_encodes_anew_what_training_holds_stale(tmp_path: Path) -> None:
    fields = {"context_cache_size": "1GiB", "max_context_staleness": 9}
    run = on(tmp_path, eval_strategy="no", **fields)
    stale = run.trainer.evaluate(as_dataset(ROWS))["eval_loss"]
    run.trainer._frozen.encoder.store = None
    assert run.trainer.evaluate(as_dataset(ROWS))["eval_loss"] == stale


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tail", "turns"])
def test_on_a_4_bit_base(mode: str, tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "checkpoint")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2}
    tiny_model("qwen3_5_text", **sizes).save_pretrained(checkpoint)
    runs = []
    for fields in ({}, {"context_cache_size": "1GiB", "context_cache_dir": str(tmp_path / "contexts")}):
        torch.manual_seed(0)
        arguments = config(tmp_path / "run", context_adapters=False, decision_mode=mode, **EPOCHS, **fields)
        options = {"quantization_config": quantization_config(checkpoint), "peft_config": lora_config(checkpoint, r=2)}
        runs.append(train(FrozenContextTrainer, checkpoint, arguments, as_dataset(INVOKED[:4]), **options))
    assert encoded(runs[0]) == NUM_TOKENS * 3
    assert encoded(runs[1]) == [*NUM_TOKENS, 0, 0, 0, 0]
    assert equal(runs[0].weights, runs[1].weights)


def with_shared_document() -> list[Sample]:
    """Questions to two documents, in an order that no document likes."""
    made = []
    for seed, document in enumerate((0, 1, 0, 0, 1, 0, 1, 1)):
        generator = torch.Generator().manual_seed(document)
        trunk = torch.randint(3, 95, (66,), generator=generator)
        tail = torch.randint(3, 95, (9 + seed,), generator=torch.Generator().manual_seed(100 + seed))
        input_ids = torch.cat([trunk, tail])
        labels = input_ids.clone()
        labels[: 66 + 4] = IGNORED
        made.append(Sample(input_ids, labels))
    return made


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_a_document_is_encoded_once_per_step(size: int, accumulation: int, tmp_path: Path) -> None:
    rows = with_shared_document()
    fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    arguments = config(tmp_path, max_steps=2, **fields)
    run = train_in_float64(FrozenContextTrainer, adapted(), arguments, as_dataset(rows))
    prefixes = {tuple(row.context[:length].tolist()) for row in rows for length in range(1, row.boundary + 1)}
    assert encoded(run) == [len(prefixes)] * 2
    assert_trained_as(run, adapted(), reference_sgd(adapted(), [rows] * 2))


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5_moe_text"])
def test_shared_documents_with_windows_and_experts(name: str, tmp_path: Path) -> None:
    rows = with_shared_document()[:4]
    fields = {"gradient_accumulation_steps": 2, "max_steps": 1, "router_aux_loss_coef": 0.0}
    model = add_lora(tiny_model(name))
    expected = reference_gradients(model, rows)
    run = train(FrozenContextTrainer, model, config(tmp_path, **fields), as_dataset(rows))
    assert worst_gradient_error(run.gradients[0], expected) <= GRADIENT_TOLERANCE


def test_what_the_next_step_needs_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"context_cache_dir": str(tmp_path / "contexts")}
    off(tmp_path, **fields)
    threads = []
    read = ContextFiles.read

    def noting(self: ContextFiles, *key: Any) -> Any:
        import threading

        threads.append(threading.current_thread().name)
        return read(self, *key)

    monkeypatch.setattr(ContextFiles, "read", noting)
    off(tmp_path, **fields)
    assert len(threads) >= 12
    assert sum(name.startswith("contexts-read") for name in threads) >= len(threads) - 2


def test_worker_processes_load_the_data(tmp_path: Path) -> None:
    fields = {"context_cache_size": "1GiB", "context_cache_dir": str(tmp_path / "contexts")}
    assert equal(off(tmp_path, dataloader_num_workers=1, **fields).weights, off(tmp_path).weights)


@pytest.mark.parametrize("after", [0, 2])
def test_a_disk_that_fills_up_loses_no_step(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, calls = files._write_entry, []

    def filling_up(*args: Any) -> None:
        calls.append(args)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(files, "_write_entry", filling_up)
    run = off(tmp_path, context_cache_dir=str(tmp_path / "contexts"))
    assert len(calls) == after + 1
    assert len([record for record in caplog.records if "No space left on device" in record.getMessage()]) == 1
    assert equal(run.weights, off(tmp_path).weights)


def test_a_resumed_run_finds_its_contexts(tmp_path: Path) -> None:
    fields = {"context_cache_dir": str(tmp_path / "contexts"), "save_strategy": "steps", "save_steps": 3}
    whole = off(tmp_path, **fields)
    arguments = config(tmp_path / "run", context_adapters=False, **EPOCHS, **fields)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    resumed = train(FrozenContextTrainer, adapted(), arguments, as_dataset(INVOKED[:4]), resume=checkpoint)
    assert encoded(resumed)[-3:] == [0] * 3
    assert equal(resumed.weights, whole.weights)


@pytest.mark.parametrize("size", ["8 gigs", "-1", "GiB", "", "nan"])
def test_sizes_that_are_none(size: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`context_cache_size`: .* such as '8GiB'"):
        config(tmp_path, context_cache_size=size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tier": 1, "context_cache_size": "1GiB"}, "no context is frozen"),
        (
            {"tier": 1, "context_cache_size": "1GiB", "context_cache_dtype": "int8"},
            "`context_cache_dtype`: no context",
        ),
        ({"max_context_staleness": 2}, "keep nothing"),
        ({"max_context_staleness": 2, "context_adapters": False, "context_cache_size": "1GiB"}, "nothing goes stale"),
        ({"context_cache_dir": "contexts"}, "beyond one optimizer step"),
    ],
    ids=str,
)
def test_fields_without_effect_are_warned_about(
    fields: dict, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="frozen_peft.config"):
        config(tmp_path, **fields)
    assert message in caplog.text


@pytest.mark.parametrize("fields", [{"max_context_staleness": -1}, {"max_decisions_per_forward": 0}], ids=str)
def test_fields_out_of_range(fields: dict, tmp_path: Path) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=rf"`{name}` must be"):
        config(tmp_path, **fields)

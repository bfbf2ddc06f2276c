# SPDX-License-Identifier: Apache-2.0
"""Whole trainings and commands on the stand-in for a card, against the same on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from frozen_peft import FrozenContextConfig, FrozenContextTrainer, lora_config, merge_adapter, quantization_config
from frozen_peft.cli import main
from frozen_peft.merging import comparison
from tests.card import CARD, GIBIBYTE, Card, stand_in_card
from tests.merging.cases import Case, preset, save_case
from tests.reference import random_sample
from tests.tiny_models import tiny_model
from tests.training.runs import word_tokenizer, words

pytestmark = pytest.mark.slow
ROWS = [random_sample(150, 9, seed=seed) for seed in range(4)]
# Between the card's sums and the CPU's, both in float32.
TOLERANCE = 1e-5
KEEPING = {"max_steps": 4, "max_context_staleness": 9}


def losses(folder: Path, name: str, **fields: Any) -> list[float]:
    """Of each step and of an evaluation, and of a run that goes on from the middle where there is a checkpoint."""
    rows = {"input_ids": [row.input_ids.tolist() for row in ROWS], "labels": [row.labels.tolist() for row in ROWS]}
    data = Dataset.from_dict(rows)
    quantized = fields.pop("quantized", False)
    arguments = {
        "tier": 2,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "context_cache_dir": str(folder / "contexts") if fields.pop("on_disk", False) else None,
    } | fields

    def trainer() -> FrozenContextTrainer:
        model: Any = tiny_model(name)
        if quantized:
            model.save_pretrained(folder / "base")
            model = str(folder / "base")
        return FrozenContextTrainer(
            model,
            FrozenContextConfig(str(folder / "out"), **arguments),
            train_dataset=data,
            eval_dataset=data,
            processing_class=word_tokenizer(),
            peft_config=lora_config(model, lora_dropout=0.0),
            quantization_config=quantization_config(model) if quantized else None,
        )

    made = trainer()
    made.train()
    made.evaluate()
    logged = [*made.state.log_history]
    if arguments["save_strategy"] == "steps":
        again = trainer()
        again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-1"))
        logged += again.state.log_history
    assert {weight.device.type for weight in made.model.parameters()} == {made.args.device.type}
    return [value for entry in logged for key, value in entry.items() if key in ("loss", "eval_loss")]


def on_card(folder: Path, name: str, **fields: Any) -> tuple[list[float], Card]:
    facts = fields.pop("facts", {})
    with stand_in_card(**facts) as card:
        return losses(folder, name, **fields), card


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen3_5_text", {"save_strategy": "steps", "save_steps": 1}),
        ("gemma3_text", {"gradient_checkpointing": False}),
        ("qwen3_5_moe_text", {}),
        ("qwen3_5_text", {"tier": 3, "sequence_chunk_size": 32, "offload_stretches": True}),
        ("qwen3_5_text", {"gradient_horizon": 40, "sequence_chunk_size": 32, "offload_stretches": True}),
        ("qwen3_5_text", {"context_cache_size": "1GiB"} | KEEPING),
        ("qwen3_5_text", {"on_disk": True} | KEEPING),
        ("qwen3_5_text", {"on_disk": True, "context_cache_dtype": "int8"} | KEEPING),
    ],
    ids=str,
)
def test_a_training_in_float32_is_that_of_the_cpu(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    expected = losses(tmp_path / "cpu", name, **fields)
    actual, card = on_card(tmp_path / "card", name, **fields)
    assert actual == pytest.approx(expected, rel=TOLERANCE)
    assert {"Event.record", "Event.synchronize", "Event.elapsed_time"} <= card.calls
    if "on_disk" in fields:
        assert {"Stream.record_event", "Stream.wait_event", "TensorBase.record_stream"} <= card.calls


@pytest.mark.parametrize("fields", [{"bf16": True}, {"fp16": True}, {"bf16": True, "quantized": True}], ids=str)
def test_a_training_in_16_bit_takes_the_cards_kernels(fields: dict[str, Any], tmp_path: Path) -> None:
    """Prefill in chunks by flash attention with a mask at the lower right, the decision by 16-bit products."""
    cut = {"prefill_chunk_size": 64, "learning_rate": 1e-6} | fields
    actual, card = on_card(tmp_path / "card", "qwen3_5_text", **cut)
    kernels = {"aten.bmm.dtype", "aten._scaled_dot_product_flash_attention.default", "aten.addmm.dtype_out"}
    assert kernels <= card.calls
    # One rounding to 16 bit in each of some ten products, of losses about five.
    assert actual == pytest.approx(losses(tmp_path / "cpu", "qwen3_5_text", **cut), rel=2e-2)


def test_a_card_from_before_ampere_takes_no_16_bit_products(tmp_path: Path) -> None:
    _, card = on_card(tmp_path, "llama", fp16=True, facts={"capability": (7, 5)})
    assert "aten.bmm.dtype" not in card.calls
    assert "aten._scaled_dot_product_flash_attention.default" not in card.calls


def test_what_the_card_has_no_room_for_lies_in_pinned_memory(tmp_path: Path) -> None:
    """Its reserve of 2 GiB is all that there is, so nothing that is kept stays on the card."""
    fields = {"context_cache_size": "1GiB"} | KEEPING
    expected = losses(tmp_path / "cpu", "qwen3_5_text", **fields)
    actual, card = on_card(tmp_path / "card", "qwen3_5_text", facts={"total_bytes": 2 * GIBIBYTE}, **fields)
    assert actual == pytest.approx(expected, rel=TOLERANCE)
    assert "mem_get_info" in card.calls


def test_a_step_that_does_not_fit_says_what_takes_less(tmp_path: Path) -> None:
    model = tiny_model("qwen3_5_text")
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)CUDA out of memory.*`sequence_chunk_size|Lower"):
        on_card(tmp_path, "qwen3_5_text", verify_context="never", facts={"total_bytes": 2 * weights})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{words(90, seed=0)} w{number} ", "completion": words(3, seed=number)} for number in range(4)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'base'}\ndataset_name: {tmp_path / 'samples.jsonl'}\n"
        f"output_dir: {tmp_path / 'out'}\ntier: 2\nlora_r: 2\nmax_steps: 2\nreport_to: none\nnum_examples: 1\n"
        f"eval_dataset_name: {tmp_path / 'samples.jsonl'}\n"
    )
    return tmp_path / "recipe.yaml"


def test_commands_plan_for_the_card_and_record_it(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in_card():
        assert main(["train", str(recipe)]) == 0
    printed, out = capsys.readouterr().out, recipe.parent / "out"
    assert "peak memory" in printed
    plan = json.loads((out / "plan.json").read_text())
    assert plan["memory_limit_bytes"] == 80 * GIBIBYTE
    assert plan["setting"]["accelerator"] is True
    memory = json.loads(next(out.rglob("memory.json")).read_text())
    assert memory["how"] == "cuda"
    assert memory["peak_bytes"] > memory["peak_bytes_above_model"] > 0
    assert json.loads(next(out.rglob("versions.json")).read_text())["device"] == "1 x NVIDIA H100 (none)"
    with stand_in_card():
        assert main(["inspect", str(recipe), "--samples", "2", "--advise", "true"]) == 0
    with stand_in_card(total_bytes=1 << 16):
        assert main(["train", str(recipe)]) == 2
    assert "the run cannot fit on the GPU" in capsys.readouterr().err


def test_a_merge_is_verified_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = save_case(Case("qwen3_5_text", preset()), tmp_path)
    word_tokenizer().save_pretrained(base)
    samples = [{"prompt": words(12, seed=0), "completion": " " + words(4, seed=1)}]
    devices = []
    load = comparison._load

    def noted(folder: Path, config: Any, device: str, **options: Any) -> Any:
        devices.append(device)
        return load(folder, config, device, **options)

    monkeypatch.setattr(comparison, "_load", noted)
    expected = merge_adapter(adapter, tmp_path / "cpu", base, samples=samples)["verification"]
    with stand_in_card():
        assert comparison.fits(GIBIBYTE)
        assert not comparison.fits(80 * GIBIBYTE)
        actual = merge_adapter(adapter, tmp_path / "card", base, samples=samples)["verification"]
    assert set(devices) == {"cpu", CARD.type}
    assert actual.keys() == expected.keys(), expected

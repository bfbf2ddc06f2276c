# SPDX-License-Identifier: Apache-2.0
"""What the report says of a merged model, against plain forwards; and merges that went wrong."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from frozen_peft import merge_adapter
from frozen_peft.merging import MergeMismatchError, merging
from tests.merging.cases import Case, lora, preset, save_case
from tests.tiny_models import tiny_model
from tests.training.runs import word_tokenizer, words

SAMPLES = [
    {
        "prompt": [{"role": "user", "content": words(20, seed=seed)}],
        "completion": [{"role": "assistant", "content": words(6, seed=100 + seed)}],
    }
    for seed in range(5)
] + [{"prompt": words(12, seed=50), "completion": " " + words(4, seed=51)}]


def with_tokenizer(base: Path) -> Path:
    word_tokenizer().save_pretrained(base)
    return base


def plain_loss(model: torch.nn.Module) -> float:
    """Mean over all decision tokens, tokenized by hand."""
    tokenizer = word_tokenizer()
    total, count = 0.0, 0
    for sample in SAMPLES:
        if isinstance(sample["prompt"], str):
            context, decision = sample["prompt"], sample["completion"] + "<|im_end|>"
        else:
            context = "<|im_start|> user " + sample["prompt"][0]["content"] + " <|im_end|> <|im_start|> assistant "
            decision = sample["completion"][0]["content"] + " <|im_end|>"
        begin, end = (tokenizer(text)["input_ids"] for text in (context, decision))
        ids = torch.tensor([begin + end])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(begin) - 1 : -1]
        total += float(cross_entropy(logits, torch.tensor(end), reduction="sum"))
        count += len(end)
    return total / count


@pytest.mark.parametrize(
    "case",
    [
        Case("qwen3_5_text", preset()),
        # The base has biases, which PEFT leaves the adapter's where it is switched off.
        Case("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all")),
    ],
    ids=["lora", "biases"],
)
def test_report_has_losses_recovery_and_decisions(case: Case, tmp_path: Path) -> None:
    base, adapter = save_case(case, tmp_path)
    with_tokenizer(base)
    returned = merge_adapter(adapter, tmp_path / "merged", base, samples=SAMPLES)
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report == json.loads(json.dumps(returned))
    found = report["verification"]
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    wanted = {"base": plain_loss(plain)}
    wanted["merged"] = plain_loss(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    wanted["adapter"] = plain_loss(PeftModel.from_pretrained(plain, adapter).eval())
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["samples"] == len(SAMPLES)
    assert found["equal_greedy_decisions"] == found["prompts"] == len(SAMPLES)
    assert found["log_probability_difference"]["max"] < 1e-4 < 0.1 < found["adapter_effect"]["mean"]
    gain = wanted["base"] - wanted["adapter"]
    assert found["recovery"] == (None if gain <= 0 else pytest.approx(1.0, abs=1e-3))


@pytest.mark.parametrize(("in_4_bit", "onto"), [(False, "original"), (True, "quantized"), (True, "original")])
def test_recovery_in_bfloat16(in_4_bit: bool, onto: str, tmp_path: Path) -> None:
    """A trained adapter gains; its 16-bit merge loses a hundredth of that at most."""
    base, adapter = trained_adapter(tmp_path, in_4_bit=in_4_bit)
    report = merge_adapter(adapter, tmp_path / "merged", base, dtype="bf16", onto=onto, samples=SAMPLES[:5])
    found = report["verification"]
    assert found["dtype"] == "bfloat16"
    assert found["loss"]["base"] - found["loss"]["adapter"] > 0.5
    print(f"recovery {found['recovery']:.4f}, trained in 4 bit: {in_4_bit}, merged onto: {onto}")
    # On other weights than it was trained on, an adapter recovers what it recovers; that is reported.
    if in_4_bit and onto == "original":
        assert found["recovery"] is not None
    else:
        assert found["recovery"] >= 0.99


def trained_adapter(folder: Path, *, in_4_bit: bool) -> tuple[Path, Path]:
    """Trains on the samples by heart."""
    from datasets import Dataset

    from frozen_peft import FrozenContextTrainer, lora_config, quantization_config
    from tests.training.runs import config

    base = folder / "base"
    tiny_model("qwen3_5_text", dtype=torch.bfloat16).save_pretrained(base)
    with_tokenizer(base)
    trainer = FrozenContextTrainer(
        model=str(base),
        args=config(
            folder / "adapter",
            max_steps=30,
            tier=2,
            optim="adamw_torch",
            learning_rate=0.02,
            logging_steps=30,
            model_init_kwargs={"dtype": "bfloat16"},
        ),
        train_dataset=Dataset.from_list(SAMPLES[:5]),
        processing_class=word_tokenizer(),
        quantization_config=quantization_config(str(base)) if in_4_bit else None,
        peft_config=lora_config(str(base), r=4),
    )
    trainer.train()
    trainer.save_model()
    return base, folder / "adapter"


def test_a_merge_that_loses_the_adapter_is_an_error_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    base, adapter = save_case(Case("llama", lora()), tmp_path)
    real = merging.plan_shards

    def forgetful(checkpoint, model, updates, dtype, quantized):
        return real(checkpoint, model, {}, dtype, quantized)

    monkeypatch.setattr(merging, "plan_shards", forgetful)
    with pytest.raises(MergeMismatchError, match=r"is not its base and adapter: log-probabilities of \d+ tokens"):
        merge_adapter(adapter, tmp_path / "merged", base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert merge_adapter(adapter, tmp_path / "merged", base, verify=False)["verification"] is None


def test_a_model_too_large_for_memory_is_not_verified(tmp_path, monkeypatch, caplog) -> None:
    base, adapter = save_case(Case("llama", lora()), tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    assert merge_adapter(adapter, tmp_path / "merged", base)["verification"] is None
    assert "does not fit in memory" in caplog.text


def test_samples_without_tokenizer_or_decision_are_named(tmp_path: Path) -> None:
    base, adapter = save_case(Case("llama", lora()), tmp_path)
    with pytest.raises(ValueError, match="Samples need a tokenizer"):
        merge_adapter(adapter, tmp_path / "merged", base, samples=SAMPLES)
    with_tokenizer(base)
    with pytest.raises(ValueError, match="Sample 2: a sample has the column `prompt` or `messages`"):
        merge_adapter(adapter, tmp_path / "merged", base, samples=[SAMPLES[0], {"text": "w1 w2"}])

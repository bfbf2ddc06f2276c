# SPDX-License-Identifier: Apache-2.0
"""Preferences over bases that are more than plain weights: in 4 bit, and mixtures of experts."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM
from trl.trainer.utils import use_adapter

from frozen_peft import (
    FrozenContextDPOConfig,
    FrozenContextDPOTrainer,
    FrozenContextKTOConfig,
    FrozenContextKTOTrainer,
    lora_config,
    quantization_config,
)
from tests.reference import double_precision, worst_gradient_error
from tests.tiny_models import tiny_model
from tests.training.preferences import acting_lora, as_tokens, first_figures, pairs, settings, sigmoid_loss, untouched
from tests.training.runs import Run, gradients_of, in_float64, train, word_tokenizer
from tests.training.test_kto import kto_loss

ROWS = pairs()
ANSWERS = [
    {
        "prompt_ids": row.prompt.tolist(),
        "completion_ids": row.chosen.tolist(),
        "KL_completion_ids": row.rejected.tolist(),
        "label": bool(index % 2),
    }
    for index, row in enumerate(ROWS)
]
METHODS: dict[str, tuple[type, type, Dataset]] = {
    "dpo": (FrozenContextDPOTrainer, FrozenContextDPOConfig, as_tokens(ROWS)),
    "kto": (FrozenContextKTOTrainer, FrozenContextKTOConfig, Dataset.from_list(ANSWERS)),
}


class Reference:
    """A model that is called as the reference is: with its adapters off, or with those that TRL has copied on."""

    def __init__(self, model: PeftModel):
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        with use_adapter(self.model, "ref" if "ref" in self.model.peft_config else None):
            return self.model(**inputs)


def trained(
    method: str, model: Any, folder: Path, peft_config: Any, dtype: torch.dtype = torch.float32, **fields: Any
) -> Run:
    trainer, kind, rows = METHODS[method]
    given = {"per_device_train_batch_size": len(ROWS), "learning_rate": 0.0, **fields}

    class InPrecision(trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            # TRL (1.16) rounds adapters over a base in 4 bit to bfloat16, but not the copy that is their reference.
            convert(self.model, dtype)
            with double_precision(self.model) if dtype == torch.float64 else nullcontext():
                return super().train(*args, **kwargs)

    return train(InPrecision, model, settings(folder, kind, **given), rows, peft_config=peft_config)


def convert(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Has a model compute in a precision; a base in 4 bit keeps its values, which bitsandbytes has not in float64."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if dtype == torch.float64:
                values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                module.forward = partial(functional.linear, weight=values.to(dtype))
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("comes_trained", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_base_in_4_bit_trains_as_direct_autograd_says(
    method: str, comes_trained: bool, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    """The reference is that base, or adapters on it as they were.

    By bitsandbytes in float32, whose rounding leaves some 1e-5 of these gradients, and with its values in float64.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2}
    tiny_model("qwen3_5_text", **sizes).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    quantization = quantization_config(str(tmp_path / "base"), bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, dtype=torch.float32
    )
    peft_config: Any = lora_config(base, r=2, init_lora_weights=False)
    if comes_trained:
        base, peft_config = get_peft_model(base, peft_config), None
    run = trained(method, base, tmp_path / "run", peft_config, dtype)
    model = untouched(run.trainer.model)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    # In eval mode bitsandbytes would repack the weights, for good.
    model.train()
    assert ("ref" in model.peft_config) is comes_trained
    reference = Reference(model)
    with double_precision(model) if dtype == torch.float64 else nullcontext():
        loss = kto_loss(model, reference, ANSWERS, "kto") if method == "kto" else sigmoid_loss(model, reference, ROWS)
        expected = gradients_of(loss, model)
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert worst_gradient_error(run.gradients[0], expected) <= tolerance


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_balanced_over_the_policys_decisions(method: str, tmp_path: Path) -> None:
    """What TRL adds to the loss for them, of the answers and not of mismatched ones or of the reference."""
    runs = []
    for coefficient in (0.5, 0.0):
        base = tiny_model("qwen3_5_moe_text")
        with in_float64(base) as model:
            folder = tmp_path / str(coefficient)
            runs.append(
                trained(method, model, folder, acting_lora(base), torch.float64, router_aux_loss_coef=coefficient)
            )
    added = first_figures(runs[0])["aux_loss"]
    assert added > 0.1
    assert runs[0].losses[0] - runs[1].losses[0] == pytest.approx(0.5 * added, rel=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""Preferences over bases that are more than plain weights: in 4 bit, and mixtures of experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
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
from tests.reference import worst_gradient_error
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


def trained(method: str, model: Any, folder: Path, peft_config: Any, **fields: Any) -> Run:
    trainer, kind, rows = METHODS[method]
    given = {"per_device_train_batch_size": len(ROWS), "learning_rate": 0.0, **fields}

    class InSinglePrecision(trainer):  # type: ignore[misc, valid-type]
        def train(self, *args: Any, **kwargs: Any) -> Any:
            # TRL (1.16) rounds adapters over a base in 4 bit to bfloat16, but not the copy that is their reference.
            for weight in self.model.parameters():
                if weight.dtype == torch.bfloat16:
                    weight.data = weight.data.float()
            return super().train(*args, **kwargs)

    return train(InSinglePrecision, model, settings(folder, kind, **given), rows, peft_config=peft_config)


@pytest.mark.slow
@pytest.mark.parametrize("comes_trained", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_base_in_4_bit_trains_as_direct_autograd_says(method: str, comes_trained: bool, tmp_path: Path) -> None:
    """The reference is that base, or adapters on it as they were."""
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
    run = trained(method, base, tmp_path / "run", peft_config)
    model = untouched(run.trainer.model)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    # In eval mode bitsandbytes would repack the weights, for good.
    model.train()
    assert ("ref" in model.peft_config) is comes_trained
    reference = Reference(model)
    loss = kto_loss(model, reference, ANSWERS, "kto") if method == "kto" else sigmoid_loss(model, reference, ROWS)
    expected = gradients_of(loss, model)
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    # bitsandbytes has no float64, and rounding of float32 leaves some 1e-5 of these gradients.
    assert worst_gradient_error(run.gradients[0], expected) <= 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_balanced_over_the_policys_decisions(method: str, tmp_path: Path) -> None:
    """What TRL adds to the loss for them, of the answers and not of mismatched ones or of the reference."""
    runs = []
    for coefficient in (0.5, 0.0):
        base = tiny_model("qwen3_5_moe_text")
        with in_float64(base) as model:
            folder = tmp_path / str(coefficient)
            runs.append(trained(method, model, folder, acting_lora(base), router_aux_loss_coef=coefficient))
    added = first_figures(runs[0])["aux_loss"]
    assert added > 0.1
    assert runs[0].losses[0] - runs[1].losses[0] == pytest.approx(0.5 * added, rel=1e-5)

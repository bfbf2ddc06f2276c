# SPDX-License-Identifier: Apache-2.0
"""What stands before `SFTTrainer` stands before another trainer of TRL: preference pairs over one frozen context."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from trl import DPOConfig, DPOTrainer

from frozen_peft.config import ContextFields
from frozen_peft.training.batches import BatchCutter
from frozen_peft.training.checks import BatchChecks
from frozen_peft.training.mixin import FrozenContextMixin
from frozen_peft.training.model_setup import make_cut, prepare_model
from frozen_peft.utils.compat.trl import trainer_tokenizer
from tests.reference import IGNORED, Sample, token_logprobs, worst_gradient_error
from tests.tiny_models import tiny_model
from tests.training.runs import RESPONSE, Run, config, gradients_of, stopped_forward, train, words

BETA = 0.5
# Tokens of prompt, chosen and rejected answer; no total length is the size of a weight.
SHAPES = ((40, 6, 9), (65, 3, 2), (24, 12, 5), (129, 4, 7))


@dataclass
class PairConfig(ContextFields, DPOConfig):
    """`DPOConfig` with the fields of contexts."""

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS


class PairTrainer(FrozenContextMixin, DPOTrainer):
    """The least that a second trainer takes."""

    def __init__(self, model: Any, args: PairConfig, **kwargs: Any):
        super().__init__(model, args=args, **kwargs)
        cut = make_cut(args, trainer_tokenizer(self), ())
        prepare_model(self, cut, None)
        cutter = BatchCutter(cut, None, trainer_tokenizer(self).pad_token_id, supervision="completion_mask")
        self._train_over(cutter, BatchChecks(args))


class PlainTrainer(DPOTrainer):
    """TRL's, with the model first and the configuration second."""

    def __init__(self, model: Any, args: DPOConfig, **kwargs: Any):
        super().__init__(model, args=args, **kwargs)


def as_pairs() -> Dataset:
    """Rows of text, which TRL prepares."""
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_list(
        [
            {
                name: words(length, seed=10 * row + part) + " "
                for part, (name, length) in enumerate(zip(names, shape, strict=True))
            }
            for row, shape in enumerate(SHAPES)
        ]
    )


def prepared(run: Run, count: int) -> list[list[torch.Tensor]]:
    """Token ids of the first rows: prompt, chosen and rejected answer."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [[torch.tensor(row[name]) for name in names] for row in run.trainer.train_dataset.select(range(count))]


def settings(folder: Path, kind: type[DPOConfig], **fields: Any) -> Any:
    return config(folder, kind, max_steps=2, beta=BETA, **fields)


def train_pairs(trainer: type[DPOTrainer], name: str, args: DPOConfig) -> Run:
    """Trains adapters that do something from the first step on; the reference is the model without them."""
    targets = [
        target for target in RESPONSE if any(name.endswith(target) for name, _ in tiny_model(name).named_modules())
    ]
    adapters = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return train(trainer, tiny_model(name), args, as_pairs(), peft_config=adapters)


def log_ratio(model: PeftModel, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Log-probability of an answer, less what the base gives it, with a stop-gradient on the context."""
    input_ids = torch.cat([prompt, answer])
    labels = input_ids.clone()
    labels[: len(prompt)] = IGNORED
    sample = Sample(input_ids, labels)
    own = token_logprobs(stopped_forward(model, sample).logits[0, sample.boundary :], sample.decision)
    with torch.no_grad(), model.disable_adapter():
        base = token_logprobs(model(input_ids=input_ids[None]).logits[0, sample.boundary :], sample.decision)
    return own.sum() - base.sum()


def pair_loss(model: PeftModel, rows: Any) -> torch.Tensor:
    margins = [
        log_ratio(model, prompt, chosen) - log_ratio(model, prompt, rejected) for prompt, chosen, rejected in rows
    ]
    return -nn.functional.logsigmoid(BETA * torch.stack(margins)).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3_5_text", "llama"])
def test_pairs_over_one_frozen_context_train_as_direct_autograd_says(
    tmp_path: Path, name: str, checkpointing: bool
) -> None:
    args = settings(tmp_path, PairConfig, gradient_checkpointing=checkpointing, learning_rate=0.0)
    run = train_pairs(PairTrainer, name, args)
    loss = pair_loss(run.trainer.model, prepared(run, 2))
    assert worst_gradient_error(run.gradients[0], gradients_of(loss, run.trainer.model)) <= 1e-4
    # What adapters do over the base is not nothing.
    assert max(abs(loss - math.log(2)) for loss in run.losses) > 0.1
    # The logged loss has few digits.
    assert run.losses[0] == pytest.approx(loss.item(), abs=1e-4)
    assert run.trainer._frozen.encoder.counts.num_tokens_encoded > 0


def test_a_context_is_encoded_once_for_both_answers(tmp_path: Path) -> None:
    args = settings(tmp_path, PairConfig)
    run = train_pairs(PairTrainer, "llama", args)
    counts = run.trainer._frozen.encoder.counts
    assert counts.num_tokens_asked == 2 * counts.num_tokens_encoded


def test_it_is_the_training_of_trl_where_nothing_is_frozen(tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole", PairConfig, tier=1)
    ours = train_pairs(PairTrainer, "llama", whole)
    plain = train_pairs(PlainTrainer, "llama", settings(tmp_path / "plain", DPOConfig))
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    assert worst_gradient_error(ours.gradients[1], plain.gradients[1]) <= 1e-5

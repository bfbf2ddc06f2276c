# SPDX-License-Identifier: Apache-2.0
"""Short preference trainings, and what they have to compute: plain forwards with a stop-gradient at context positions.

The reference model is run by plain forwards too, without adapters or as it was before training. Losses are written out
where TRL's is compared with, and TRL's own where what goes into it is.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from frozen_peft.training.dpo import FrozenContextDPOConfig, FrozenContextDPOTrainer
from tests.reference import IGNORED, Sample, stop_gradient_at_context, token_logprobs
from tests.tiny_models import add_lora, tiny_model
from tests.training.runs import RESPONSE, Run, config, in_float64, train, without_timings, words

BETA = 0.5
# Tokens of prompt, chosen and rejected answer; no total length is the size of a weight.
SHAPES = ((40, 6, 9), (65, 3, 1), (23, 12, 5), (129, 1, 7))


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and the answers to it, each `[tokens]`."""

    prompt: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor

    def sample(self, answer: torch.Tensor, horizon: int = 0) -> Sample:
        """Prompt and answer; what the horizon adds to the decision is supervised for its boundary alone."""
        input_ids = torch.cat([self.prompt, answer])
        labels = input_ids.clone()
        labels[: max(len(self.prompt) - horizon, 1)] = IGNORED
        return Sample(input_ids, labels)


def pairs(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[Pair]:
    """Random pairs."""
    generator = torch.Generator().manual_seed(0)
    return [Pair(*(torch.randint(7, 88, (size,), generator=generator) for size in shape)) for shape in shapes]


def as_tokens(rows: Sequence[Pair]) -> Dataset:
    """A tokenized dataset."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": row.prompt.tolist(),
                "chosen_ids": row.chosen.tolist(),
                "rejected_ids": row.rejected.tolist(),
            }
            for row in rows
        ]
    )


def as_text(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Dataset:
    """Rows of text, which TRL prepares."""
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_list(
        [
            {
                name: words(length, seed=10 * row + part) + " "
                for part, (name, length) in enumerate(zip(names, shape, strict=True))
            }
            for row, shape in enumerate(shapes)
        ]
    )


def settings(folder: Path, kind: type[DPOConfig] = FrozenContextDPOConfig, **fields: Any) -> Any:
    return config(folder, kind, **{"max_steps": 1, "beta": BETA, **fields})


def acting_lora(model: PreTrainedModel) -> LoraConfig:
    """Adapters that do something from the first step on; the reference is the model without them."""
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in RESPONSE if name in present]
    return LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)


class Plain(DPOTrainer):
    """TRL's, which takes a tokenized dataset."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        tokenized = "prompt_ids" in next(iter(dataset))
        return dataset if tokenized else super()._prepare_dataset(dataset, *args)


def train_pairs(args: Any, rows: Any, model: nn.Module | str = "llama", **kwargs: Any) -> Run:
    """Trains, by ours or TRL's as the configuration says; in float64, so that what differs is not rounding."""
    trainer = FrozenContextDPOTrainer if isinstance(args, FrozenContextDPOConfig) else Plain
    model = tiny_model(model) if isinstance(model, str) else model
    if not isinstance(model, PeftModel):
        kwargs.setdefault("peft_config", acting_lora(model))
    rows = as_tokens(rows) if isinstance(rows, list) else rows
    # What TRL (1.16) does for this it does in float32 alone.
    precision = (
        nullcontext(copy.deepcopy(model)) if args.f_divergence_type == "alpha_divergence" else in_float64(model)
    )
    with precision as policy:
        return train(trainer, policy, args, rows, **kwargs)


def log_ratio(
    model: nn.Module, reference: nn.Module, pair: Pair, answer: torch.Tensor, horizon: int = 0
) -> torch.Tensor:
    """Log-probability of an answer, less what the reference gives it, with a stop-gradient on the context."""
    sample = pair.sample(answer, horizon)
    boundary, length = len(pair.prompt) - 1, len(sample.input_ids)
    with stop_gradient_at_context(model, sample.boundary, length):
        own = model(input_ids=sample.input_ids[None], use_cache=False).logits[0]
    with torch.no_grad():
        base = reference(input_ids=sample.input_ids[None], use_cache=False).logits[0]
    tokens = sample.input_ids[boundary:]
    return token_logprobs(own[boundary:], tokens).sum() - token_logprobs(base[boundary:], tokens).sum()


def sigmoid_loss(model: nn.Module, reference: nn.Module, rows: Sequence[Pair], horizon: int = 0) -> torch.Tensor:
    """DPO's loss as its paper has it."""
    margins = [
        log_ratio(model, reference, row, row.chosen, horizon) - log_ratio(model, reference, row, row.rejected, horizon)
        for row in rows
    ]
    return -nn.functional.logsigmoid(BETA * torch.stack(margins)).mean()


def untouched(model: nn.Module) -> nn.Module:
    """A copy of a model whose forward is its class's: TRL's is bound to the model that it was put on."""
    copied = copy.deepcopy(model)
    base = copied.get_base_model() if isinstance(copied, PeftModel) else copied
    vars(base).pop("forward", None)
    base.gradient_checkpointing_disable()
    return copied.eval()


def without_adapters(model: PeftModel) -> nn.Module:
    """A copy of the base."""
    return untouched(model).unload()


class Stopped:
    """Stands in for a policy that TRL's loss calls with a whole batch: each row by itself, its context stopped."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        figures = {name: [] for name in ("log_probs", "log_sum_sq_probs", "entropy", "mean_logits", "is_top1")}
        for ids, mask, row in zip(input_ids, attention_mask.bool(), labels, strict=True):
            sample = Sample(ids[mask], row[mask])
            with stop_gradient_at_context(self.model, sample.boundary, len(sample.input_ids)):
                logits = self.model(input_ids=sample.input_ids[None], use_cache=False).logits[0, :-1]
            logprobs, targets = logits.log_softmax(-1), sample.labels[1:]
            values = {
                "log_probs": logprobs.gather(-1, targets.clamp(min=0)[:, None])[:, 0],
                "log_sum_sq_probs": (2 * logprobs).logsumexp(-1),
                "entropy": -(logprobs.exp() * logprobs).sum(-1),
                "mean_logits": logits.mean(-1),
                "is_top1": (logits.argmax(-1) == targets).to(logits.dtype),
            }
            for name, value in values.items():
                value = value.masked_fill(targets == IGNORED, 0.0)
                figures[name].append(nn.functional.pad(value, (0, input_ids.shape[1] - len(ids[mask]))))
        stacked = {name: torch.stack(rows) for name, rows in figures.items()}
        return SimpleNamespace(**stacked | {"is_top1": stacked["is_top1"].bool()})


def adapted_everywhere(name: str) -> PeftModel:
    """Random adapters on every linear module that takes one."""
    return add_lora(tiny_model(name))


def first_figures(run: Run) -> dict[str, float]:
    """What TRL logs of the first step, without the clock."""
    own = ("context/", "reference/")
    return {key: value for key, value in without_timings(run.logs)[0].items() if not key.startswith(own)}

# SPDX-License-Identifier: Apache-2.0
"""Trainings in which the model writes its own answers, and what they wrote."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from frozen_peft import FrozenContextTrainer
from frozen_peft.context import FrozenContext
from frozen_peft.distillation import Prompt, Writer
from tests.distillation.pairs import Loss, Pair, as_dataset, pairs
from tests.reference import IGNORED, Sample
from tests.training.runs import Run, config, train

# Prompts of which none is as long with an answer as a weight is wide, which `tests.reference` needs.
SHAPES = ((140, 3), (110, 5), (170, 2), (131, 4))
ROWS = pairs(SHAPES)
NUM_ANSWERS, MAX_TOKENS = 3, 7
LOSS = Loss("reverse_kl")
# So many that some answers end, and some do not.
STOPS = list(range(3, 15))


@dataclass
class Written:
    """What was written in one micro-batch.

    Attributes:
        prompts: What was answered.
        answers: To each of them.
        frozen: What it was answered over.
    """

    prompts: list[Prompt]
    answers: list[list[torch.Tensor]]
    frozen: FrozenContext | None

    @property
    def pairs(self) -> list[Pair]:
        """Every answer as a sample, for student and teacher."""
        return [
            Pair(_behind(prompt.tokens, answer), _behind(_tokens(prompt.teacher), answer))
            for prompt, own in zip(self.prompts, self.answers, strict=True)
            for answer in own
        ]


def keeping(kept: list[Written]) -> Callable[..., list[list[torch.Tensor]]]:
    """`Writer.write`, which keeps what was written."""
    write = Writer.write

    def keep(self: Writer, prompts: Sequence[Prompt], frozen: FrozenContext | None) -> list[list[torch.Tensor]]:
        answers = write(self, prompts, frozen)
        kept.append(Written(list(prompts), answers, frozen))
        return answers

    return keep


def on_policy(
    model: PeftModel, folder: Path, rows: Sequence[Pair] = ROWS[:2], loss: Loss = LOSS, **fields: Any
) -> Run:
    """Trains a copy of a model, by default one step on its own answers alone."""
    own = {"distill_on_policy": 1.0, "num_generations": NUM_ANSWERS, "max_completion_length": MAX_TOKENS}
    kwargs = {name: fields.pop(name) for name in ("resume", "eval_dataset", "callbacks") if name in fields}
    arguments = config(folder, **({"max_steps": 1} | loss.fields | own | fields))
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = STOPS
    return train(FrozenContextTrainer, model, arguments, as_dataset(rows), **kwargs)


def prompt_pair(row: Pair) -> Pair:
    """The pair without its decision: a prompt alone, tokenized."""
    return Pair(*(_without_decision(sample) for sample in (row.student, row.teacher)))


def _without_decision(sample: Sample) -> Sample:
    ids = sample.input_ids[: sample.boundary + 1]
    return Sample(ids, torch.full_like(ids, IGNORED))


def _tokens(decision: Any) -> torch.Tensor:
    return torch.cat([decision.context, decision.input_ids])


def _behind(prompt: torch.Tensor, answer: torch.Tensor) -> Sample:
    return Sample(torch.cat([prompt, answer]), torch.cat([torch.full_like(prompt, IGNORED), answer]))

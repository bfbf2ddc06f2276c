# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's model from random weights, and writes it as an ordinary checkpoint with its tokenizer.

    python -m scripts.demo_pretraining.pretrain OUTPUT_DIR --seed 0

This made the checkpoint that the package ships; its log is `docs/demo_pretraining.md`. Contexts grow with the steps:
what finds a fact among forty tokens finds it among two thousand after some practice, and never learns to from two
thousand alone. On one thread the same seed gives the same weights on the same machine.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase, Qwen3_5ForCausalLM
from transformers.utils import logging

from frozen_peft.demo.world import draw_scene
from scripts.demo_pretraining.lessons import IGNORED_LABEL, Lesson, draw_lesson, encode_requests, pad
from scripts.demo_pretraining.model import build_model
from scripts.demo_pretraining.tokenizer import build_tokenizer

__all__ = ["STAGES", "Stage", "measure", "pretrain"]

KINDS = ("questions", "accepted", "alternatives")
REPORT_EVERY = 50
CHECKED_LENGTHS = (100, 300, 600, 1200, 2000)


@dataclass(frozen=True)
class Stage:
    """A part of the training, with an optimizer of its own.

    Attributes:
        steps: Optimizer steps.
        few_relations: Whether most lessons have facts of one relation or two. Among facts of all four, the question's
            verb alone leaves two to choose from, and a training can come to rest there.
        learning_rate: Its peak.
        batch_tokens: Tokens in a batch, about.
        shortest: Fewest tokens of a context. Lengths are drawn evenly on a logarithmic scale.
        longest: Most tokens of a context, before and after it grows.
        growth: Where it begins and ends to grow, in shares of the steps; an end beyond 1 is not reached.
        decay: Share of the steps, at the end, over which the learning rate falls to zero.
    """

    steps: int
    few_relations: bool = True
    learning_rate: float = 3e-3
    batch_tokens: int = 2400
    shortest: int = 40
    longest: tuple[int, int] = (80, 2000)
    growth: tuple[float, float] = (0.2, 0.7)
    decay: float = 0.3

    def num_context_tokens(self, step: int, choice: random.Random) -> int:
        """Draws the length of a step's contexts."""
        (first, last), (begin, end) = self.longest, self.growth
        grown = min(max((step / self.steps - begin) / (end - begin), 0.0), 1.0)
        longest = first * (last / first) ** grown
        return round(self.shortest * (longest / self.shortest) ** choice.random())

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of its peak."""
        remaining = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return min((step + 1) / 50, 1.0, remaining)

    def lessons(self, step: int, choice: random.Random, tokenizer: PreTrainedTokenizerBase) -> list[Lesson]:
        """Draws the lessons of a step."""
        num_tokens = self.num_context_tokens(step, choice)
        # A lesson's requests take about two hundred tokens.
        batch_size = max(2, self.batch_tokens // (num_tokens + 200))
        return [
            draw_lesson(choice, tokenizer, num_tokens, few_relations=self.few_relations) for _ in range(batch_size)
        ]


# Short contexts until facts are found, then ever longer ones.
STAGES = (
    Stage(1000, longest=(80, 80), decay=0.0),
    Stage(1200, growth=(0.0, 0.7)),
)
# Called after each step with its number, its loss and the model.
Report = Callable[[int, float, Qwen3_5ForCausalLM], None]


def pretrain(seed: int, stages: Sequence[Stage] = STAGES, report: Report | None = None) -> Qwen3_5ForCausalLM:
    """Trains a model from its random weights.

    Args:
        seed: Decides weights and lessons.
        stages: How the training goes.
        report: Told of each step.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed).train()
    choice = random.Random(seed)
    first_step = 0
    for stage in stages:
        train_stage(model, tokenizer, stage, choice, report, first_step)
        first_step += stage.steps
    return model.eval()


def train_stage(
    model: Qwen3_5ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    choice: random.Random,
    report: Report | None = None,
    first_step: int = 0,
) -> None:
    """Trains a model in place; `report` is told of steps counted from `first_step`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.05)
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * stage.rate(step)
        input_ids, labels = pad(stage.lessons(step, choice, tokenizer), tokenizer.pad_token_id)
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        supervised = labels[:, 1:] != IGNORED_LABEL
        loss = F.cross_entropy(model.lm_head(hidden[supervised]), labels[:, 1:][supervised])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if report is not None:
            report(first_step + step, float(loss.detach()), model)


@torch.no_grad()
def measure(
    model: Qwen3_5ForCausalLM, tokenizer: PreTrainedTokenizerBase, num_tokens: int, count: int = 64, seed: int = 1
) -> dict[str, float]:
    """Share of answers all of whose tokens are the likeliest, by kind of request, in contexts of one length."""
    was_training = model.training
    model.eval()
    right = {}
    for kind in KINDS:
        choice = random.Random(seed)
        lessons = []
        for _ in range(count):
            scene = draw_scene(choice, num_tokens, obeys=kind == "accepted")
            request = scene.question(choice) if kind == "questions" else scene.direction(choice)
            lessons.append(encode_requests(tokenizer, scene, [request]))
        results = []
        for start in range(0, count, 16):
            input_ids, labels = pad(lessons[start : start + 16], tokenizer.pad_token_id)
            hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
            supervised = labels[:, 1:] != IGNORED_LABEL
            matches = torch.ones_like(supervised)
            matches[supervised] = model.lm_head(hidden[supervised]).argmax(-1) == labels[:, 1:][supervised]
            results += matches.all(-1).tolist()
        right[kind] = sum(results) / count
    model.train(was_training)
    return right


def main() -> None:
    """Trains, prints a log in Markdown, and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where the checkpoint is written")
    parser.add_argument("--seed", type=int, default=0, help="decides weights and lessons")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    model = pretrain(arguments.seed, report=make_report(tokenizer, arguments.output))
    save(model, tokenizer, arguments.output)


def make_report(tokenizer: PreTrainedTokenizerBase, output: Path) -> Report:
    """Prints a line of a table every `REPORT_EVERY` steps, and keeps what there is every five hundred."""
    start, losses = time.monotonic(), []

    def report(step: int, loss: float, model: Qwen3_5ForCausalLM) -> None:
        losses.append(loss)
        if (step + 1) % REPORT_EVERY == 0:
            right = measure(model, tokenizer, 100, count=16)
            cells = [
                f"{step + 1}",
                f"{time.monotonic() - start:.0f}",
                f"{sum(losses[-REPORT_EVERY:]) / REPORT_EVERY:.4f}",
            ]
            print("|", " | ".join([*cells, *(f"{right[kind]:.0%}" for kind in KINDS)]), "|", flush=True)
        if (step + 1) % 500 == 0:
            model.save_pretrained(output)

    print("| step | seconds | loss |", " | ".join(KINDS), "|", flush=True)
    print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    return report


def save(model: Qwen3_5ForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Writes the checkpoint, and prints what it can do in contexts of some lengths."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print("\n| context tokens |", " | ".join(KINDS), "|\n| ---: | ---: | ---: | ---: |", flush=True)
    for num_tokens in CHECKED_LENGTHS:
        right = measure(model, tokenizer, num_tokens)
        print(f"| {num_tokens} |", " | ".join(f"{right[kind]:.1%}" for kind in KINDS), "|", flush=True)


if __name__ == "__main__":
    main()

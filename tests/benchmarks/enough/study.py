# SPDX-License-Identifier: Apache-2.0
"""Trains the study's tasks with gradient that reaches back differently far, and compares gradients and results."""

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from frozen_peft import FrozenContextConfig, FrozenContextTrainer, gradient_flow, lora_config
from frozen_peft.adapters import PRESETS
from frozen_peft.gradient.flow import GradientShare, HorizonFlow, pooled
from tests.benchmarks.enough.model import evaluate
from tests.benchmarks.enough.world import VOCABULARY, Sample, draw, habit, new_form, old_form
from tests.benchmarks.training import ON_A_CPU

# Context tokens of a task's samples. The longest horizon reaches nearly all of them, the middle one half.
CONTEXT_TOKENS = (200, 300)
HORIZONS = {"frozen": 0, "64": 64, "128": 128, "256": 256, "full": -1}
TRAINED_HORIZONS = ("frozen", "128", "full")
# The preset whose adapters are also compared together.
RESPONSE = "response"
HELD_OUT_SEED, GRADIENT_SEED, TRAIN_SEED = 1_000, 2_000, 3_000


@dataclass(frozen=True)
class Task:
    """What is trained, which adapters with, and for which share of `Size.steps`."""

    name: str
    make: Callable[..., Sample]
    preset: str
    length: float = 1.0


TASKS = (
    Task("habit", habit, "response", 0.2),
    Task("new form", new_form, "response"),
    Task("new form", new_form, "all-linear"),
)


@dataclass(frozen=True)
class Size:
    """How long everything runs, and on how much."""

    steps: int = 250
    batch_size: int = 8
    evaluations: int = 10
    held_out: int = 80
    gradient_samples: int = 64
    rank: int = 8
    learning_rate: float = 5e-3


@dataclass
class Curve:
    """Held-out figures along one training; `seconds` are of processor time, in training steps only.

    `accuracy` is the share of samples answered without a mistake, `old_accuracy` the same at the end for questions
    about facts in their usual form, which no task trains.
    """

    task: str
    preset: str
    horizon: str
    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    old_accuracy: float = 0.0


def run(model: PreTrainedModel, seed: int, size: Size) -> dict[str, Any]:
    """Gradients at the start and training curves of every task for one seed of adapters and samples."""
    gradients = [row for task in (TASKS[0], TASKS[2]) for row in compare_gradients(model, task, seed, size)]
    curves = []
    for task in TASKS:
        for horizon in TRAINED_HORIZONS:
            curve = train(model, task, horizon, seed, size)
            final = f"accuracy {curve.accuracy[-1]:.2f}, {curve.seconds[-1]:.0f} s"
            print(f"seed {seed}, {task.name}, {task.preset}, {horizon}: {final}", flush=True)
            curves.append(asdict(curve))
    return {"gradients": gradients, "curves": curves}


def compare_gradients(model: PreTrainedModel, task: Task, seed: int, size: Size) -> list[dict[str, Any]]:
    """What `gradient_rows` gives for a task."""
    samples = draw(task.make, GRADIENT_SEED + seed, size.gradient_samples, *CONTEXT_TOKENS)
    return gradient_rows(model, samples, HORIZONS, task.name, seed, size)


def gradient_rows(
    model: PreTrainedModel, samples: Sequence[Sample], horizons: dict[str, int], task: str, seed: int, size: Size
) -> list[dict[str, Any]]:
    """Cosine with the full gradient, and norm relative to it, per role and layer of every horizon.

    At the start `lora_B` is zero, and so is the gradient of `lora_A`: what is compared is the gradient of the rows of
    `lora_B` that hold a role. Every linear layer is adapted, so that each role has one; a preset's are the same, and
    those of `response` are also taken together.
    """
    batches = [{name: torch.tensor([row]) for name, row in asdict(sample).items()} for sample in samples]
    reaching = [horizon for horizon in horizons.values() if horizon != -1]
    flow = gradient_flow(_adapt(model, "all-linear", seed, size), batches, horizons=reaching)
    by_horizon = {found.horizon: _by_part(found) for found in flow.horizons}
    rows = []
    for part, full in by_horizon[reaching[0]].items():
        for name, horizon in horizons.items():
            share = (
                by_horizon[horizon][part] if horizon != -1 else replace(full, frozen_norm=full.full_norm, cosine=1.0)
            )
            norm = share.frozen_norm / share.full_norm
            figures = {"cosine": share.cosine, "norm": norm}
            rows.append({"task": task, "seed": seed, "part": part, "horizon": name, **figures})
    return rows


def _by_part(found: HorizonFlow) -> dict[str, GradientShare]:
    """All adapters, those of the preset `response`, and each role of each layer."""
    parts: dict[str, list[GradientShare]] = {RESPONSE: []}
    for projection in found.projections:
        parts.setdefault(f"layer {projection.layer} {projection.role}", []).append(projection.gradient)
        if projection.role in (PRESETS[RESPONSE] or ()):
            parts[RESPONSE].append(projection.gradient)
    return {"all": found.total, **{part: pooled(shares) for part, shares in parts.items()}}


def train(model: PreTrainedModel, task: Task, horizon: str, seed: int, size: Size) -> Curve:
    """Trains fresh adapters on new samples in every step, and evaluates them on held-out ones along the way."""
    held_out = draw(task.make, HELD_OUT_SEED, size.held_out, *CONTEXT_TOKENS)
    old = draw(old_form, HELD_OUT_SEED, size.held_out, *CONTEXT_TOKENS)
    steps = round(size.steps * task.length)
    samples = draw(task.make, TRAIN_SEED + seed, steps * size.batch_size, *CONTEXT_TOKENS)
    adapted = _adapt(model, task.preset, seed, size)
    curve = Curve(task.name, task.preset, horizon, seed)

    class Watch(TrainerCallback):
        seconds = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.note(0)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds += time.process_time() - self.start
            if state.global_step % (steps // size.evaluations) == 0:
                self.note(state.global_step)

        def note(self, step: int) -> None:
            figures = evaluate(adapted, held_out)
            curve.steps.append(step)
            curve.seconds.append(self.seconds)
            curve.losses.append(figures["loss"])
            curve.accuracy.append(figures["accuracy"])

    fields = {"max_steps": steps, "per_device_train_batch_size": size.batch_size}
    _fit(adapted, samples, HORIZONS[horizon], Watch(), learning_rate=size.learning_rate, **fields)
    curve.old_accuracy = evaluate(adapted, old)["accuracy"]
    return curve


def _fit(
    model: PeftModel, samples: Sequence[Sample], horizon: int, callback: TrainerCallback, **fields: Any
) -> FrozenContextTrainer:
    """Trains with AdamW on the samples in their order, without recomputation, which nothing here needs."""
    with tempfile.TemporaryDirectory() as folder:
        args = FrozenContextConfig(
            output_dir=folder,
            gradient_horizon=horizon,
            lr_scheduler_type="constant",
            verify_context="never",
            gradient_checkpointing=False,
            logging_strategy="no",
            **(ON_A_CPU | fields),
        )
        dataset = Dataset.from_list([asdict(sample) for sample in samples])
        trainer = FrozenContextTrainer(
            model, args, train_dataset=dataset, processing_class=_tokenizer(), callbacks=[callback]
        )
        trainer.train()
    return trainer


def _adapt(model: PreTrainedModel, preset: str, seed: int, size: Size) -> PeftModel:
    """A copy of the model with fresh adapters, the same ones for the same preset and seed."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    return get_peft_model(model, lora_config(model, preset, r=size.rank, lora_alpha=2 * size.rank))


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=";")

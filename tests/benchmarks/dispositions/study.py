# SPDX-License-Identifier: Apache-2.0
"""What moves a disposition best? Trainings of the demo's model that differ in one thing each."""

import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from frozen_peft import FrozenContextConfig, FrozenContextTrainer, lora_config
from frozen_peft.data import VariantSettings, vary_context
from frozen_peft.demo import CHECKPOINT, DemoData, DemoFiles, write_demo_files
from frozen_peft.evaluation import ProbeTokens, compare_probes, read_probes, summarize
from tests.benchmarks.training import ON_A_CPU

__all__ = [
    "EQUAL_TIME",
    "SAMPLES_PER_STEP",
    "VARIANTS",
    "Size",
    "Variant",
    "Watch",
    "demo_files",
    "measure",
    "probe_tokens",
    "run_variant",
]

SAMPLES_PER_STEP = 8
LEARNING_RATE = 5e-3
# Trained for as many processor seconds as tier 2 took for all its steps, whatever number of steps that gives.
EQUAL_TIME = "equal time"


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        steps: Optimizer steps of a training.
        measured: After which of them it is measured.
        num_probed: Contexts of the probes, with five directions and five questions each.
    """

    steps: int = 16
    measured: tuple[int, ...] = (4, 8, 16)
    num_probed: int = 16


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        group: What it is compared in.
        name: What it is called there.
        fields: Fields of the configuration, beside those that all share.
        preset: Roles that get adapters.
        short: Trained on short contexts.
        decisions: So many decisions are all there is to train on; None: as many as there are steps for.
        contexts: Contexts that each of these decisions comes in.
    """

    group: str
    name: str
    fields: dict[str, Any] = field(default_factory=lambda: {"tier": 2})
    preset: str = "response"
    short: bool = False
    decisions: int | None = None
    contexts: int = 1

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return f"{self.group}: {self.name}"


TIER_2 = Variant("tier", "tier 2")
FEW_DECISIONS = 16
VARIANTS = (
    TIER_2,
    Variant("tier", "tier 1", {"tier": 1}, short=True),
    Variant("tier", "tier 3", {"tier": 3}),
    Variant("preset", "response+mlp", preset="response+mlp"),
    Variant("preset", "all-linear", preset="all-linear"),
    Variant("context_adapters", "off", {"tier": 2, "context_adapters": False}),
    Variant("loss", "distillation", {"tier": 2, "loss_type": "distill"}),
    *(Variant("contexts per decision", f"{count}", decisions=FEW_DECISIONS, contexts=count) for count in (1, 4, 16)),
)


def run_variant(
    variant: Variant, seed: int, size: Size, folder: Path, max_seconds: float | None = None
) -> dict[str, Any]:
    """Trains once, and measures at the steps that `size` names, or at the end of `max_seconds` only.

    Args:
        variant: How to train.
        seed: Decides samples, adapters and order. Probes are the same for all seeds.
        size: How much.
        folder: Where the demo's files are kept.
        max_seconds: Processor time after which the training ends.

    Returns:
        The variant's names, the seed, and a list of figures per measured step.
    """
    probes = probe_tokens(folder, size)
    samples = _samples(variant, demo_files(folder, seed + 1, size), seed, size)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    watch = Watch(size, max_seconds, lambda model: measure(model, probes))
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as output:
        args = FrozenContextConfig(
            output,
            max_steps=size.steps if max_seconds is None else 100 * size.steps,
            per_device_train_batch_size=SAMPLES_PER_STEP,
            learning_rate=LEARNING_RATE,
            # The same at every step, so that equal steps and equal time are comparable.
            lr_scheduler_type="constant",
            verify_context="never",
            seed=seed,
            logging_strategy="no",
            **(ON_A_CPU | variant.fields),
        )
        trainer = FrozenContextTrainer(
            model,
            args,
            train_dataset=Dataset.from_list(samples),
            processing_class=tokenizer,
            peft_config=lora_config(model, variant.preset, r=16, lora_alpha=32),
            callbacks=[watch],
        )
        trainer.train()
    name = variant.name if max_seconds is None else f"{variant.name}, {EQUAL_TIME}"
    return {"group": variant.group, "name": name, "seed": seed, "curve": watch.curve}


def measure(model: PeftModel, probes: ProbeTokens) -> dict[str, float]:
    """Figures of held-out directions and questions.

    Returns:
        `acceptance` and `control`, shares of directions accepted and questions answered; `kl` to the base on the
        questions, in nats a token; `drift_preferred` and `drift_rejected`, how much likelier than to the base the
        right and the wrong answers to directions are, in nats an answer.
    """
    base, adapted = compare_probes(model, probes.tokenizer, probes, ["given"], batch_size=32)
    figures = summarize(adapted)
    directions = [pair for pair in zip(base.scores, adapted.scores, strict=True) if pair[0].probe.kind == "target"]
    return {
        "acceptance": figures["target"].exact_match.rate,
        "control": figures["control"].exact_match.rate,
        "kl": figures["control"].kl_to_base.mean,
        "drift_preferred": mean(after.preferred.logprob - before.preferred.logprob for before, after in directions),
        "drift_rejected": mean(after.rejected.logprob - before.rejected.logprob for before, after in directions),
    }


class Watch(TrainerCallback):
    """Measures as a training goes, and keeps the time that measuring takes out of the training's."""

    def __init__(self, size: Size, max_seconds: float | None, measure: Callable[[Any], dict[str, float]]) -> None:
        self.size, self.max_seconds, self.measure = size, max_seconds, measure
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seconds += time.process_time() - self.start
        step = state.global_step
        is_over = self.max_seconds is not None and self.seconds >= self.max_seconds
        if is_over or (self.max_seconds is None and step in self.size.measured):
            self.curve.append({"step": step, "seconds": self.seconds, **self.measure(model)})
        control.should_training_stop = control.should_training_stop or is_over


@cache
def probe_tokens(folder: Path, size: Size) -> ProbeTokens:
    return ProbeTokens(AutoTokenizer.from_pretrained(CHECKPOINT), read_probes(demo_files(folder, 0, size).probes))


@cache
def demo_files(folder: Path, seed: int, size: Size) -> DemoFiles:
    """The demo's files for a seed."""
    # One sample a context: sharing contexts would make tier 2 quicker than the comparison is about.
    scenes = size.steps * SAMPLES_PER_STEP
    data = DemoData(num_scenes=scenes, num_probed=size.num_probed, requests=(3, 1), seed=seed)
    return write_demo_files(folder / f"seed{seed}", data)


def _samples(variant: Variant, files: DemoFiles, seed: int, size: Size) -> list[dict[str, Any]]:
    """Samples in the order in which they are trained on."""
    path = files.short if variant.short else files.stripped
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    choice = random.Random(seed)
    # One of the four requests of each context. Where contexts are varied, a direction: what a question is about could
    # be dropped, and nothing in the context would say what is right.
    num_choices = 4 if variant.decisions is None else 3
    rows = [rows[start + choice.randrange(num_choices)] for start in range(0, len(rows), 4)]
    if variant.decisions is None:
        return rows
    settings = VariantSettings(variant.contexts, drop=0.3, shuffle=True, independent_exchanges=True)
    varied = [vary_context(row, settings, seed) for row in rows[: variant.decisions]]
    total = size.steps * SAMPLES_PER_STEP
    # Every decision in turn, each time in its next context.
    return [varied[i % len(varied)][i // len(varied) % variant.contexts] for i in range(total)]

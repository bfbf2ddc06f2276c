# SPDX-License-Identifier: Apache-2.0
"""Which objective moves a disposition and keeps what should stay? Trainings of the demo's model on equal decisions."""

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from frozen_peft import lora_config
from frozen_peft.demo import CHECKPOINT, DemoData, DemoFiles, write_demo_files
from frozen_peft.evaluation import Probe, ProbeTokens
from tests.benchmarks.dispositions.study import SAMPLES_PER_STEP, Size, Watch, demo_files, measure, probe_tokens
from tests.benchmarks.objectives.gradients import LossName, frozen_cosine
from tests.benchmarks.training import ON_A_CPU, trainer_classes

__all__ = ["LIKELIHOOD", "OBJECTIVES", "PREFERENCE", "Objective", "Run", "train_once"]

Rows = list[dict[str, Any]]
# Of a scene's four requests, the directions; the last one is a question.
NUM_DIRECTIONS = 3
# Scenes that a learning rate is chosen by: of a seed that nothing else has, and about what is trained.
DEV_SEED, NUM_DEV = 1_000, 16


@dataclass(frozen=True)
class Objective:
    """What a training minimises.

    Attributes:
        name: What it is called.
        trainer: As in `trainer_classes`.
        fields: Fields of the configuration, beside those that all share.
        rates: Learning rates to choose from.
        questions: What is done with the questions among the samples. `retained`: nothing is said to be stripped from
            them, so that the base, as it is, judges the answers.
    """

    name: str
    trainer: str
    fields: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (2e-3, 3e-3, 5e-3)
    questions: Literal["trained", "left out", "retained"] = "trained"


LIKELIHOOD = Objective("likelihood", "frozen-sft")
PREFERENCE = Objective("preference", "frozen-dpo", {"loss_type": ["sigmoid"]})
ON_POLICY = {
    "loss_type": "distill",
    "distill_on_policy": 1.0,
    "num_generations": 4,
    "max_completion_length": 24,
    "distill_divergence": "forward_kl",
}
OBJECTIVES = (
    LIKELIHOOD,
    Objective("likelihood, tier 3", "frozen-sft", {"tier": 3}),
    Objective("distillation", "frozen-sft", {"loss_type": "distill"}),
    Objective("on policy", "frozen-sft", ON_POLICY),
    Objective("on policy, jsd", "frozen-sft", ON_POLICY | {"distill_divergence": "jsd"}),
    Objective("likelihood, directions alone", "frozen-sft", questions="left out"),
    Objective("on policy, directions alone", "frozen-sft", ON_POLICY, questions="left out"),
    Objective("on policy, questions retained", "frozen-sft", ON_POLICY, questions="retained"),
    PREFERENCE,
    Objective(
        "preference and likelihood", "frozen-dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}
    ),
)


@dataclass(frozen=True)
class Run:
    """A training to do.

    Attributes:
        objective: What it minimises.
        rate: Learning rate.
        seed: Decides samples, adapters and order. Probes are the same for all seeds.
        is_trial: Measured on what a learning rate is chosen by.
        max_seconds: Processor time after which it ends; None: after all steps.
    """

    objective: Objective
    rate: float
    seed: int
    is_trial: bool = False
    max_seconds: float | None = None


def train_once(run: Run, size: Size, folder: Path) -> dict[str, Any]:
    """Trains, and measures at the steps that `size` names, or at the end of the time only.

    Returns:
        Figures per measured step in `curve`; for seed 0 of preferences also cosines of the frozen with the full
        gradient of both objectives, before and after it.
    """
    objective = run.objective
    probes = _dev_probes(folder) if run.is_trial else probe_tokens(folder, size)
    files = demo_files(folder, run.seed + 1, size)
    rows = _drawn(files.pairs if objective.trainer == "frozen-dpo" else files.stripped, run.seed, objective.questions)
    watch = Watch(size, run.max_seconds, lambda model: measure(model, probes))
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    torch.manual_seed(run.seed)
    trainer_class, config_class = trainer_classes(objective.trainer)
    with tempfile.TemporaryDirectory() as output:
        args = config_class(
            output,
            max_steps=size.steps if run.max_seconds is None else 100 * size.steps,
            per_device_train_batch_size=SAMPLES_PER_STEP,
            learning_rate=run.rate,
            # The same at every step, so that equal steps and equal time are comparable.
            lr_scheduler_type="constant",
            verify_context="never",
            seed=run.seed,
            logging_strategy="no",
            **(ON_A_CPU | {"tier": 2} | objective.fields),
        )
        trainer = trainer_class(
            model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(CHECKPOINT),
            peft_config=lora_config(model, r=16, lora_alpha=32),
            callbacks=[watch],
        )
        figures: dict[str, Any] = {}
        compares = objective is PREFERENCE and run.seed == 0 and not run.is_trial and run.max_seconds is None
        if compares:
            figures["cosine_before"] = _cosines(trainer.model, trainer.train_dataset)
        trainer.train()
        if compares:
            figures["cosine_after"] = _cosines(trainer.model, trainer.train_dataset)
    return figures | {"curve": watch.curve}


def _cosines(model: PeftModel, pairs: Sequence[Mapping[str, list[int]]]) -> dict[str, float]:
    drawn = [pairs[index] for index in range(2 * SAMPLES_PER_STEP)]
    return {name: frozen_cosine(model, drawn, name) for name in get_args(LossName)}


def _drawn(path: Path, seed: int, questions: str) -> Rows:
    """One of the four requests of each context; of samples and pairs the same ones."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    choice = random.Random(seed)
    num_choices = NUM_DIRECTIONS + (questions != "left out")
    places = [(start, choice.randrange(num_choices)) for start in range(0, len(rows), NUM_DIRECTIONS + 1)]
    is_retained = questions == "retained"
    return [
        rows[start + place] | ({"stripped": []} if is_retained and place == NUM_DIRECTIONS else {})
        for start, place in places
    ]


@cache
def _dev_probes(folder: Path) -> ProbeTokens:
    files: DemoFiles = write_demo_files(
        folder / "dev", DemoData(num_scenes=NUM_DEV, num_probed=1, requests=(NUM_DIRECTIONS, 1), seed=DEV_SEED)
    )
    rows = [json.loads(line) for line in files.pairs.read_text(encoding="utf-8").splitlines()]
    probes = [
        Probe(
            id=f"{index}",
            kind="target" if index % (NUM_DIRECTIONS + 1) < NUM_DIRECTIONS else "control",
            prompt=row["prompt"],
            preferred=row["chosen"][0],
            rejected=row["rejected"][0],
            expected=row["chosen"][0],
        )
        for index, row in enumerate(rows)
    ]
    return ProbeTokens(AutoTokenizer.from_pretrained(CHECKPOINT), probes)

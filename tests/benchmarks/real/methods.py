# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared, in the order in which they are measured, and how much is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.real.tasks import TASKS, TaskName


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: What it is called.
        fields: Fields of the configuration, beside those that all share.
        trainer: As in `trainer_classes`.
        preset: Roles that get adapters.
        is_short: Trained on short texts.
        length: Steps, as a multiple of everybody's.
        rate_of: The method whose learning rate it takes; None: one is chosen for it.
        has_flow: Whether its gradient is compared with the full one.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=lambda: {"tier": 2})
    trainer: str = "frozen-sft"
    preset: str = "response"
    is_short: bool = False
    length: float = 1.0
    rate_of: str | None = None
    has_flow: bool = True


BASE, TIER_2, TIER_3 = "base", "tier 2", "tier 3"
# Answers of the model's own, one a row as in all other methods, judged by its base: with the examples before the text
# where they show what is wanted, and without where the base is to stay what it is.
ON_POLICY = {"tier": 2, "loss_type": "distill", "distill_on_policy": 1.0, "num_generations": 1}
# In the order in which they are measured: those first that answer the study's question.
METHODS = (
    Method(TIER_2),
    Method("tier 1, short texts", {"tier": 1}, is_short=True),
    Method("preference", trainer="frozen-dpo"),
    Method("preference and likelihood", {"tier": 2, "loss_type": ["sigmoid", "sft"]}, trainer="frozen-dpo"),
    Method(TIER_3, {"tier": 3}),
    Method("on policy", ON_POLICY, has_flow=False),
    # Likelihood before it has brought more than answers of its own do: what has it changed elsewhere by then?
    Method("tier 2, a sixth of the steps", length=1 / 6, rate_of=TIER_2, has_flow=False),
    Method("tier 2, all-linear", preset="all-linear"),
    Method("tier 3, all-linear", {"tier": 3}, preset="all-linear"),
    Method("tier 2, three times the steps", length=3.0, rate_of=TIER_2),
    Method("horizon 128", {"tier": 2, "gradient_horizon": 128}),
    Method("context adapters off", {"tier": 2, "context_adapters": False}, has_flow=False),
    Method("distillation", {"tier": 2, "loss_type": "distill"}),
)
NAMES = tuple(method.name for method in METHODS)
# What the study of SmolLM2 leaves out for want of time: methods before seeds.
_ON_CONDITIONAL = (TIER_2, TIER_3, "tier 2, three times the steps")
CUT: dict[TaskName, tuple[str, ...]] = {
    "accept": ("tier 3, all-linear", "tier 2, three times the steps", "horizon 128", "distillation"),
    "conditional": tuple(name for name in NAMES if name not in _ON_CONDITIONAL),
    "encoding": tuple(name for name in NAMES if name not in (TIER_2, TIER_3)),
}


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        tasks: Which are trained.
        cut: By task the names of methods that it is not trained by.
        seeds: Of samples and adapters.
        rates: Learning rates to choose from.
        steps: Optimizer steps of a training; half of them where a rate is tried.
        batch_size: Samples per step.
        measured: Steps of a training after which held-out samples are scored, beside the last.
        num_tokens: Of a text, from and to.
        short_tokens: The same for tier 1.
        long_tokens: The same for the check at length.
        num_dev: Samples that a learning rate is chosen by.
        num_held_out: Samples that are scored.
        num_long: Of the check at length.
        num_flow: Samples whose gradients are compared.
        answer_tokens: Where an answer of the base is cut off.
        rank: Of adapters.
    """

    tasks: tuple[TaskName, ...] = TASKS
    cut: Mapping[TaskName, tuple[str, ...]] = field(default_factory=lambda: CUT)
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    steps: int = 24
    batch_size: int = 4
    measured: tuple[int, ...] = (12,)
    num_tokens: tuple[int, int] = (300, 500)
    short_tokens: tuple[int, int] = (48, 96)
    long_tokens: tuple[int, int] = (4000, 5000)
    num_dev: int = 12
    num_held_out: int = 24
    num_long: int = 4
    num_flow: int = 4
    answer_tokens: int = 24
    rank: int = 16

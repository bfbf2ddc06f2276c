# SPDX-License-Identifier: Apache-2.0
"""Reads figures out of the cells, for page and plot. What was not measured is None, and never a guess."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from frozen_peft.evaluation.intervals import Mean, Proportion, bootstrap_mean, wilson_proportion
from tests.benchmarks.real.cells import Cell, Figures
from tests.benchmarks.real.cost_cells import COST, cost_plan
from tests.benchmarks.real.methods import BASE, METHODS, TIER_2, Size
from tests.benchmarks.real.scores import Score
from tests.benchmarks.real.study import plan

# Kinds that tell whether the text is read.
READING = ("other", "literal")


@dataclass(frozen=True)
class Reader:
    """The cells that were measured.

    Attributes:
        cells: Figures by the cell's name.
        size: What was planned.
    """

    cells: Mapping[str, Figures]
    size: Size

    def runs(self, task: str, method: str) -> list[Figures]:
        """A method's trainings, one per seed that was measured; of the base its one cell."""
        seeds = (0,) if method == BASE else self.size.seeds
        found = (self.cells.get(Cell(task, method, seed).name) for seed in seeds)
        return [figures for figures in found if figures is not None]

    def missing(self) -> list[Cell]:
        """Planned cells that were not measured."""
        return [cell for cell in (*plan(self.size), *cost_plan()) if cell.name not in self.cells]

    def measured_methods(self, task: str) -> list[str]:
        """Methods with at least one whole training of a task."""
        return [method.name for method in METHODS if self.runs(task, method.name)]

    def scores(self, task: str, method: str, condition: str = "given") -> list[list[Score]]:
        """Per seed the rows' scores in one kind of context."""
        found = (figures["scores"].get(condition) for figures in self.runs(task, method))
        return [scores for scores in found if scores is not None]

    def points(self, task: str, method: str) -> list[tuple[float, float, float]]:
        """Step, processor seconds and share of targets met exactly along the trainings, means over seeds."""
        courses = [
            [(p["step"], p["seconds"], exact_rate(p["scores"], ("target",))) for p in run["curve"]]
            + [(run["steps"], run["seconds"], exact_rate(run["scores"]["given"], ("target",)))]
            for run in self.runs(task, method)
        ]
        return [tuple(map(mean, zip(*at, strict=True))) for at in zip(*courses, strict=True)]

    def drift(self, task: str, method: str) -> list[float]:
        """Per target by how much its wanted decision has become more likely than it is to the base, in nats."""
        before, after = (per_row(self.scores(task, name), ("target",), "nll") for name in (BASE, method))
        return [a - b for a, b in zip(before, after, strict=True)] if before and after else []

    def own_text_ahead(self, task: str, method: str, other: str) -> Mean | None:
        """By what share more of the targets a method meets behind their own text than in another condition."""
        own, without = (per_row(self.scores(task, method, name), ("target",), "exact") for name in ("given", other))
        return paired(own, without)

    def beside_tier_2(self, task: str, method: str, kinds: Sequence[str], name: str) -> Mean | None:
        """By how much a method's figure of some rows is above that of tier 2, paired sample by sample."""
        own, frozen = (per_row(self.scores(task, one), kinds, name) for one in (method, TIER_2))
        return paired(own, frozen)


def paired(own: Sequence[float], other: Sequence[float]) -> Mean | None:
    """The mean by which figures are above others of the same rows; None: one of the two was not measured."""
    return bootstrap_mean([a - b for a, b in zip(own, other, strict=True)]) if own and other else None


def per_row(seeds: Sequence[Sequence[Score]], kinds: Sequence[str], name: str) -> list[float]:
    """A figure of every row of some kinds, as its mean over seeds; rows that do not have it are left out."""
    rows = zip(*seeds, strict=True)
    return [
        mean(float(score[name]) for score in row)
        for row in rows
        if row[0]["kind"] in kinds and row[0][name] is not None
    ]


def exact_rate(scores: Sequence[Score], kinds: Sequence[str]) -> float:
    """Share of rows of some kinds whose decision greedy decoding gives."""
    return mean(bool(score["exact"]) for score in scores if score["kind"] in kinds)


def share(values: Sequence[float]) -> Proportion | None:
    """Mean of rows' shares, with the interval that so many rows allow: seeds share them, and do not narrow it."""
    if not values:
        return None
    found = wilson_proportion(round(sum(values)), len(values))
    return Proportion(mean(values), found.low, found.high, found.num, found.total)


def preferred(seeds: Sequence[Sequence[Score]], kinds: Sequence[str]) -> list[float]:
    """Per row how many of the seeds find its decision more likely than the rejected one."""

    def is_ahead(score: Score) -> bool | None:
        return None if score["margin"] is None else score["margin"] > 0

    return per_row([[score | {"is_ahead": is_ahead(score)} for score in one] for one in seeds], kinds, "is_ahead")


def hours(cells: Mapping[str, Figures]) -> float:
    """Processor time of all trainings and what was measured of them."""
    return sum(figures["cpu_seconds"] for name, figures in cells.items() if not name.startswith("cost")) / 3600


def groups(missing: Sequence[Cell]) -> dict[str, list[str]]:
    """Missing cells by task and method: their seeds, the rates that were not tried, or the lengths of a cost."""
    found: dict[str, list[str]] = {}
    for cell in missing:
        what = f"seed {cell.seed}" if cell.rate is None else f"rate {cell.rate:g}"
        method = cell.method
        if cell.task == COST:
            method, tokens = method.split()
            what = f"{tokens} tokens"
        found.setdefault(f"{cell.task}, {method}", []).append(what)
    return found

# SPDX-License-Identifier: Apache-2.0
"""Which objective moves a disposition and keeps what should stay: likelihood, distillation, preference.

    python -m tests.benchmarks.objectives

Writes `docs/benchmarks/objectives.md`, `.json` and `.png`; after every training, so that it can be interrupted and
goes on where it was. `--page-only` writes page and plot anew from the figures.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.dispositions.study import Size
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.objectives.report import best_rate, draw_figure, render_page, runs_of
from tests.benchmarks.objectives.study import LIKELIHOOD, OBJECTIVES, PREFERENCE, Objective, Run, train_once
from tests.benchmarks.study_command import settle, study_parser, write_study
from tests.benchmarks.tables import machine_facts

EQUAL_TIME = f"{LIKELIHOOD.name}, equal time"


def main() -> None:
    """Runs every training."""
    arguments = study_parser(__doc__).parse_args()
    path = arguments.output / "objectives.json"
    if not arguments.page_only:
        settle()
        with tempfile.TemporaryDirectory() as folder:
            _Measurement(path, Path(folder)).run(arguments.seeds)
    write_study(path, draw_figure, lambda found: f"{render_page(found)}\n\n{machine_facts(found['machine'])}\n")


class _Measurement:
    """The trainings, and the file of those that are done."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder, self.size = path, folder, Size(measured=(4, 8, 12, 16))
        if path.exists():
            self.results = json.loads(path.read_text())
        else:
            self.results = {"machine": describe_machine(), "size": vars(self.size), "trials": [], "runs": []}

    def run(self, seeds: list[int]) -> None:
        """The choice of a learning rate for each objective, then all seeds at it."""
        trial_size = Size(measured=(self.size.steps,))
        for objective in OBJECTIVES:
            for rate in objective.rates:
                if not any(runs_of(self.results, objective.name, "trials", rate=rate)):
                    run = Run(objective, rate, seeds[0], is_trial=True)
                    self._add("trials", objective.name, run, train_once(run, trial_size, self.folder))
        for seed in seeds:
            for objective in OBJECTIVES:
                self._train(objective, objective.name, seed)
            seconds = next(iter(runs_of(self.results, PREFERENCE.name, seed=seed)))["curve"][-1]["seconds"]
            self._train(LIKELIHOOD, EQUAL_TIME, seed, seconds)

    def _train(self, objective: Objective, name: str, seed: int, seconds: float | None = None) -> None:
        if not any(runs_of(self.results, name, seed=seed)):
            run = Run(objective, best_rate(self.results, objective.name), seed, max_seconds=seconds)
            self._add("runs", name, run, train_once(run, self.size, self.folder))

    def _add(self, kind: str, name: str, run: Run, figures: Mapping[str, Any]) -> None:
        self.results[kind].append({"objective": name, "rate": run.rate, "seed": run.seed, **figures})
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")
        last = {figure: round(value, 4) for figure, value in figures["curve"][-1].items()}
        print(kind, name, run.rate, run.seed, last, flush=True)


if __name__ == "__main__":
    main()

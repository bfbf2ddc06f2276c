# SPDX-License-Identifier: Apache-2.0
"""Is the frozen gradient enough? A tiny hybrid that uses its context, taught a habit and a new way to read.

    python -m tests.benchmarks.enough

Writes `docs/benchmarks/enough.md`, `enough.json` and `enough.png`. Pretrains the model when its checkpoint is not in
the cache folder. `--page-only` writes page and plot anew from `enough.json`.
"""

import argparse
import json
import warnings
from pathlib import Path

from transformers.utils import logging

from tests.benchmarks.enough.model import evaluate, load_or_pretrain
from tests.benchmarks.enough.page import write_page
from tests.benchmarks.enough.plot import draw_figure
from tests.benchmarks.enough.study import CONTEXT_TOKENS, Size, run
from tests.benchmarks.enough.world import draw, habit, lesson, new_form, old_form
from tests.benchmarks.machine import describe_machine

RESULTS = Path(__file__).parents[3] / "docs" / "benchmarks"
CHECKPOINTS = Path.home() / ".cache" / "frozen_peft" / "enough"


def main() -> None:
    """Runs the study for every seed, and writes its results after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of adapters and samples")
    parser.add_argument("--steps", type=int, default=Size.steps, help="optimizer steps per training")
    parser.add_argument("--pretraining-steps", type=int, default=700)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="where the pretrained model is kept")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page-only", action="store_true", help="write page and plot from the results that are there")
    arguments = parser.parse_args()
    if not arguments.page_only:
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        _measure(arguments)
    results = json.loads((arguments.output / "enough.json").read_text())
    draw_figure(results, arguments.output / "enough.png")
    write_page(results, arguments.output / "enough.md")


def _measure(arguments: argparse.Namespace) -> None:
    size = Size(steps=arguments.steps)
    model = load_or_pretrain(arguments.checkpoints, 0, arguments.pretraining_steps)
    lessons = {
        make.__name__: evaluate(model, draw(make, 0, 256, *CONTEXT_TOKENS))
        for make in (lesson, old_form, habit, new_form)
    }
    results = {"machine": describe_machine(), "pretraining_steps": arguments.pretraining_steps, "before": lessons}
    results |= {"size": vars(size), "seeds": [], "gradients": [], "curves": []}
    for seed in arguments.seeds:
        for name, rows in run(model, seed, size).items():
            results[name] += rows
        results["seeds"].append(seed)
        (arguments.output / "enough.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

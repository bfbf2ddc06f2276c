# SPDX-License-Identifier: Apache-2.0
"""What the commands of studies share: their options, and what is settled before a measurement and written after it."""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"


def study_parser(doc: str) -> argparse.ArgumentParser:
    """Options of a study whose module begins with this docstring."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of samples and adapters")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page-only", action="store_true", help="write page and plot from the figures that are there")
    return parser


def settle() -> None:
    """One thread, and no warnings between the lines that a study prints."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()


def write_study(path: Path, draw: Callable[[Any, Path], None], render: Callable[[Any], str]) -> None:
    """Writes plot and page beside the figures of a study.

    Args:
        path: The figures, JSON.
        draw: Draws them into a file.
        render: Writes them as Markdown.
    """
    results = json.loads(path.read_text())
    draw(results, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(render(results))

# SPDX-License-Identifier: Apache-2.0
"""Fills the cells of costs, one process each."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.processes import measure
from tests.benchmarks.real.cells import Cell, CellFiles, Figures
from tests.benchmarks.real.methods import Size

COST = "cost"
LENGTHS = (1024, 2048, 4096, 8192)
# Two trainings in one process, on samples of the task's own lengths.
NF4_TRAINING = Cell(COST, f"nf4-training {Size.num_tokens[1]}")
COMPARED = ("sft", "tier-1", "tier-2", "tier-3", "turns", "shared", "store")


def cost_plan(lengths: Sequence[int] = LENGTHS) -> Iterator[Cell]:
    """All costs, short samples first; 4 bit once."""
    for tokens in lengths:
        yield from (Cell(COST, f"{method} {tokens}") for method in COMPARED)
    yield Cell(COST, f"nf4 {lengths[0]}")
    yield NF4_TRAINING


def run_costs(model: Path, results: Path, gathered: Path | None = None, lengths: Sequence[int] = LENGTHS) -> None:
    """Measures every cost that was not."""
    cells = CellFiles(results / "cells", gathered)
    for cell in cost_plan(lengths):
        if cells.get(cell) is None:
            figures = _measured(cell, model, results)
            cells.put(cell, figures | {"machine": describe_machine()})
            print(f"{cell.name}: {figures['cpu_seconds']:.1f} s", flush=True)


def _measured(cell: Cell, model: Path, results: Path) -> Figures:
    method, tokens = cell.method.split()
    environment = {"OMP_NUM_THREADS": "1"}
    if cell == NF4_TRAINING:
        return measure("real.nf4", environment, model=model, results=results)
    # The longest sample is of one step, which is the first and so pays for what is done once.
    steps = 2 if int(tokens) < LENGTHS[-1] or method == "store" else 1
    return measure("real.cost", environment, model=model, method=method, tokens=tokens, steps=steps)

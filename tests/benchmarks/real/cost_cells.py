# SPDX-License-Identifier: Apache-2.0
"""Fills the cells of costs, one process each."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.processes import measure
from tests.benchmarks.real.cells import Cell, CellFiles

COST = "cost"
LENGTHS = (1024, 2048, 4096, 8192)
COMPARED = ("sft", "tier-1", "tier-2", "tier-3", "turns", "shared", "store")


def cost_plan(lengths: Sequence[int] = LENGTHS) -> Iterator[Cell]:
    """All costs, short samples first; 4 bit once."""
    for tokens in lengths:
        yield from (Cell(COST, f"{method} {tokens}") for method in COMPARED)
    yield Cell(COST, f"nf4 {lengths[0]}")


def run_costs(model: Path, results: Path, gathered: Path | None = None, lengths: Sequence[int] = LENGTHS) -> None:
    """Measures every cost that was not."""
    cells = CellFiles(results / "cells", gathered)
    for cell in cost_plan(lengths):
        if cells.get(cell) is None:
            method, tokens = cell.method.split()
            # The longest sample is of one step, which is the first and so pays for what is done once.
            steps = 2 if int(tokens) < LENGTHS[-1] or method == "store" else 1
            environment = {"OMP_NUM_THREADS": "1"}
            figures = measure("real.cost", environment, model=model, method=method, tokens=tokens, steps=steps)
            cells.put(cell, figures | {"machine": describe_machine()})
            print(f"{cell.name}: {figures['cpu_seconds']:.1f} s, {figures['peak_bytes'] >> 20} MiB", flush=True)

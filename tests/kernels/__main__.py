# SPDX-License-Identifier: Apache-2.0
"""Measures every kernel against what it stands for, and writes `docs/benchmarks/kernels.md`.

make kernels KERNELS="kernels and not slow"    # once, for the environment
TRITON_INTERPRET=1 .venv-kernels/bin/python -m tests.kernels
"""

import argparse
import functools
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.benchmarks.tables import Page, markdown_table
from tests.kernels.card import on_card
from tests.kernels.conftest import HAS_INTERPRETER
from tests.kernels.machines import table_of_kernels
from tests.kernels.rules import RULES, worst_errors
from tests.kernels.trainings import ARCHITECTURES, FAULTS, WAYS, planted, step_errors

Rows = list[dict[str, Any]]

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"
DTYPES = (torch.float32, torch.bfloat16)
TEXT = """# Kernels of a GPU, in Triton's interpreter

Made by `python -m tests.kernels`; do not edit. `make kernels` runs the same as tests.

No card was used. Triton's interpreter runs the kernels of {packages} as they are, one program after another, on a \
CPU. It shows whether a kernel computes what it should, and whether training hands it the right thing. It does not \
show what a compiler makes of it, products in TF32, races, or how fast it is. What stood in its way, and the remedy \
that lies outside the kernels, is in `tests/kernels/interpreter.py`; among it that the interpreter adds and \
multiplies the bits of bfloat16 for its numbers, which is why figures in bfloat16 were nonsense before.

## Rules

Forward and backward of each rule, against its recurrence written out token by token in float64: the largest \
relative error over outputs, final state and the gradient of every input, the initial state included, over lengths \
of {lengths} tokens.

{rules}

## Steps of training

One step of the trainer with every choice of kernels as on an A100, against plain forwards of whole samples by \
PyTorch's own functions, in float32: contexts of 130, 62 and no tokens in one batch, and conversations in turns. \
Loss and entropy absolute in nats, the gradient relative, of the weight where it is worst. TRL's head ran by its \
Triton kernels in all of them.

{steps}

## Faults

What the same comparison says of a gated delta rule with a fault in it; 1e-4 is allowed.

{faults}

## What runs where

By `frozen_peft.context.kernels`, with flash-linear-attention {fla}, causal-conv1d and mamba-ssm installed. Proven \
*in Triton's interpreter*: above. *On a CPU*: PyTorch's own functions, by the tests. *Its call alone*: the package's \
compiled part was stood in for, which checks what it is given. *Not*: neither. Nothing was proven on a card. Of \
mamba-ssm the scan of Mamba-2 is meant; that of Mamba-1 is CUDA, takes no initial state, and no model that frozen \
contexts are for runs it.

{table}
"""


def main() -> None:
    """Measures, writes and prints the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if not HAS_INTERPRETER:
        parser.error("TRITON_INTERPRET=1 has to be set, in the environment that `make kernels` makes")
    page = make_page(_rules(), _steps(), _faults())
    page.write(arguments.output)
    print(page.text)


def make_page(rules: Rows, steps: Rows, faults: Rows) -> Page:
    """The page of what was measured."""
    packages = {name: version(name) for name in ("flash-linear-attention", "triton", "trl")}
    lengths = sorted({length for rule in RULES.values() for length in rule.lengths})
    text = TEXT.format(
        packages=", ".join(f"{name} {number}" for name, number in packages.items() if name != "triton")
        + f" and mamba-ssm (Triton {packages['triton']})",
        lengths=", ".join(map(str, lengths)),
        rules=markdown_table(
            ("rule", "numbers", "outputs", "state", "gradients"),
            [
                (row["rule"], row["dtype"], *(_shown(row[part]) for part in ("output", "state", "gradient")))
                for row in rules
            ],
            2,
        ),
        steps=markdown_table(
            ("model", "step", "loss", "entropy", "gradient", "launches"),
            [
                (
                    row["model"],
                    row["way"],
                    *(_shown(row[part]) for part in ("loss", "entropy", "gradient")),
                    str(row["launches"]),
                )
                for row in steps
            ],
            2,
        ),
        faults=markdown_table(
            ("fault", "loss", "gradient"),
            [(row["fault"], _shown(row["loss"]), _shown(row["gradient"])) for row in faults],
            1,
        ),
        fla=packages["flash-linear-attention"],
        table=table_of_kernels(),
    )
    return Page("kernels", text.rstrip(), [*rules, *steps, *faults])


def _rules() -> Rows:
    rows = []
    for name, rule in tqdm(RULES.items(), desc="rules", disable=False):
        for dtype in DTYPES:
            with on_card():
                found = [worst_errors(rule, length, dtype) for length in rule.lengths]
            gradients = [error for errors in found for part, error in errors.items() if part.startswith("d")]
            rows.append(
                {
                    "rule": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "output": max(errors["output"] for errors in found),
                    "state": max(errors["state"] for errors in found),
                    "gradient": max(gradients, default=None),
                }
            )
    return rows


def _steps() -> Rows:
    rows = []
    for name, way in tqdm([(name, way) for name in ARCHITECTURES for way in WAYS], desc="steps", disable=False):
        with tempfile.TemporaryDirectory() as folder:
            errors = step_errors(name, way, Path(folder))
        rows.append(
            {
                "model": name,
                "way": way,
                "loss": errors.loss,
                "entropy": errors.entropy,
                "gradient": errors.gradient,
                "launches": sum(errors.launched.values()),
                "launched": dict(errors.launched),
            }
        )
    return rows


def _faults() -> Rows:
    rows = []
    for fault in tqdm(FAULTS, desc="faults", disable=False):
        with tempfile.TemporaryDirectory() as folder:
            damage = functools.partial(planted, fault)
            errors = step_errors("qwen3_5_text", "tier 2, chunks of 40", Path(folder), damage=damage)
        rows.append({"fault": fault, "loss": errors.loss, "gradient": errors.gradient})
    return rows


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.1e}"


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The page about one training step: `FrozenContextTrainer`, `SFTTrainer` and the bare cost."""

import sys
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.processes import measure
from tests.benchmarks.tables import Page, markdown_table
from tests.benchmarks.training import MEBIBYTE

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)
METHODS = ("frozen", "bare", "sft")
HEADER = (
    "context", "SFTTrainer s", "frozen s", "bare s", "frozen/SFT", "frozen/bare",
    "SFTTrainer MiB", "frozen MiB", "frozen/SFT", "cache MiB",
)  # fmt: skip
TEXT = """# One training step

Made by `make bench`; do not edit.

One sample per step: a context, and a decision of 64 tokens behind it. `SFTTrainer` and `FrozenContextTrainer` run \
with their default settings (gradient checkpointing on, float32), on the same model (Qwen3.5-style, 6 Gated DeltaNet \
and 2 attention layers, hidden size 320), the same LoRA adapters and the same samples. *Bare* is the least a frozen \
context costs, written by hand in `recipes/minimal.py`: one forward of the context without gradient, one forward and \
backward of the decision. Seconds are medians over the steps after the first. Memory is the peak above the loaded \
model, of the whole run, the check of the first batch included. *Cache* is what a frozen context of that length \
takes.
"""


def row(figures: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """One line of the table from the figures of the three methods at one context length."""
    sft, frozen, bare = figures["sft"], figures["frozen"], figures["bare"]
    return (
        f"{frozen['context']}",
        f"{sft['seconds']:.2f}",
        f"{frozen['seconds']:.2f}",
        f"{bare['seconds']:.2f}",
        f"{frozen['seconds'] / sft['seconds']:.2f}",
        f"{frozen['seconds'] / bare['seconds']:.2f}",
        f"{sft['peak_bytes'] / MEBIBYTE:.0f}",
        f"{frozen['peak_bytes'] / MEBIBYTE:.0f}",
        f"{frozen['peak_bytes'] / sft['peak_bytes']:.2f}",
        f"{frozen['cache_bytes'] / MEBIBYTE:.1f}",
    )


def step_page(contexts: Sequence[int], steps: int) -> Page:
    """Measures every context length."""
    all_figures, rows = [], []
    for context in contexts:
        figures = {}
        for method in METHODS:
            print(f"{method} with {context} context tokens ...", file=sys.stderr, flush=True)
            figures[method] = measure("step", method=method, context=context, steps=steps)
        all_figures += figures.values()
        rows.append(row(figures))
    return Page("step", f"{TEXT}\n{markdown_table(HEADER, rows)}", all_figures)

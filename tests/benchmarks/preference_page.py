# SPDX-License-Identifier: Apache-2.0
"""The page about a step over a preference pair: `FrozenContextDPOTrainer` and `DPOTrainer`."""

import sys
from typing import Any

from tests.benchmarks.processes import measure_on_one_thread
from tests.benchmarks.tables import Page, cost_row, markdown_table

CONTEXT = 8192
# What is measured, and how: a name, the settings, and which measurement of DPOTrainer it is held against.
CASES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("DPOTrainer", {"method": "dpo", "steps": 1}, "DPOTrainer"),
    ("frozen context", {"method": "frozen", "steps": 3}, "DPOTrainer"),
    ("frozen context, chunks of 512", {"method": "frozen", "steps": 3, "chunk_size": 512}, "DPOTrainer"),
    ("contexts of the base, second epoch", {"method": "kept", "steps": 4}, "DPOTrainer"),
    (
        "DPOTrainer, reference beforehand",
        {"method": "dpo", "steps": 1, "precompute": True},
        "DPOTrainer, reference beforehand",
    ),
    (
        "frozen context, reference beforehand",
        {"method": "frozen", "steps": 3, "precompute": True},
        "DPOTrainer, reference beforehand",
    ),
)
HEADER = ("training", "processor s", "of DPOTrainer", "MiB", "of DPOTrainer")
TEXT = """# One step over a preference pair

Made by `python -m tests.benchmarks preference`; do not edit.

One pair per step: a prompt of {context:,} tokens, and a chosen and a rejected answer of 64 tokens each. The \
reference is the model without its adapters. Everything runs with its default settings (gradient checkpointing on, \
float32) but for what the first column says, on one thread, on the same model (Qwen3.5-style, 6 Gated DeltaNet and 2 \
attention layers, hidden size 320), the same LoRA adapters and the same pairs. Seconds are of the processor, medians \
over the steps after the first (of DPOTrainer, one step after a short training); of *contexts of the base* those of \
the second epoch, in which every context is found in the store. *Reference beforehand* is `precompute_ref_log_probs`, \
whose own time is in neither. Memory is the peak of the training above the loaded model, the check of the first batch \
included.
"""


def preference_page(context: int = CONTEXT) -> Page:
    """Measures everything."""
    figures: dict[str, dict[str, Any]] = {}
    for name, options, _ in CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        figures[name] = measure_on_one_thread("preference", context=context, **options)
    rows = []
    for name, _, against in CASES:
        own, other = figures[name], figures[against]
        rows.append(cost_row(name, own, other))
    text = f"{TEXT.format(context=context)}\n{markdown_table(HEADER, rows, num_words=1)}"
    return Page("preference", text, [{"training": name} | own for name, own in figures.items()])

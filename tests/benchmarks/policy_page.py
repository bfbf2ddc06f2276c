# SPDX-License-Identifier: Apache-2.0
"""The page about a step over a model's own answers: `FrozenContextTrainer` and `trl.experimental.sdft`."""

import sys
from typing import Any

from tests.benchmarks.policy import NUM_ANSWERS, NUM_INSTRUCTIONS, TOP_K
from tests.benchmarks.processes import measure_on_one_thread
from tests.benchmarks.tables import Page, cost_row, markdown_table

CONTEXT, ANSWER = 8192, 64
# What is measured, and how: a name, and the settings; all are held against the first.
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("trl.experimental.sdft", {"method": "sdft", "steps": 1}),
    ("frozen context", {"method": "frozen", "steps": 3}),
    ("frozen context, second epoch", {"method": "kept", "steps": 4}),
)
# Of a step, by what is logged of it.
PARTS = {
    "encoding": "context/prefill_seconds",
    "writing": "distill/writing_seconds",
    "teacher": "distill/teacher_seconds",
    "training": "context/decision_seconds",
}
HEADER = ("training", "processor s", "of sdft", "MiB", "of sdft")
PARTS_HEADER = ("a step, seconds on the clock", *PARTS, "context tokens encoded")
TEXT = """# One step over a model's own answers

Made by `python -m tests.benchmarks policy`; do not edit.

One prompt of {context:,} tokens per step, to which the model writes {answers} answers of {answer} tokens; a teacher, \
the model without its adapters, with {instructions} tokens of instructions in front of the prompt, judges each token \
by its {top_k} likeliest. `trl.experimental.sdft` has its prompt not truncated, and one answer per micro-batch. \
Everything else has its default settings (gradient checkpointing on, float32), on one thread, on the same model \
(Qwen3.5-style, 6 Gated DeltaNet and 2 attention layers, hidden size 320), the same LoRA adapters and the same \
prompts. Seconds are of the processor, medians over the steps after the first (of sdft, one step after a short \
training); those of the *second epoch* have the teacher's contexts from the store (`context_cache_size`). Memory is \
the peak of the training above the loaded model, the check of the first batch included.
"""


def policy_page(context: int = CONTEXT) -> Page:
    """Measures everything."""
    figures: dict[str, dict[str, Any]] = {}
    for name, options in CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        figures[name] = measure_on_one_thread("policy", context=context, answer=ANSWER, **options)
    other = figures[CASES[0][0]]
    rows, parts = [], []
    for name, own in figures.items():
        rows.append(cost_row(name, own, other))
        last = own["logs"][-1]
        if PARTS["encoding"] in last:
            seconds = (f"{last[key]:.2f}" for key in PARTS.values())
            parts.append((name, *seconds, f"{last['context/tokens_encoded']:,.0f}"))
    text = TEXT.format(context=context, answers=NUM_ANSWERS, answer=ANSWER, instructions=NUM_INSTRUCTIONS, top_k=TOP_K)
    tables = f"{markdown_table(HEADER, rows, num_words=1)}\n\n{markdown_table(PARTS_HEADER, parts, num_words=1)}"
    return Page("policy", f"{text}\n{tables}", [{"training": name} | own for name, own in figures.items()])

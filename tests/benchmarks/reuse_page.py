# SPDX-License-Identifier: Apache-2.0
"""The page about contexts that come again: what is shared in a conversation, in a step and across epochs."""

import sys
from typing import Any

from tests.benchmarks.processes import measure_on_one_thread
from tests.benchmarks.reuse import SCENARIOS
from tests.benchmarks.tables import Page, markdown_table
from tests.benchmarks.training import MEBIBYTE

HEADER = (
    "scenario", "method", "s per sample", "processor s", "SFT/method",
    "encoded", "reused", "hit rate", "peak MiB", "store MiB",
)  # fmt: skip
LONG_CONTEXTS = (8192, 16384, 32768)
# Samples, conversations or documents, where fewer than the scenario's will do: nothing is shared between them.
REPEATS = {("conversation", "sft"): 2, ("conversation", "naive"): 2, ("document", "sft"): 1, ("epochs", "sft"): 3}
TEXT = """# Contexts that come again

Made by `make bench`; do not edit.

The model, the adapters and the settings are those of [one training step](step.md).

- *conversation*: 16 turns of 512 tokens, 8,192 in all; the last 63 tokens of each turn are supervised. A sample is a \
conversation. `SFTTrainer` trains all its spans in one sequence, as with `assistant_only_loss`. *naive* is \
`FrozenContextTrainer` on one sample per span with its whole context, one sample per step. *turns* is \
`decision_mode="turns"`.
- *document*: eight decisions of 64 tokens on one document of 4,096, eight micro-batches of one in one step. A sample \
is a decision. *shared* is `FrozenContextTrainer` on the same micro-batches: the document is encoded once a step.
- *epochs*: contexts of 4,096 tokens, each with a decision of 64, trained on three times. *store* is \
`context_adapters=False` with a `context_cache_size` that holds them all.

Each line was measured in a process of its own, on one thread. Seconds are medians over samples, without the first \
step where there are others; *SFT/method* is how many times as fast as `SFTTrainer` that is, in processor time, which \
other work on the machine moves least. *Encoded* and *reused* are context tokens per sample. Memory is the peak above \
the loaded model, of the whole run, the store included.
"""

MEMORY_HEADER = ("context", "peak MiB", "without context MiB", "cache MiB", "rest/cache")
MEMORY_TEXT = """
## Memory of a long context

One training step of tier 2 over a long context, with a decision of 64 tokens, and the same step without context: the
peak above the loaded model, and how much of it the context takes for every byte of its cache. A second copy of keys
and values, in one layer at a time or in all, would show here. What else there is does not grow with the context: the
activations of one chunk of the prefill (`prefill_chunk_size`).
"""


def row(figures: dict[str, Any], sft: dict[str, Any], method: str) -> tuple[str, ...]:
    """One line of the table."""
    seconds, cpu_seconds = figures["seconds"], figures["cpu_seconds"]
    times = (f"{seconds:.2f}", f"{cpu_seconds:.2f}", f"{sft['cpu_seconds'] / cpu_seconds:.1f}")
    line = (figures["scenario"], method, *times)
    peak = f"{figures['peak_bytes'] / MEBIBYTE:.0f}"
    if "hit_rate" not in figures:
        return (*line, "", "", "", peak, "")
    tokens = (f"{figures['tokens_encoded']:,.0f}", f"{figures['tokens_reused']:,.0f}", f"{figures['hit_rate']:.3f}")
    store = f"{figures['store_bytes'] / MEBIBYTE:.0f}" if figures["store_bytes"] else ""
    return (*line, *tokens, peak, store)


def rows(figures: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The lines of a scenario; the first epoch, which encodes, has one of its own."""
    sft = figures["sft"]
    lines = [row(sft, sft, "SFTTrainer")]
    for method, found in figures.items():
        if "first_epoch" in found:
            lines.append(row(found | found["first_epoch"], sft, f"{method}, first epoch"))
            lines.append(row(found, sft, f"{method}, later epochs"))
        elif method != "sft":
            lines.append(row(found, sft, method))
    return lines


def reuse_page() -> Page:
    """Measures every scenario, and the memory of long contexts."""
    figures = []
    for scenario, (_, sizes, methods) in SCENARIOS.items():
        for method in methods:
            print(f"{scenario} with {method} ...", file=sys.stderr, flush=True)
            repeats = REPEATS.get((scenario, method), sizes.repeats)
            figures.append(measure_on_one_thread("reuse", scenario=scenario, method=method, repeats=repeats))
    memory = []
    for context in (0, *LONG_CONTEXTS):
        print(f"memory with {context} context tokens ...", file=sys.stderr, flush=True)
        memory.append(measure_on_one_thread("step", method="frozen", context=context, steps=1))
    return make_page(figures, memory)


def make_page(figures: list[dict[str, Any]], memory: list[dict[str, Any]]) -> Page:
    """Text of what was measured; of `memory`, the first is the step without context."""
    scenarios = [{found["method"]: found for found in figures if found["scenario"] == name} for name in SCENARIOS]
    lines = [line for scenario in scenarios for line in rows(scenario)]
    empty = memory[0]["peak_bytes"]
    memory_lines = [
        (
            f"{found['context']:,}",
            f"{found['peak_bytes'] / MEBIBYTE:.0f}",
            f"{empty / MEBIBYTE:.0f}",
            f"{found['cache_bytes'] / MEBIBYTE:.1f}",
            f"{(found['peak_bytes'] - empty) / found['cache_bytes']:.2f}",
        )
        for found in memory[1:]
    ]
    text = "\n".join(
        [TEXT, markdown_table(HEADER, lines, num_words=2), MEMORY_TEXT, markdown_table(MEMORY_HEADER, memory_lines)]
    )
    return Page("reuse", text, [*figures, *memory])

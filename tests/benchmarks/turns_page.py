# SPDX-License-Identifier: Apache-2.0
"""The page about turns behind what inference shows: what their branches cost, against one sample per turn."""

import sys
from typing import Any

from tests.benchmarks.processes import measure_on_one_thread
from tests.benchmarks.tables import Page, markdown_table

HEADER = (
    "trace", "method", "turns", "longest", "branches", "encoded", "encoded/visible",
    "s", "processor s", "naive/method", "prepared in s",
)  # fmt: skip
MEASURED = (
    *((trace, method) for trace in ("loop", "chat", "questions") for method in ("naive", "once", "branches")),
    ("long", "once"),
    ("long", "branches"),
)
TEXT = """# Turns as inference shows them

Made by `python -m tests.benchmarks turns`; do not edit.

The model and the adapters are those of [one training step](step.md), a hybrid. The tokenizer is trained on Qwen3.5's \
chat template, which shows reasoning to the next turn behind a call, and none of it after the next question.

- *loop*: a question, 15 calls of a tool, an answer: 16 turns, 8k tokens. No reasoning is dropped.
- *chat*: 16 questions and answers, 8k tokens. Every answer's reasoning is dropped after it.
- *questions*: three questions with 13 calls between them, 16 turns, 8k tokens. Each question drops the reasoning of \
the calls before it, so these are encoded with it and without.
- *long*: five questions with 50 calls between them, 16k tokens in the longest context, in one step.

*naive* is one sample per turn, rendered by itself, one sample per step. *branches* is `turn_contexts="inference"`, a \
trace in one step. *once* is the trace rendered once with TRL's training template, which keeps all reasoning: turns \
behind contexts that inference does not show, and what they cost without branches.

Of the contexts that inference shows, *longest* is the tokens of the longest and *branches* those that others have \
beside it, counted token by token; *encoded* is what ran through the model, and *encoded/visible* is how much of both \
together that is. Each line was measured in a process of its own, on one thread. Seconds are those of a trace, the \
median without the first, but for *long*, of which there is one; *naive/method* is how many times as fast as one \
sample per turn that is, in processor time, which other work on the machine moves least. *Prepared* is processor time \
for a trace: rendering, tokens, and making the trainer.
"""


def turns_page() -> Page:
    """Measures every trace."""
    figures = []
    for trace, method in MEASURED:
        print(f"{trace} with {method} ...", file=sys.stderr, flush=True)
        repeats = 1 if trace == "long" else 2
        figures.append(measure_on_one_thread("turns", trace=trace, method=method, repeats=repeats))
    return make_page(figures)


def make_page(figures: list[dict[str, Any]]) -> Page:
    """Text of what was measured."""
    naive = {found["trace"]: found["cpu_seconds"] for found in figures if found["method"] == "naive"}
    lines = []
    for found in figures:
        visible = found["longest"] + found["branches"]
        # What is rendered once has other contexts.
        share = f"{found['tokens_encoded'] / visible:.2f}" if found["method"] != "once" else ""
        speed = f"{naive[found['trace']] / found['cpu_seconds']:.1f}" if found["trace"] in naive else ""
        lines.append(
            (
                found["trace"],
                found["method"],
                str(found["turns"]),
                f"{found['longest']:,}",
                f"{found['branches']:,}",
                f"{found['tokens_encoded']:,.0f}",
                share,
                f"{found['seconds']:.1f}",
                f"{found['cpu_seconds']:.1f}",
                speed,
                f"{found['preparation_cpu_seconds']:.1f}",
            )
        )
    return Page("turns", f"{TEXT}\n{markdown_table(HEADER, lines, num_words=2)}", figures)

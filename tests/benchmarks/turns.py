# SPDX-License-Identifier: Apache-2.0
"""Measures training on traces whose turns stand behind what inference shows, and prints the figures as JSON.

    python -m tests.benchmarks.turns --trace loop --method branches

Traces, of 16 turns and 8,192 tokens in the longest context, with reasoning that Qwen3.5's template shows within an
answer and not after the next question:

- `loop`: a question, 15 calls of a tool, an answer.
- `chat`: 16 questions and answers.
- `questions`: three questions, with 13 calls between them.
- `long`: five questions, with 50 calls between them, 16,384 tokens; one step.

Methods: `branches` is `turn_contexts="inference"`, a trace in one step. `naive` is one sample per turn, rendered by
itself, one sample per step. `once` is the trace rendered once with TRL's training template, which keeps all reasoning:
other contexts, and what turns cost without branches.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

from tests.benchmarks.training import Training, build_model, settle_allocator, train

TEMPLATE = "qwen3_5_think"
METHODS = ("branches", "naive", "once")


def _traces() -> dict[str, tuple[Callable[[int], dict[str, Any]], int]]:
    """By name, a trace of so many words a message, and the tokens that it is to have."""
    from tests.training.traces import agent_trace, chat_trace

    return {
        "loop": (lambda words: agent_trace(15, words), 8192),
        "chat": (lambda words: chat_trace(16, words), 8192),
        "questions": (lambda words: agent_trace(13, words, every=5), 8192),
        "long": (lambda words: agent_trace(50, words, every=10), 16384),
    }


def make_trace(name: str, num_tokens: int | None = None) -> tuple[dict[str, Any], list[Any]]:
    """A trace of about so many tokens, and its turns rendered by themselves."""
    from tests.training.traces import rendered_turns, template_tokenizer

    build, default = _traces()[name]
    tokenizer, wanted, words = template_tokenizer(TEMPLATE), num_tokens or default, 8
    for _ in range(4):
        row = build(words)
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], tools=row["tools"], add_generation_prompt=True, return_dict=False
        )
        words = max(words * wanted // len(prompt), 1)
    row = build(words)
    return row, rendered_turns(tokenizer, row)


def run(method: str, row: dict[str, Any], turns: list[Any], repeats: int) -> tuple[Training, float]:
    """Trains on a trace so many times; also the seconds that its preparation took."""
    from datasets import Dataset

    from tests.training.traces import template_tokenizer

    fields: dict[str, Any] = {"num_train_epochs": 1, "max_decisions_per_forward": 16}
    template = TEMPLATE
    rows = [row] * repeats
    if method == "naive":
        turn_rows = [{"input_ids": turn.input_ids.tolist(), "labels": turn.labels.tolist()} for turn in turns]
        # The first step is not counted.
        rows = [turn_rows[0], *turn_rows * (repeats - 1)] if repeats > 1 else turn_rows
    elif method == "branches":
        fields |= {"decision_mode": "turns", "turn_contexts": "inference"}
    else:
        template = f"{TEMPLATE}_training"
        fields |= {"decision_mode": "turns", "assistant_only_loss": True}
    start = time.process_time()
    training = train(method, build_model(), Dataset.from_list(rows), tokenizer=template_tokenizer(template), **fields)
    return training, time.process_time() - start - sum(cpu for _, cpu in training.steps)


def summary(method: str, turns: list[Any], training: Training, repeats: int) -> dict[str, Any]:
    """Time for a trace, and what was encoded for it."""
    num_uncounted = 1 if repeats > 1 else 0
    steps, logs = training.steps[num_uncounted:], training.logs[num_uncounted:]
    size = len(turns) if method == "naive" else 1
    traces = [steps[start : start + size] for start in range(0, len(steps), size)]
    wall, cpu = (statistics.median(sum(step[clock] for step in one) for one in traces) for clock in (0, 1))
    encoded = sum(log["context/tokens_encoded"] for log in logs) / len(traces)
    return {"seconds": wall, "cpu_seconds": cpu, "tokens_encoded": encoded}


def tree(turns: list[Any]) -> dict[str, int]:
    """Of the contexts of turns: tokens of the longest, of what they have beside it, and of all; by brute force."""
    contexts = [turn.context.tolist() for turn in turns]
    seen: dict[tuple[int, int], int] = {}
    for context in contexts:
        node = 0
        for token in context:
            node = seen.setdefault((node, token), len(seen) + 1)
    longest = max(map(len, contexts))
    return {"longest": longest, "branches": len(seen) - longest, "asked": sum(map(len, contexts))}


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", choices=("loop", "chat", "questions", "long"), required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--tokens", type=int, help="of the longest context (default: the trace's)")
    parser.add_argument("--repeats", type=int, default=2, help="traces; of several, the first is not counted")
    arguments = parser.parse_args()
    settle_allocator("tests.benchmarks.turns")

    import torch

    warnings.simplefilter("ignore")
    # A short run first: libraries, kernels and thread pools are loaded before anything is timed.
    run(arguments.method, *make_trace("chat", 1024), 1)
    row, turns = make_trace(arguments.trace, arguments.tokens)
    training, preparation = run(arguments.method, row, turns, arguments.repeats)
    figures = {
        "trace": arguments.trace,
        "method": arguments.method,
        "turns": len(turns),
        "repeats": arguments.repeats,
        **tree(turns),
        **summary(arguments.method, turns, training, arguments.repeats),
        "preparation_cpu_seconds": preparation / arguments.repeats,
        "steps": training.steps,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

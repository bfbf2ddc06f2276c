# SPDX-License-Identifier: Apache-2.0
"""Measures training steps of one method in a process of its own, and prints the figures as JSON.

    python -m tests.benchmarks.step --method frozen --context 8192

Methods: `sft` (SFTTrainer with gradient checkpointing, its default), `frozen` (FrozenContextTrainer with its default
settings) and `bare` (`recipes/minimal.py` by hand: one forward of the context without gradient, one forward and
backward of the decision). All three train the same adapters of the same model on the same samples.
"""

import argparse
import json
import statistics
import warnings
from typing import Any

from tests.benchmarks.training import (
    VOCABULARY,
    Timing,
    baseline_bytes,
    build_model,
    cache_bytes,
    now,
    resident_bytes,
    settle_allocator,
    since,
    start_peak,
    train,
)


def samples(num_samples: int, context: int, decision: int) -> Any:
    """Pre-tokenized samples with labels on the decision only."""
    import torch
    from datasets import Dataset

    tokens = torch.randint(2, VOCABULARY, (num_samples, context + decision)).tolist()
    return Dataset.from_list(
        [{"input_ids": row, "labels": [-100] * (context + 1) + row[context + 1 :]} for row in tokens]
    )


def run(
    method: str, model: Any, context: int, decision: int, steps: int, chunk_size: int | None = None
) -> list[Timing]:
    """Time of each optimizer step."""
    if method == "bare":
        return train_by_hand(model, context, decision, steps)
    fields = {} if chunk_size is None else {"prefill_chunk_size": chunk_size}
    return train(method, model, samples(steps, context, decision), max_steps=steps, **fields).steps


def train_by_hand(model: Any, context: int, decision: int, steps: int) -> list[Timing]:
    """Time of each step of the bare cost."""
    import torch
    from peft import get_peft_model

    from frozen_peft import lora_config
    from recipes.minimal import decision_loss, encode_context

    peft_model = get_peft_model(model, lora_config(model))
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-4)
    timings = []
    start_peak()
    for row in samples(steps, context, decision)["input_ids"]:
        start = now()
        sample = torch.tensor([row])
        decision_loss(model, encode_context(model, sample[:, :context]), sample[:, context:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        timings.append(since(start))
    return timings


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["sft", "frozen", "bare"], required=True)
    parser.add_argument("--context", type=int, required=True, help="context tokens")
    parser.add_argument("--decision", type=int, default=64, help="decision tokens")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first is not counted in the time")
    parser.add_argument("--chunk_size", type=int, help="prefill_chunk_size of `frozen` (default: the trainer's)")
    arguments = parser.parse_args()
    settle_allocator("tests.benchmarks.step")

    warnings.simplefilter("ignore")
    model = build_model()
    # A short run first: libraries, kernels and thread pools are loaded before the baseline is read.
    run(arguments.method, build_model(), 256, arguments.decision, 2)
    baseline = baseline_bytes()
    shape = (arguments.context, arguments.decision, arguments.steps)
    timings = run(arguments.method, model, *shape, arguments.chunk_size)
    counted = timings[1:] or timings
    figures = {
        "method": arguments.method,
        "context": arguments.context,
        "decision": arguments.decision,
        "seconds": statistics.median(wall for wall, _ in counted),
        "cpu_seconds": statistics.median(cpu for _, cpu in counted),
        "steps": timings,
        "peak_bytes": resident_bytes("VmHWM") - baseline,
    }
    figures["cache_bytes"] = cache_bytes(build_model(), arguments.context) if arguments.method == "frozen" else None
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Measures steps over preference pairs in a process of its own, and prints the figures as JSON.

    python -m tests.benchmarks.preference --method frozen --context 8192

Methods: `dpo` (DPOTrainer with gradient checkpointing, its default), `frozen` (FrozenContextDPOTrainer with its
default settings) and `kept` (the same with contexts of the base, `context_adapters=False`, in a store, from the second
epoch on). All train the same adapters of the same model on the same pairs; the reference is the model without them.
"""

import argparse
import json
import statistics
import warnings
from typing import Any

from tests.benchmarks.training import (
    VOCABULARY,
    Training,
    baseline_bytes,
    build_model,
    resident_bytes,
    settle_allocator,
    train,
)

# Where `kept` has the adapters switched on; no other token of a pair is this one.
INVOCATION = 2


def pairs(num_pairs: int, context: int, decision: int) -> Any:
    """Tokenized pairs of which both answers have so many tokens, behind so many of a prompt."""
    import torch
    from datasets import Dataset

    tokens = torch.randint(INVOCATION + 1, VOCABULARY, (num_pairs, context + 2 * decision)).tolist()
    return Dataset.from_list(
        [
            {
                "prompt_ids": [*row[: context - 1], INVOCATION],
                "chosen_ids": row[context : context + decision],
                "rejected_ids": row[context + decision :],
            }
            for row in tokens
        ]
    )


def run(
    method: str, model: Any, context: int, decision: int, steps: int, precompute: bool, chunk_size: int | None = None
) -> Training:
    """Each optimizer step takes one pair; `kept` begins to count when every pair has come once."""
    fields: dict[str, Any] = {"max_steps": steps, "precompute_ref_log_probs": precompute}
    if chunk_size is not None:
        fields["prefill_chunk_size"] = chunk_size
    num_pairs = steps
    if method == "kept":
        num_pairs = max(steps // 2, 1)
        fields |= {"context_adapters": False, "invocation": f"w{INVOCATION}", "context_cache_size": "8GiB"}
    return train("dpo" if method == "dpo" else "frozen-dpo", model, pairs(num_pairs, context, decision), **fields)


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["dpo", "frozen", "kept"], required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens of the prompt")
    parser.add_argument("--decision", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first is not counted in the time")
    parser.add_argument("--precompute", action="store_true", help="the reference's log-probabilities beforehand")
    parser.add_argument("--chunk_size", type=int, help="prefill_chunk_size (default: the trainer's)")
    arguments = parser.parse_args()
    settle_allocator("tests.benchmarks.preference")

    warnings.simplefilter("ignore")
    model = build_model()
    # A short run first: libraries, kernels and thread pools are loaded before the baseline is read.
    run(arguments.method, build_model(), 256, arguments.decision, 2, arguments.precompute)
    baseline = baseline_bytes()
    shape = (arguments.context, arguments.decision, arguments.steps)
    timings = run(arguments.method, model, *shape, arguments.precompute, arguments.chunk_size).steps
    counted = timings[len(timings) // 2 :] if arguments.method == "kept" else timings[1:] or timings
    figures = {
        "method": arguments.method,
        "precompute": arguments.precompute,
        "context": arguments.context,
        "decision": arguments.decision,
        "chunk_size": arguments.chunk_size,
        "seconds": statistics.median(wall for wall, _ in counted),
        "cpu_seconds": statistics.median(cpu for _, cpu in counted),
        "steps": timings,
        "peak_bytes": resident_bytes("VmHWM") - baseline,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

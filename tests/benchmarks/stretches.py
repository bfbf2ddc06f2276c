# SPDX-License-Identifier: Apache-2.0
"""Measures full-gradient training steps in a process of its own, and prints the figures as JSON.

    python -m tests.benchmarks.stretches --method stretches --tokens 8192 --stretch 512

Methods: `sft` (SFTTrainer with gradient checkpointing, its default) and `stretches` (FrozenContextTrainer with
`tier: 3` and `sequence_chunk_size`). Both train the same adapters of the same model on the same samples. With
`--address-space` the process may not map more than that, so that a sample which does not fit is an honest
out-of-memory error.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import warnings
from typing import Any

from tests.benchmarks.step import ALLOCATOR, build_model, cache_bytes, resident_bytes, train

DECISION = 64


def trainer_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Configuration of the method."""
    if arguments.method == "sft":
        return {}
    return {
        "tier": 3,
        "sequence_chunk_size": arguments.stretch,
        "gradient_checkpointing": arguments.checkpointing,
        "verify_context": "never",
    }


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["sft", "stretches"], required=True)
    parser.add_argument("--tokens", type=int, required=True, help="tokens of a sample")
    parser.add_argument("--stretch", type=int, default=512, help="tokens per stretch")
    parser.add_argument("--checkpointing", action="store_true", help="layer checkpoints inside a stretch")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps; the first is not counted in the time")
    parser.add_argument("--address-space", type=int, help="bytes that the process may map")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        command = [sys.executable, "-m", "tests.benchmarks.stretches", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | ALLOCATOR)

    warnings.simplefilter("ignore")
    fields = trainer_fields(arguments)
    model = build_model()
    # A short run first: libraries, kernels and thread pools are loaded before the baseline is read.
    train(arguments.method, build_model(), 256, DECISION, 2, **fields)
    baseline = resident_bytes("VmRSS")
    if arguments.address_space is not None:
        resource.setrlimit(resource.RLIMIT_AS, (arguments.address_space, arguments.address_space))
    timings = train(arguments.method, model, arguments.tokens - DECISION, DECISION, arguments.steps, **fields)
    counted = timings[1:] or timings
    figures = {
        "method": arguments.method,
        "tokens": arguments.tokens,
        "stretch": arguments.stretch if arguments.method == "stretches" else None,
        "checkpointing": arguments.checkpointing or arguments.method == "sft",
        "seconds": statistics.median(wall for wall, _ in counted),
        "cpu_seconds": statistics.median(cpu for _, cpu in counted),
        "steps": timings,
        "peak_bytes": resident_bytes("VmHWM") - baseline,
        "mapped_bytes": resident_bytes("VmPeak"),
    }
    if arguments.address_space is None:
        figures["cache_bytes"] = cache_bytes(build_model(), arguments.tokens)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Measures steps of one way to train a checkpoint, in a process of its own, and prints the figures as JSON.

    python -m tests.benchmarks.real.cost --model MODEL_DIR --method tier-2 --tokens 4096

Methods: `sft` (SFTTrainer with its defaults), `tier-1` (at full length, to compare), `tier-2`, `tier-3`, `nf4` (tier 2
over a 4-bit base), `turns` (a sample of four decisions), `shared` (four samples of a step in one document) and `store`
(adapters off in contexts, which are kept from step to step). The last three are told per decision.
"""

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

from tests.benchmarks.training import (
    baseline_bytes,
    resident_bytes,
    settle_allocator,
    train,
)

DECISION = 48
FIELDS: dict[str, dict[str, Any]] = {
    "sft": {},
    "tier-1": {"tier": 1},
    "tier-2": {"tier": 2},
    "tier-3": {"tier": 3},
    "nf4": {"tier": 2},
    "turns": {"tier": 2, "decision_mode": "turns"},
    "shared": {"tier": 2, "per_device_train_batch_size": 4},
    "store": {"tier": 2, "context_adapters": False, "context_cache_size": "4GiB"},
}
DECISIONS_PER_STEP = {"turns": 4, "shared": 4}


def samples(method: str, tokens: int, steps: int, tokenizer: Any) -> Any:
    """Pre-tokenized samples of random tokens; a context ends as a prompt does, with the assistant's header."""
    import torch
    from datasets import Dataset

    torch.manual_seed(0)
    header = tokenizer.apply_chat_template([{"role": "user", "content": "."}], add_generation_prompt=True)
    bare = tokenizer.apply_chat_template([{"role": "user", "content": "."}])
    header = header["input_ids"][len(bare["input_ids"]) :]

    def drawn(num: int) -> list[int]:
        return torch.randint(100, min(1000, len(tokenizer)), (num,)).tolist()

    shared = drawn(tokens - DECISION - len(header))
    rows = []
    for _ in range(steps * (4 if method == "shared" else 1)):
        context = shared if method in ("shared", "store") else drawn(len(shared))
        decision = drawn(DECISION)
        ids = [*context, *header, *decision]
        labels = [-100] * (len(context) + len(header)) + decision
        if method == "turns":
            for turn in range(1, 4):
                start = turn * tokens // 4 - DECISION
                labels[start : start + DECISION] = ids[start : start + DECISION]
        rows.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(rows)


def load(folder: Path, method: str) -> Any:
    """The model, 4-bit where that is measured."""
    import torch
    from transformers import AutoModelForCausalLM

    from frozen_peft import quantization_config

    fields = {"quantization_config": quantization_config(str(folder))} if method == "nf4" else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **fields)


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--method", choices=list(FIELDS), required=True)
    parser.add_argument("--tokens", type=int, required=True, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first is not counted in the time")
    arguments = parser.parse_args()
    settle_allocator("tests.benchmarks.real.cost")

    import torch
    from transformers import AutoTokenizer

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    kind, fields = "sft", FIELDS[arguments.method]
    if arguments.method != "sft":
        kind, fields = "frozen", fields | {"verify_context": "never"}
    # A short run first: libraries, kernels and thread pools are loaded before the baseline is read.
    for tokens, steps in ((128, 1), (arguments.tokens, arguments.steps)):
        dataset = samples(arguments.method, tokens, steps, tokenizer)
        # Weights are mapped from their file and become resident when they are first read, so they count with the rest.
        baseline = baseline_bytes()
        model = load(arguments.model, arguments.method)
        timings = train(kind, model, dataset, tokenizer=tokenizer, max_steps=steps, **fields).steps
        del model
    num = DECISIONS_PER_STEP.get(arguments.method, 1)
    figures = {
        "method": arguments.method,
        "tokens": arguments.tokens,
        "cpu_seconds": statistics.median(cpu for _, cpu in timings[1:] or timings) / num,
        "steps": timings,
        "peak_bytes": resident_bytes("VmHWM") - baseline,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Measures the memory of training steps in a process of its own, to hold a plan to, and prints it as JSON.

    python -m tests.benchmarks.plan_step --model hybrid --tier 2 --context 1024 4096
    python -m tests.benchmarks.plan_step --model hybrid --kind turns --context 2048

The peak is of resident memory above the loaded model, over steps that follow a short run by which libraries, kernels
and thread pools are there. Nothing of the plan is known here. On a CPU TRL's head computes logits of all positions,
which of a small model is most of what there is to see; `--head-tile` makes its tiles narrow.
"""

import argparse
import ctypes
import gc
import json
import sys
import warnings
from typing import Any

import trl.trainer.utils

from tests.benchmarks.step import samples
from tests.benchmarks.training import (
    VOCABULARY,
    build_model,
    resident_bytes,
    settle_allocator,
    train,
)

DECISION = 64
STRETCH = 256
CONTEXTS = {1: (192, 448, 960), 2: (1024, 2048, 4096), 3: (704, 1472, 3008)}
MODELS = ("dense", "hybrid")
# Tier 2 with several decisions of a conversation, and with a teacher whose context is longer by its instructions.
KINDS = ("turns", "distill")
KIND_CONTEXTS = (2048, 4096)
TURNS, DECISIONS_PER_FORWARD = 8, 4
INSTRUCTIONS = 1024
DISTILL_CHUNK = 16


def make_model(name: str) -> Any:
    """`hybrid`: 14M weights, Gated DeltaNet and attention. `dense`: 2M weights, a small Llama."""
    if name == "hybrid":
        return build_model()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 17,
    )
    return LlamaForCausalLM(config)


def fields_of(tier: int) -> dict[str, Any]:
    """Configuration of a tier; tier 3 in stretches, with checkpoints inside."""
    fields: dict[str, Any] = {"tier": tier, "verify_context": "never"}
    return fields | ({"sequence_chunk_size": STRETCH} if tier == 3 else {})


def fields_of_kind(kind: str) -> dict[str, Any]:
    """Configuration of tier 2 with turns, or with a teacher."""
    if kind == "turns":
        return fields_of(2) | {"decision_mode": "turns", "max_decisions_per_forward": DECISIONS_PER_FORWARD}
    return fields_of(2) | {"loss_type": "distill", "distill_chunk_size": DISTILL_CHUNK}


def rows_of_kind(kind: str, num_samples: int, context: int) -> Any:
    """Samples with so many tokens before the last decision."""
    from datasets import Dataset

    rows = samples(num_samples, context, DECISION)
    made = []
    for row in rows:
        ids, labels = row["input_ids"], list(row["labels"])
        if kind == "turns":
            for turn in range(1, TURNS):
                start = context * turn // TURNS
                labels[start + 1 : start + DECISION] = ids[start + 1 : start + DECISION]
            made.append({"input_ids": ids, "labels": labels})
        else:
            teacher = {
                "teacher_input_ids": ids[:1] * INSTRUCTIONS + ids,
                "teacher_labels": [-100] * INSTRUCTIONS + labels,
            }
            made.append({"input_ids": ids, "labels": labels} | teacher)
    return Dataset.from_list(made)


def peak_of(model: str, tier: int, context: int, steps: int, kind: str | None = None) -> int:
    """Peak of resident memory above the loaded model, in bytes."""
    loaded = make_model(model)
    rows = samples(steps, context, DECISION) if kind is None else rows_of_kind(kind, steps, context)
    fields = fields_of(tier) if kind is None else fields_of_kind(kind)
    gc.collect()
    # Small tensors live on the heap, which keeps what runs before have freed: unless it is given back, those of this
    # run are not seen to grow anything. Of a hybrid's reference kernels these are several MiB.
    ctypes.CDLL(None).malloc_trim(0)
    baseline = resident_bytes("VmRSS")
    train("frozen", loaded, rows, max_steps=steps, **fields)
    return resident_bytes("VmHWM") - baseline


def main() -> None:
    """Measures every length of every tier, a short run of each before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--tier", type=int, choices=[1, 2, 3], nargs="+", default=[1, 2, 3])
    parser.add_argument("--kind", choices=KINDS, help="of tier 2, instead of --tier")
    parser.add_argument("--context", type=int, nargs="+", help="context tokens (default: three lengths for each tier)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps")
    parser.add_argument("--head-tile", type=int, help="vocabulary entries whose logits are computed at a time")
    arguments = parser.parse_args()
    settle_allocator("tests.benchmarks.plan_step")

    warnings.simplefilter("ignore")
    if arguments.head_tile:
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = arguments.head_tile
    figures = []
    for context in (KIND_CONTEXTS if arguments.context is None else arguments.context) if arguments.kind else ():
        if not figures:
            peak_of(arguments.model, 2, 2 * STRETCH, 2, arguments.kind)
        peak = peak_of(arguments.model, 2, context, arguments.steps, arguments.kind)
        kind = {"tier": 2, "kind": arguments.kind}
        figures.append({"model": arguments.model, **kind, "context": context, "peak_bytes": peak})
        print(figures[-1], file=sys.stderr, flush=True)
    for tier in () if arguments.kind else arguments.tier:
        peak_of(arguments.model, tier, 2 * STRETCH, 2)
        for context in arguments.context or CONTEXTS[tier]:
            peak = peak_of(arguments.model, tier, context, arguments.steps)
            figures.append({"model": arguments.model, "tier": tier, "context": context, "peak_bytes": peak})
            print(figures[-1], file=sys.stderr, flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

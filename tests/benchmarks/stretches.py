# SPDX-License-Identifier: Apache-2.0
"""Measures full-gradient training steps in a process of its own, and prints the figures as JSON.

    python -m tests.benchmarks.stretches --method stretches --tokens 8192 --stretch 512

Methods: `sft` (SFTTrainer with gradient checkpointing, its default) and `stretches` (FrozenContextTrainer with
`tier: 3` and `sequence_chunk_size`). Both train the same adapters of the same model on the same samples. With
`--more-bytes` the process may not map more than that above the loaded model, so that a sample which does not fit is
an honest out-of-memory error.

The model has the proportions of the large hybrids: many layers, a quarter of them attention, and for a token keys and
values of six hidden states (`--head-dim 48`, the default; 16: of two). On a CPU TRL's head computes logits of all
positions, in a buffer for 4096 x 32768 of them whatever the vocabulary; it is made narrow here, for both methods, or
it would be all there is to see.
"""

import argparse
import json
import resource
import statistics
import warnings
from typing import Any

import trl.trainer.utils

from tests.benchmarks.step import samples
from tests.benchmarks.training import (
    VOCABULARY,
    Timing,
    baseline_bytes,
    cache_bytes,
    resident_bytes,
    settle_allocator,
    train,
)

DECISION = 64
# Vocabulary entries whose logits are computed at a time.
HEAD_TILE = 256


def build_model(head_dim: int, layers: int = 32, heads: int = 4) -> Any:
    """A Qwen3.5-style hybrid, of 8M parameters with 32 layers: three Gated DeltaNet to one attention layer."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=head_dim,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 18,
    )
    return Qwen3_5ForCausalLM(config)


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


def timings_of(method: str, model: Any, tokens: int, steps: int, fields: dict[str, Any]) -> list[Timing]:
    """Time of each optimizer step on one sample of so many tokens."""
    return train(method, model, samples(steps, tokens - DECISION, DECISION), max_steps=steps, **fields).steps


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["sft", "stretches"], required=True)
    parser.add_argument("--tokens", type=int, required=True, help="tokens of a sample")
    parser.add_argument("--stretch", type=int, default=1024, help="tokens per stretch")
    parser.add_argument("--head-dim", type=int, default=48, help="numbers in a key, and in a value")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model")
    parser.add_argument("--heads", type=int, default=4, help="query heads of an attention layer")
    parser.add_argument("--checkpointing", action="store_true", help="layer checkpoints inside a stretch")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps; the first is not counted in the time")
    parser.add_argument("--more-bytes", type=int, help="bytes that the process may map above the loaded model")
    arguments = parser.parse_args()
    settle_allocator("tests.benchmarks.stretches")

    warnings.simplefilter("ignore")
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = HEAD_TILE
    fields = trainer_fields(arguments)
    shape = (arguments.head_dim, arguments.layers, arguments.heads)
    model = build_model(*shape)
    # A short run first: libraries, kernels and thread pools are loaded before the baseline is read.
    timings_of(arguments.method, build_model(*shape), 256 + DECISION, 2, fields)
    baseline = baseline_bytes()
    if arguments.more_bytes is not None:
        limit = resident_bytes("VmSize") + arguments.more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    timings = timings_of(arguments.method, model, arguments.tokens, arguments.steps, fields)
    counted = timings[1:] or timings
    figures = {
        "method": arguments.method,
        "tokens": arguments.tokens,
        "head_dim": arguments.head_dim,
        "layers": arguments.layers,
        "heads": arguments.heads,
        "stretch": arguments.stretch if arguments.method == "stretches" else None,
        "checkpointing": arguments.checkpointing or arguments.method == "sft",
        "seconds": statistics.median(wall for wall, _ in counted),
        "cpu_seconds": statistics.median(cpu for _, cpu in counted),
        "steps": timings,
        "peak_bytes": resident_bytes("VmHWM") - baseline,
        "more_bytes": arguments.more_bytes,
    }
    if arguments.more_bytes is None:
        figures["cache_bytes"] = cache_bytes(build_model(*shape), arguments.tokens)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

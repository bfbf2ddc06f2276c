# SPDX-License-Identifier: Apache-2.0
"""Measures training steps of one method in a process of its own, and prints the figures as JSON.

    python -m tests.benchmarks.step --method frozen --context 8192

Methods: `sft` (SFTTrainer with gradient checkpointing, its default), `frozen` (FrozenContextTrainer with its default
settings) and `bare` (`recipes/minimal.py` by hand: one forward of the context without gradient, one forward and
backward of the decision). All three train the same adapters of the same model on the same samples.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

# glibc would keep freed blocks and so blur the peak; blocks from this size on go back to the system when freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
VOCABULARY = 4096
MEBIBYTE = 1 << 20

# Seconds on the wall, and on processors by all threads of the process.
Timing = tuple[float, float]


def build_model() -> Any:
    """A Qwen3.5-style hybrid of 14M parameters: 6 Gated DeltaNet and 2 attention layers."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=128,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 17,
    )
    return Qwen3_5ForCausalLM(config)


def samples(num_samples: int, context: int, decision: int) -> Any:
    """Pre-tokenized samples with labels on the decision only."""
    import torch
    from datasets import Dataset

    tokens = torch.randint(2, VOCABULARY, (num_samples, context + decision)).tolist()
    return Dataset.from_list(
        [{"input_ids": row, "labels": [-100] * (context + 1) + row[context + 1 :]} for row in tokens]
    )


def train(method: str, model: Any, context: int, decision: int, steps: int, **fields: Any) -> list[Timing]:
    """Time of each optimizer step, trained with a trainer, `fields` being more of its configuration."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from frozen_peft import FrozenContextConfig, FrozenContextTrainer, lora_config

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[Timing] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append(since(self.start))

    trainer_class, config_class = (
        (SFTTrainer, SFTConfig) if method == "sft" else (FrozenContextTrainer, FrozenContextConfig)
    )
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<eos>")), pad_token="<pad>", eos_token="<eos>"
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            folder,
            max_length=None,
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=1e-4,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **fields,
        )
        trainer = trainer_class(
            model,
            args,
            train_dataset=samples(steps, context, decision),
            processing_class=tokenizer,
            peft_config=lora_config(model),
            callbacks=[clock],
        )
        start_peak()
        trainer.train()
    return clock.steps


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


def now() -> Timing:
    """Clock times of this moment: on the wall, and of this process's threads together."""
    return time.perf_counter(), time.process_time()


def since(start: Timing) -> Timing:
    """Seconds on the wall and on processors since a moment."""
    return time.perf_counter() - start[0], time.process_time() - start[1]


def cache_bytes(model: Any, context: int) -> int:
    """Bytes of a frozen context of this length, measured on one that is encoded."""
    import torch

    from frozen_peft.context import encode_context

    return encode_context(model, [torch.zeros(context, dtype=torch.long)]).num_bytes


def resident_bytes(field: str) -> int:
    """A field of this process's status: VmRSS (now) or VmHWM (peak), in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def start_peak() -> None:
    """Lets the peak begin from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["sft", "frozen", "bare"], required=True)
    parser.add_argument("--context", type=int, required=True, help="context tokens")
    parser.add_argument("--decision", type=int, default=64, help="decision tokens")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first is not counted in the time")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        command = [sys.executable, "-m", "tests.benchmarks.step", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | ALLOCATOR)

    warnings.simplefilter("ignore")
    model = build_model()
    # A short run first: libraries, kernels and thread pools are loaded before the baseline is read.
    shape = (arguments.decision, 2)
    train_by_hand(build_model(), 256, *shape) if arguments.method == "bare" else train(
        arguments.method, build_model(), 256, *shape
    )
    baseline = resident_bytes("VmRSS")
    if arguments.method == "bare":
        timings = train_by_hand(model, arguments.context, arguments.decision, arguments.steps)
    else:
        timings = train(arguments.method, model, arguments.context, arguments.decision, arguments.steps)
    figures = {
        "method": arguments.method,
        "context": arguments.context,
        "decision": arguments.decision,
        "seconds": statistics.median(wall for wall, _ in timings[1:]),
        "cpu_seconds": statistics.median(cpu for _, cpu in timings[1:]),
        "steps": timings,
        "peak_bytes": resident_bytes("VmHWM") - baseline,
    }
    figures["cache_bytes"] = cache_bytes(build_model(), arguments.context) if arguments.method == "frozen" else None
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What the measurements share: the model, a training with a trainer, and readings of time and memory.

torch and what builds on it are imported where they are used, so that a measurement can settle the allocator first and
the pages need none of it.
"""

import gc
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# glibc would keep freed blocks and so blur the peak; blocks from this size on go back to the system when freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
VOCABULARY = 4096
MEBIBYTE = 1 << 20
# Of a training that is measured: on a CPU, samples in their order, nothing written or shown meanwhile.
ON_A_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
}

# Seconds on the wall, and on processors by all threads of the process.
Timing = tuple[float, float]


@dataclass(frozen=True)
class Training:
    """A training that was measured.

    Attributes:
        steps: Time of each optimizer step, from the end of the one before it, so with everything between the two.
        logs: What was logged after each step.
    """

    steps: list[Timing]
    logs: list[dict[str, float]]


def settle_allocator(module: str) -> None:
    """Starts this process again as `python -m module` with the same arguments, unless `ALLOCATOR` holds already."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | ALLOCATOR)


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


def build_tokenizer() -> Any:
    """A tokenizer whose tokens from 2 on are words of their own, `w2` and so on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<eos>")), pad_token="<pad>", eos_token="<eos>"
    )


def train(method: str, model: Any, dataset: Any, *, tokenizer: Any = None, **fields: Any) -> Training:
    """Trains with a trainer.

    Args:
        method: `sft` for SFTTrainer, `dpo` for DPOTrainer, `frozen-dpo` for FrozenContextDPOTrainer, `sdft` for
            SDFTTrainer, anything else for FrozenContextTrainer.
        model: What to train; its adapters are the preset's.
        dataset: Samples, read in their order.
        tokenizer: The model's, which prepares samples that are not tokenized; None: one of its own words
            (`build_tokenizer`).
        fields: More fields of the configuration.
    """
    from frozen_peft import lora_config

    trainer_class, config_class = trainer_classes(method)
    clock = make_clock()
    with tempfile.TemporaryDirectory() as folder:
        defaults = {
            **({"max_length": None} if hasattr(config_class, "max_length") else {}),
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-4,
            "logging_steps": 1,
        }
        trainer = trainer_class(
            model,
            args=config_class(folder, **(ON_A_CPU | defaults | fields)),
            train_dataset=dataset,
            processing_class=tokenizer or build_tokenizer(),
            peft_config=lora_config(model),
            callbacks=[clock],
        )
        start_peak()
        trainer.train()
    return Training(clock.steps, [entry for entry in trainer.state.log_history if "loss" in entry])


def trainer_classes(method: str) -> tuple[type, type]:
    """A trainer and its configuration."""
    import trl

    import frozen_peft

    if method == "dpo":
        # Of a tokenized dataset there is nothing to prepare, and DPOTrainer takes none.
        unprepared = {"_prepare_dataset": lambda self, dataset, *rest: dataset}
        return type("DPOTrainer", (trl.DPOTrainer,), unprepared), trl.DPOConfig
    if method == "sdft":
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        return SDFTTrainer, SDFTConfig
    if method == "frozen-dpo":
        return frozen_peft.FrozenContextDPOTrainer, frozen_peft.FrozenContextDPOConfig
    if method == "sft":
        return trl.SFTTrainer, trl.SFTConfig
    return frozen_peft.FrozenContextTrainer, frozen_peft.FrozenContextConfig


def make_clock() -> Any:
    """A callback that fills `steps` with the time of each optimizer step, as `Training` has it."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[Timing] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append(since(self.start))
            self.start = now()

    return Clock()


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

    return encode_context(model, [torch.zeros(context, dtype=torch.long)]).num_bytes if context else 0


def baseline_bytes() -> int:
    """What is resident now, without what warming up has left behind."""
    # Models and trainers hold references in a circle: without this they would go during what is measured.
    gc.collect()
    return resident_bytes("VmRSS")


def resident_bytes(field: str) -> int:
    """A field of this process's status: VmRSS (now) or VmHWM (peak), in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def start_peak() -> None:
    """Lets the peak begin from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")

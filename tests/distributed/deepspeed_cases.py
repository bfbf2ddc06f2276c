# SPDX-License-Identifier: Apache-2.0
"""Trainings of all weights and of adapters with DeepSpeed ZeRO-2, and one process of them."""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from frozen_peft import FrozenContextTrainer
from tests.distributed.cases import TURNS_TWO
from tests.tiny_models import tiny_model
from tests.training.runs import adapted, as_dataset, config, samples, word_tokenizer

# Processes have other numbers of decisions, and so of parts.
TURNS = {"tier": 2, "decision_mode": "turns", "max_decisions_per_forward": 1}
CASES: dict[str, dict[str, Any]] = {
    "tier2": {"tier": 2},
    "accumulation": {"tier": 2, "gradient_accumulation_steps": 2},
    # Some are longer than a stretch and some are not, on one process and on the other.
    "stretches": {"tier": 3, "sequence_chunk_size": 30},
    "stretches_over_contexts": {"tier": 2, "gradient_horizon": 25, "sequence_chunk_size": 8},
    "checkpoints": {"tier": 3, "sequence_chunk_size": 9, "activation_checkpointing": True},
    "turns": TURNS,
    "turns_accumulated": TURNS | {"gradient_accumulation_steps": 2},
    "turns_in_stretches": TURNS | {"gradient_horizon": 25, "sequence_chunk_size": 8},
}
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"), "auto"),
    "gradient_accumulation_steps": "auto",
}


def run(folder: Path, case: str, *, adapters: bool, samples_per_process: int, **fields: Any) -> list[dict[str, float]]:
    """Loss and norm of the gradients, of three steps over two samples each."""
    model = adapted() if adapters else tiny_model("qwen3_5_text")
    fields |= {"per_device_train_batch_size": samples_per_process, "optim": "sgd", "learning_rate": 0.01}
    arguments = config(folder, **CASES[case], **fields)
    rows = TURNS_TWO if "turns" in case else samples()
    trainer = FrozenContextTrainer(model, arguments, train_dataset=as_dataset(rows), processing_class=word_tokenizer())
    trainer.train()
    return [
        {name: entry[name] for name in ("loss", "grad_norm")} for entry in trainer.state.log_history if "loss" in entry
    ]


def main(folder: Path, wanted: list[str]) -> None:
    """Runs every case, or those that are named, on this rank."""
    rank = os.environ["RANK"]
    results = {
        f"{case}-{adapters}": run(
            folder / case / rank, case, adapters=adapters, samples_per_process=1, deepspeed=ZERO_2
        )
        for case in wanted or CASES
        for adapters in (False, True)
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    main(Path(sys.argv[1]), sys.argv[2:])

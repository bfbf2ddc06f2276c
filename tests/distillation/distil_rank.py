# SPDX-License-Identifier: Apache-2.0
"""One process of a distributed distillation in turns, for `test_distributed`; what it computed goes to a file."""

import faulthandler
import signal
import sys
from pathlib import Path

import torch

from frozen_peft import FrozenContextTrainer
from tests.distillation.pairs import as_dataset, sharp
from tests.distillation.test_distributed import CONVERSATIONS, LOSS
from tests.training.runs import config, train


def main(folder: Path) -> None:
    """Trains one step of one conversation per process, and evaluates."""
    arguments = config(
        folder,
        **LOSS.fields,
        decision_mode="turns",
        max_decisions_per_forward=1,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        max_steps=1,
        ddp_backend="gloo",
        distill_cache_dir=str(folder / "answers"),
    )
    rows = as_dataset(CONVERSATIONS)
    run = train(FrozenContextTrainer, sharp("llama"), arguments, rows)
    result = {
        "gradients": {name.replace("module.", ""): gradient for name, gradient in run.gradients[0].items()},
        "loss": run.losses[0],
        "eval_loss": run.trainer.evaluate(rows)["eval_loss"],
    }
    torch.save(result, folder / f"rank-{arguments.process_index}.pt")


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    main(Path(sys.argv[1]))

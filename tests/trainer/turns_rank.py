# SPDX-License-Identifier: Apache-2.0
"""One process of a distributed training in turns, for `test_distributed`; its gradients go to a file."""

import sys
from pathlib import Path

import torch

from frozen_peft import FrozenContextTrainer
from tests.trainer.runs import adapted, as_dataset, config, train
from tests.trainer.test_turns import ROWS


def main(folder: Path) -> None:
    """Trains one step of one conversation per process, and evaluates."""
    arguments = config(
        folder,
        decision_mode="turns",
        max_decisions_per_forward=2,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        max_steps=1,
        ddp_backend="gloo",
        context_cache_size="1MiB",
        context_cache_dir=str(folder / "contexts"),
    )
    rows = as_dataset([ROWS[0], ROWS[3]])
    run = train(FrozenContextTrainer, adapted("llama"), arguments, rows)
    loss = run.trainer.evaluate(rows)["eval_loss"]
    gradients = {name.replace("module.", ""): gradient for name, gradient in run.gradients[0].items()}
    torch.save({"gradients": gradients, "eval_loss": loss}, folder / f"rank-{arguments.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

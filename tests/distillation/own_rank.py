# SPDX-License-Identifier: Apache-2.0
"""One process of a training on answers of its own, for `test_distributed`; what it wrote goes to a file."""

import faulthandler
import signal
import sys
from pathlib import Path

import torch

from frozen_peft.distillation import Writer
from tests.distillation.own_answers import ROWS, Written, keeping, on_policy
from tests.distillation.pairs import as_dataset, sharp
from tests.distillation.test_distributed import OWN


def main(folder: Path) -> None:
    """Trains one step, and evaluates."""
    kept: list[Written] = []
    Writer.write = keeping(kept)
    run = on_policy(sharp("llama"), folder, ROWS, **OWN, ddp_backend="gloo")
    result = {
        "gradients": {name.replace("module.", ""): gradient for name, gradient in run.gradients[0].items()},
        "loss": run.losses[0],
        "written": [
            [tensor for side in (pair.student, pair.teacher) for tensor in (side.input_ids, side.labels)]
            for batch in kept
            for pair in batch.pairs
        ],
        "answered": [prompt.tokens.tolist() for batch in kept for prompt in batch.prompts],
        "length": run.logs[0]["distill/answer_length"],
        "eval_loss": run.trainer.evaluate(as_dataset(ROWS))["eval_loss"],
    }
    torch.save(result, folder / f"rank-{run.trainer.args.process_index}.pt")


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    main(Path(sys.argv[1]))

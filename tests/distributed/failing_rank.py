# SPDX-License-Identifier: Apache-2.0
"""One process of a training in which rank 1 fails in the second step, for `test_failing`."""

import datetime
import faulthandler
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from frozen_peft import FrozenContextTrainer
from tests.distributed.cases import TWO
from tests.distributed.engines import engine_fields
from tests.distributed.shards_on_cpu import shards_on_cpu
from tests.training.runs import adapted, as_dataset, config, word_tokenizer


class FailingTrainer(FrozenContextTrainer):
    """Fails on rank 1, or stays where it is for longer than the others wait."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and self.args.process_index == 1:
            if sys.argv[2] == "raises":
                raise ValueError("a sample that nobody can train on")
            time.sleep(3600.0)
        return super().training_step(*args, **kwargs)


def main(folder: Path) -> None:
    """Trains with weights in shards, where every process waits for every other in each forward."""
    with shards_on_cpu():
        arguments = config(folder, per_device_train_batch_size=1, **engine_fields("fsdp2", "llama"))
        FailingTrainer(
            adapted("llama"), arguments, train_dataset=as_dataset(TWO), processing_class=word_tokenizer()
        ).train()


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    # On a GPU, `ddp_timeout` says so; transformers 5.23 leaves that aside on a CPU.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=float(sys.argv[3])))
    main(Path(sys.argv[1]))

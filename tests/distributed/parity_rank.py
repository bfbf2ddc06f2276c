# SPDX-License-Identifier: Apache-2.0
"""One process of all trainings of `cases`, for `test_parity`; what it computed goes to a file."""

import faulthandler
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from frozen_peft import FrozenContextTrainer
from tests.distributed.cases import Case, Engine, cases, ragged_cases
from tests.distributed.engines import engine_fields, whole
from tests.distributed.extras import EXTRAS
from tests.distributed.shards_on_cpu import shards_on_cpu
from tests.training.runs import as_dataset, config, in_float64, train


def run_case(case: Case, engine: Engine, folder: Path) -> dict[str, Any]:
    """Trains, evaluates, and gathers what came out."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = config(folder, **case.arguments(folder), **engine_fields(engine, case.model, **case.shards))
    rows = as_dataset(case.rows)
    with in_float64(case.make_model()) as model, shards_on_cpu() if engine == "fsdp2" else nullcontext():
        run = train(FrozenContextTrainer, model, arguments, rows)
        eval_loss = run.trainer.evaluate(rows)["eval_loss"]
    return {
        "losses": run.losses,
        "gradients": whole(run.gradients[0]),
        "weights": whole(run.weights),
        "eval_loss": eval_loss,
        "shards": any(isinstance(weight, DTensor) for weight in run.weights.values()),
        "tokens_encoded": sum(entry.get("context/tokens_encoded", 0.0) for entry in run.logs),
    }


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function gives, or the traceback of its error."""
    try:
        return function()
    except Exception:
        return {"error": traceback.format_exc()}


def main(folder: Path, wanted: list[str]) -> None:
    """Runs every case with every engine, and goes on after one that fails on all processes."""
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {}
    every = wanted == ["all"]
    to_run = ragged_cases(num_processes, 200) if wanted == ["ragged"] else cases(num_processes, all_engines=every)
    for name, case in to_run.items():
        for engine in case.engines:
            key = f"{engine}/{name}"
            if wanted not in ([], ["ragged"], ["all"]) and key not in wanted:
                continue
            results[key] = attempt(partial(run_case, case, engine, folder / engine / name))
    for name, extra in EXTRAS.items():
        if (num_processes == 2 and not wanted) or name in wanted:
            results[name] = attempt(partial(extra, folder / name))
    torch.save(results, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]), sys.argv[2:])
    dist.destroy_process_group()

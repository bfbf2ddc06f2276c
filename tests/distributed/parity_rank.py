# SPDX-License-Identifier: Apache-2.0
"""One process of all trainings of `cases`, for `test_parity`; what it computed goes to a file."""

import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from frozen_peft import FrozenContextTrainer
from tests.distributed.cases import LAYER_CLASSES, Case, Engine, cases
from tests.distributed.shards_on_cpu import shards_on_cpu
from tests.trainer.runs import as_dataset, config, train


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their name in the model itself, gathered where they are in shards."""
    return {
        name.removeprefix("module."): tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
    }


def engine_fields(engine: Engine, model: str) -> dict[str, Any]:
    """Training arguments that ask for an engine."""
    if engine == "ddp":
        return {"ddp_backend": "gloo"}
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [LAYER_CLASSES[model]],
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": False,
            "state_dict_type": "FULL_STATE_DICT",
        },
    }


def run_case(case: Case, engine: Engine, folder: Path) -> dict[str, Any]:
    """Trains, evaluates, and gathers what came out."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = config(folder, **case.arguments(folder), **engine_fields(engine, case.model))
    rows = as_dataset(case.rows)
    with shards_on_cpu() if engine == "fsdp2" else nullcontext():
        run = train(FrozenContextTrainer, case.make_model(), arguments, rows)
        eval_loss = run.trainer.evaluate(rows)["eval_loss"]
    return {
        "losses": run.losses,
        "gradients": whole(run.gradients[0]),
        "weights": whole(run.weights),
        "eval_loss": eval_loss,
        "shards": any(isinstance(weight, DTensor) for weight in run.weights.values()),
        "tokens_encoded": sum(entry.get("context/tokens_encoded", 0.0) for entry in run.logs),
    }


def main(folder: Path, wanted: list[str]) -> None:
    """Runs every case with every engine, and goes on after one that fails on all processes."""
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {}
    for name, case in cases(num_processes).items():
        for engine in case.engines:
            key = f"{engine}/{name}"
            if wanted and key not in wanted:
                continue
            try:
                results[key] = run_case(case, engine, folder / engine / name)
            except Exception:
                results[key] = {"error": traceback.format_exc()}
    torch.save(results, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]), sys.argv[2:])
    dist.destroy_process_group()

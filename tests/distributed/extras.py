# SPDX-License-Identifier: Apache-2.0
"""What two processes do besides the trainings of `cases`, each in one function; `test_two_processes` looks at it."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, EvalPrediction

from frozen_peft import FrozenContextTrainer, lora_config, quantization_config
from frozen_peft.training import engines as distributed
from frozen_peft.utils.installed import installed_version
from tests.distributed.cases import TWO
from tests.distributed.engines import engine_fields, whole
from tests.distributed.preferences import run_preferences
from tests.distributed.shards_on_cpu import shards_on_cpu
from tests.tiny_models import tiny_model
from tests.training.runs import Run, adapted, as_dataset, config, train, trained_weights, word_tokenizer
from tests.training.test_predictions import ROWS as CONVERSATIONS

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
ROWS = as_dataset(TWO)


def arguments(folder: Path, engine: str, model: str = "llama", **fields: Any) -> Any:
    """A configuration of two steps."""
    given = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "prefill_chunk_size": 8,
        "max_steps": 2,
    }
    asked = engine_fields(engine, model) if engine in ("ddp", "fsdp2") else {}
    return config(folder, **(given | asked | fields))


def trained(
    folder: Path, engine: str, model: PeftModel, name: str = "llama", resume: Path | None = None, **fields: Any
) -> Run:
    with shards_on_cpu():
        args = arguments(folder, engine, name, **fields)
        return train(FrozenContextTrainer, model, args, ROWS, resume=str(resume) if resume else None)


def resume(folder: Path) -> dict[str, Any]:
    """Two steps in one go, and the second after a checkpoint, by each engine."""
    results: dict[str, Any] = {}
    for engine in ("ddp", "fsdp2"):
        fields = {
            "max_steps": 2,
            "optim": "adamw_torch",
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        whole_run = trained(folder / engine, engine, adapted("llama"), **fields)
        first = folder / engine / "checkpoint-1"
        again = trained(folder / f"{engine}-again", engine, adapted("llama"), resume=first, **fields)
        results[engine] = {"at_once": whole(whole_run.weights), "resumed": whole(again.weights)}
        results[engine]["files"] = sorted(path.name for path in first.iterdir())
    return results


def evaluate_first(folder: Path) -> dict[str, Any]:
    """Training after an evaluation, which puts weights in shards, or prepares a model as if it were not trained."""
    results: dict[str, Any] = {}
    for engine in ("ddp", "fsdp2"):
        with shards_on_cpu():
            args = arguments(folder, engine)
            trainer = FrozenContextTrainer(
                adapted("llama"), args, train_dataset=ROWS, processing_class=word_tokenizer()
            )
            before = trainer.evaluate(ROWS)["eval_loss"]
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results[engine] = {"before": before, "losses": losses, "weights": whole(trained_weights(trainer.model))}
    return results


def metrics(folder: Path) -> dict[str, Any]:
    """What a metric sees of five conversations, so that the last batch is filled up with samples seen before."""
    results: dict[str, Any] = {}
    rows = as_dataset(CONVERSATIONS)
    for name, engine, size in (("one each", "fsdp2", 1), ("two each", "ddp", 2)):
        seen: list[EvalPrediction] = []
        fields = {"decision_mode": "turns", "max_decisions_per_forward": 2, "include_for_metrics": ["inputs"]}
        args = arguments(folder / name, engine, per_device_eval_batch_size=size, **fields)
        with shards_on_cpu(), warnings.catch_warnings():
            # TRL 1.16 announces that metrics from logits go in its 2.0.
            warnings.simplefilter("ignore", FutureWarning)
            trainer = FrozenContextTrainer(
                adapted("llama"),
                args,
                train_dataset=rows,
                processing_class=word_tokenizer(),
                compute_metrics=lambda prediction, seen=seen: seen.append(prediction) or {},
            )
            loss = trainer.evaluate(rows)["eval_loss"]
        parts = (seen[0].predictions, seen[0].label_ids, seen[0].inputs)
        results[name] = {"loss": loss, "parts": [torch.from_numpy(part) for part in parts]}
    return results


def four_bit(folder: Path) -> dict[str, Any]:
    """A 4-bit base: whole on every process; whole beside adapters in shards; stored such that it is in shards too."""
    path = folder / "base"
    if dist.get_rank() == 0:
        tiny_model("qwen3_5_text").save_pretrained(path)
    dist.barrier()
    results: dict[str, Any] = {}
    for name, engine, storage in (
        ("ddp", "ddp", "uint8"),
        ("whole", "fsdp2", "uint8"),
        ("shards", "fsdp2", "bfloat16"),
    ):
        quantization = quantization_config(str(path), bnb_4bit_quant_storage=storage)
        base = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=torch.float32)
        torch.manual_seed(0)
        model = get_peft_model(base, lora_config(base, r=2, init_lora_weights=False))
        run = trained(folder / name, engine, model, "qwen3_5_text")
        codes = [weight for weight in run.trainer.model.parameters() if hasattr(weight, "quant_state")]
        results[name] = {
            "losses": run.losses,
            "gradients": whole(run.gradients[0]),
            "num_4bit": len(codes),
            "num_shards": sum(isinstance(weight, DTensor) for weight in run.trainer.model.parameters()),
        }
    return results


def sixteen_bit(folder: Path) -> dict[str, Any]:
    """Mixed precision over weights in shards, against float32."""
    return {
        "float32": trained(folder, "fsdp2", adapted("llama"), max_steps=1).losses,
        "bfloat16": trained(folder, "fsdp2", adapted("llama"), max_steps=1, bf16=True).losses,
    }


def refusals(folder: Path) -> dict[str, Any]:
    """What the processes say about trainings that cannot be."""
    found = {}
    with mock.patch.object(distributed, "installed_version", _another_version_on_rank_1):
        found["versions"] = _message(lambda: trained(folder, "ddp", adapted("llama")))
    found["checkpoint_every"] = _message(
        lambda: trained(folder, "fsdp2", adapted("llama"), activation_checkpointing=True, checkpoint_every=2)
    )
    return found


def _another_version_on_rank_1(package: str) -> str | None:
    return "4.0.0" if package == "transformers" and dist.get_rank() == 1 else installed_version(package)


def _message(function: Callable[[], object]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def recipes(folder: Path) -> dict[str, Any]:
    """Trains with what `accelerate launch --config_file` makes of the files in recipes/accelerate."""
    results: dict[str, Any] = {}
    for path in sorted(RECIPES.glob("fsdp2*.yaml")):
        parsed = launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", "2", "script.py"])
        parsed, _, _ = _validate_launch_command(parsed)
        environment = prepare_multi_gpu_env(parsed)
        asked = {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
        # In 16 bit the files; in float32 here, to be compared.
        asked["ACCELERATE_MIXED_PRECISION"] = "no"
        with mock.patch.dict(os.environ, asked):
            run = trained(folder, "", adapted("llama"))
        results[path.name] = {
            "losses": run.losses,
            "num_shards": sum(isinstance(weight, DTensor) for weight in run.trainer.model.parameters()),
            "asked": json.loads(json.dumps(asked)),
        }
    return results


EXTRAS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "resume": resume,
    "evaluate_first": evaluate_first,
    "metrics": metrics,
    "four_bit": four_bit,
    "sixteen_bit": sixteen_bit,
    "refusals": refusals,
    "recipes": recipes,
    "preferences": run_preferences,
}

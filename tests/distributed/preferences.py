# SPDX-License-Identifier: Apache-2.0
"""Preference trainings of two processes, and what one process computes for them by plain forwards."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import get_peft_model
from torch.distributed.tensor import DTensor

from frozen_peft import (
    FrozenContextDPOConfig,
    FrozenContextDPOTrainer,
    FrozenContextKTOConfig,
    FrozenContextKTOTrainer,
)
from tests.distributed.cases import Engine
from tests.distributed.engines import engine_fields, whole
from tests.distributed.shards_on_cpu import shards_on_cpu
from tests.tiny_models import tiny_model
from tests.training.preferences import acting_lora, as_tokens, pairs, settings, sigmoid_loss, without_adapters
from tests.training.runs import gradients_of, in_float64, train
from tests.training.test_kto import kto_loss

# Two steps of two processes; the second process has no context in the first step, and the first none in the second.
PAIRS = pairs(((40, 6, 9), (1, 4, 5), (1, 12, 5), (61, 2, 7)))
_KTO_KEYS = ("prompt_ids", "completion_ids", "KL_completion_ids", "label")
# The same in two rows of each process, since its divergence is estimated from several.
ANSWERS = [
    dict(zip(_KTO_KEYS, (row.prompt.tolist(), answer.tolist(), other.tolist(), wanted), strict=True))
    for row in PAIRS
    for answer, other, wanted in ((row.chosen, row.rejected, True), (row.rejected, row.chosen, False))
]


@dataclass(frozen=True)
class Preference:
    """One training.

    Attributes:
        method: The trainer's.
        engine: What runs it.
        model: Of `LAYER_CLASSES`.
        fields: Of the configuration.
        comes_trained: The model has its adapters already, of which TRL makes a copy for the reference.
    """

    method: Literal["dpo", "kto"]
    engine: Engine
    model: str
    fields: tuple[tuple[str, Any], ...] = ()
    comes_trained: bool = False


PREFERENCES = {
    "dpo, ddp": Preference("dpo", "ddp", "qwen3_5_text"),
    "dpo, shards": Preference("dpo", "fsdp2", "qwen3_5_text", (("context_cache_size", "1GiB"),)),
    "dpo, shards, trained before": Preference("dpo", "fsdp2", "llama", comes_trained=True),
    "dpo, shards, beforehand": Preference("dpo", "fsdp2", "llama", (("precompute_ref_log_probs", True),)),
    "dpo, experts": Preference("dpo", "fsdp2", "qwen3_5_moe_text", (("router_aux_loss_coef", 0.0),)),
    "kto, ddp": Preference("kto", "ddp", "llama"),
    "kto, shards": Preference("kto", "fsdp2", "qwen3_5_text"),
}


def run_preferences(folder: Path) -> dict[str, Any]:
    """Losses of two steps at a learning rate of 0, gradients of the first, and the weights that both have."""
    return {name: _run(case, folder / name) for name, case in PREFERENCES.items()}


def _run(case: Preference, folder: Path) -> dict[str, Any]:
    is_dpo = case.method == "dpo"
    kind = FrozenContextDPOConfig if is_dpo else FrozenContextKTOConfig
    given = {
        "per_device_train_batch_size": 1 if is_dpo else 2,
        "max_steps": 2,
        "learning_rate": 0.0,
        "prefill_chunk_size": 8,
    }
    args = settings(folder, kind, **(given | dict(case.fields) | engine_fields(case.engine, case.model)))
    rows = _on_disk(as_tokens(PAIRS) if is_dpo else Dataset.from_list(ANSWERS), folder / "rows")
    torch.manual_seed(0)
    with in_float64(tiny_model(case.model)) as model, shards_on_cpu() if case.engine == "fsdp2" else nullcontext():
        peft_config: Any = acting_lora(model)
        if case.comes_trained:
            model, peft_config = get_peft_model(model, peft_config).double(), None
        trainer = FrozenContextDPOTrainer if is_dpo else FrozenContextKTOTrainer
        run = train(trainer, model, args, rows, peft_config=peft_config)
    return {
        "losses": run.losses,
        "gradients": whole(run.gradients[0]),
        "weights": whole(run.weights),
        "shards": any(isinstance(weight, DTensor) for weight in run.weights.values()),
    }


def _on_disk(rows: Dataset, folder: Path) -> Dataset:
    """The same where all processes find it, as TRL's file of what is computed beforehand has to be."""
    if dist.get_rank() == 0:
        rows.save_to_disk(str(folder))
    dist.barrier()
    return Dataset.load_from_disk(str(folder))


def expected(case: Preference, weights: dict[str, torch.Tensor]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of both steps and gradients of the first, of adapters with these weights over the base."""
    base = tiny_model(case.model)
    model = get_peft_model(base, acting_lora(base))
    model.load_state_dict({**model.state_dict(), **weights})
    losses, gradients = [], None
    with in_float64(model) as exact:
        exact.load_state_dict({**exact.state_dict(), **weights})
        reference = exact if case.comes_trained else without_adapters(exact)
        for step in range(2):
            if case.method == "dpo":
                loss = sigmoid_loss(exact, reference, PAIRS[2 * step : 2 * step + 2])
            else:
                loss = kto_loss(exact, reference, ANSWERS[4 * step : 4 * step + 4], "kto")
            losses.append(loss.item())
            gradients = gradients or gradients_of(loss, exact)
    assert gradients is not None
    return losses, gradients

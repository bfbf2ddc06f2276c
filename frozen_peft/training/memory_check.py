# SPDX-License-Identifier: Apache-2.0
"""The check of a recipe that its run fits on the device, and the plan that it leaves in the run's folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from transformers import PretrainedConfig

from frozen_peft.context import Cut
from frozen_peft.context.kernels import current_capabilities, is_accelerated
from frozen_peft.distillation import TEACHER_COLUMNS
from frozen_peft.planning import Plan, Setting, advise, make_plan, plan_of_weights
from frozen_peft.training.recipe import Recipe, is_sharded_run
from frozen_peft.training.samples import measure_samples
from frozen_peft.training.sft import FrozenContextTrainer
from frozen_peft.utils.files import whole_file

__all__ = ["MemoryCheck"]


class MemoryCheck:
    """Refuses a run that cannot fit: before its weights are loaded, and when its longest sample is known.

    A plan knows nothing of shards: where weights or optimizer are spread over processes (FSDP, DeepSpeed), it is
    written without a limit, and nothing is refused.

    Args:
        recipe: What is run.
        base: Configuration of the base model.
    """

    def __init__(self, recipe: Recipe, base: PretrainedConfig):
        self._recipe, self._base, self._config = recipe, base, recipe.config
        self._device = torch.device("cpu" if self._config.use_cpu or not torch.cuda.is_available() else "cuda")
        # Before anything is loaded.
        self._limit = None if is_sharded_run("FSDP", "DEEPSPEED") else memory_limit(self._device)

    def before_loading(self) -> None:
        """Refuses a model that does not fit by itself.

        Raises:
            ValueError: It takes more than the device has.
        """
        if self._recipe.model.check_memory != "never":
            self._require(plan_of_weights(self._base, self._setting(0, 2), self._limit))

    def before_training(self, trainer: FrozenContextTrainer) -> None:
        """Refuses a longest sample that does not fit, and writes `plan.json`.

        Raises:
            ValueError: It takes more than the device has.
            OSError: The plan cannot be written.
        """
        if self._recipe.model.check_memory == "never" or not isinstance(trainer.train_dataset, Dataset):
            return
        setting = self._setting_of(trainer)
        if setting.accelerator or self._recipe.model.check_memory == "full":
            plan = make_plan(self._base, setting, self._limit)
        else:
            plan = plan_of_weights(self._base, setting, self._limit)
        advice = advise(plan)
        if trainer.is_world_process_zero():
            self._write(plan, advice)
        self._require(plan, advice)

    def _setting_of(self, trainer: FrozenContextTrainer) -> Setting:
        """The setting of the longest of its samples, as they are cut."""
        cut = trainer.cut
        samples = measure_samples(trainer.train_dataset, cut)
        contexts = samples.boundaries.clip(min=0)
        # A new row begins with nothing before its first decision.
        is_first = np.diff(samples.rows, prepend=-1) != 0
        pieces = np.where(is_first, contexts, np.diff(contexts, prepend=0))
        teacher_length = None
        if self._config.loss_type == "distill":
            names = dict(zip(TEACHER_COLUMNS, ("input_ids", "labels"), strict=True))
            columns = trainer.train_dataset.select_columns(list(names)).rename_columns(names)
            teacher_length = int(measure_samples(columns, Cut(cut.mode)).boundaries.max().clip(min=0))
        return self._setting(
            int(contexts.max()),
            int((samples.totals - contexts).max()),
            turns=int(np.unique(samples.rows, return_counts=True)[1].max()) if cut.mode == "turns" else 1,
            turn_length=int(pieces.max()),
            teacher_length=teacher_length,
        )

    def _setting(self, context_length: int, decision_length: int, **rest: Any) -> Setting:
        model, limit = self._recipe.model, self._config.max_context_length
        dtype: str | None = model.dtype or (None if self._recipe.adapter.use_peft else "float32")
        if dtype in (None, "auto"):
            dtype = str(getattr(self._base, "dtype", None) or "float32").removeprefix("torch.")
        on_card = self._device.type == "cuda"
        delta_rule = is_accelerated("gated delta rule", True, current_capabilities(self._device))[0]
        return Setting.from_config(
            self._config,
            context_length=context_length if limit is None else min(context_length, limit),
            decision_length=decision_length,
            dtype=dtype,
            accelerator=on_card,
            reference_kernels=on_card and not delta_rule,
            **self._recipe.planned_fields(),
            **rest,
        )

    def _write(self, plan: Plan, advice: Sequence[str]) -> None:
        folder = Path(self._config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        record = plan.as_dict(advice) | {"model": self._recipe.model.model_name_or_path}
        with whole_file(folder / "plan.json") as file:
            file.write(json.dumps(record, indent=2) + "\n")

    def _require(self, plan: Plan, advice: Sequence[str] = ()) -> None:
        if plan.fits is not False:
            return
        where = "the GPU" if self._device.type == "cuda" else "this machine's free memory"
        terms = ", ".join(f"{term} {size / 2**30:.2f}" for term, size in plan.terms.items() if size)
        sentences = " ".join(advice or advise(plan))
        raise ValueError(
            f"the run cannot fit on {where}. {sentences} Planned, in GiB: {terms}. `check_memory: never` runs it all "
            "the same."
        )


def memory_limit(device: torch.device) -> int:
    """Bytes that a run may take: all of a GPU, or what is free of the machine's memory now."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available

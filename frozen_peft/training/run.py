# SPDX-License-Identifier: Apache-2.0
"""A recipe's run: checked that it fits, loaded, trained, and evaluated before and after."""

import json
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import PretrainedConfig

from frozen_peft.adapters import require_no_pickle
from frozen_peft.context import Cut
from frozen_peft.context.kernels import current_capabilities, is_accelerated
from frozen_peft.distillation import TEACHER_COLUMNS
from frozen_peft.planning import Plan, Setting, advise, make_plan, plan_of_weights
from frozen_peft.training.checkpoints import checkpoint_to_resume, require_no_way_out
from frozen_peft.training.pairs import longest_answer
from frozen_peft.training.recipe import Recipe, build_trainer, is_sharded_run, load_base_config
from frozen_peft.training.samples import SampleLengths, measure_samples
from frozen_peft.training.sft import FrozenContextTrainer
from frozen_peft.utils.files import whole_file

__all__ = ["MemoryCheck", "RecipeRun"]


class RecipeRun:
    """A training that is ready to begin: model and data are loaded and were found to fit.

    Args:
        recipe: What is trained on what.

    Raises:
        ValueError: A field, file or sample cannot be used, or the run does not fit.
        OSError: There is no such model or dataset.
    """

    def __init__(self, recipe: Recipe):
        model, config = recipe.model, recipe.config
        require_no_way_out(config.output_dir)
        resume = config.resume_from_checkpoint
        wanted = {"true": True, "false": False}.get(str(resume).lower(), resume)
        self.checkpoint = checkpoint_to_resume(wanted, config.output_dir)
        for folder in (model.model_name_or_path, self.checkpoint):
            if folder is not None and not model.allow_pickle:
                require_no_pickle(folder)
        check = MemoryCheck(recipe, load_base_config(recipe))
        check.before_loading()
        self.trainer = build_trainer(recipe)
        check.before_training(self.trainer)
        self._train_seconds = 0.0
        self._losses: list[str] = []

    def train(self, on_trained: Callable[[], None]) -> None:
        """Trains, takes the loss of held-out samples before and after where there are any, and saves.

        Args:
            on_trained: Called when the last step is done.
        """
        # A run that goes on from a checkpoint has no loss before training to show, and before it begins transformers
        # 5.23 evaluates no model of DeepSpeed's but ZeRO-3's.
        if not self.checkpoint and not is_sharded_run("DEEPSPEED"):
            self._evaluate("eval_before", "before")
        start = time.monotonic()
        self.trainer.train(resume_from_checkpoint=self.checkpoint)
        self._train_seconds = time.monotonic() - start
        on_trained()
        self._evaluate("eval", "after")
        self.trainer.save_model()
        self.trainer.save_state()

    def summary(self) -> list[tuple[str, str]]:
        """Where the results are and what changed: titles and texts."""
        trainer, state = self.trainer, self.trainer.state
        trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
        rows = [
            ("results", str(Path(trainer.args.output_dir).resolve())),
            ("trained", f"{trainable:,} weights, {state.global_step} steps, {self._train_seconds:.0f} s"),
        ]
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if logged:
            rows.append(("training loss", f"{logged[0]:.4f} first logged, {logged[-1]:.4f} last"))
        if self._losses:
            rows.append(("held-out loss", ", ".join(self._losses)))
        if trainer.args.load_best_model_at_end and state.best_global_step:
            best, last, metric = state.best_global_step, state.global_step, trainer.args.metric_for_best_model
            more = "" if best < last else "; the last one, so more `max_steps` may do better"
            rows.append(("kept", f"step {best} of {last}, with the best {metric}{more}"))
        if torch.cuda.is_available():
            rows.append(("peak memory", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"))
        return rows

    def _evaluate(self, name: str, when: str) -> None:
        """Takes the held-out loss and writes all metrics to `{name}_results.json`, where there are such samples."""
        if self.trainer.eval_dataset is None:
            return
        metrics = self.trainer.evaluate()
        self.trainer.save_metrics(name, metrics, combined=False)
        self._losses.append(f"{metrics['eval_loss']:.4f} {when}")


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
            folder = Path(self._config.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            record = plan.as_dict(advice) | {"model": self._recipe.model.model_name_or_path}
            with whole_file(folder / "plan.json") as file:
                file.write(json.dumps(record, indent=2) + "\n")
        self._require(plan, advice)

    def _setting_of(self, trainer: FrozenContextTrainer) -> Setting:
        """The setting of the longest of its samples, as they are cut."""
        cut = trainer.cut
        if self._recipe.data.method != "sft":
            context, decision = longest_answer(trainer.train_dataset, cut)
            return self._setting(context, decision)
        rows = [list(row) for _, row in groupby(measure_samples(trainer.train_dataset, cut), attrgetter("row"))]
        branches = [sum(sample.context - sample.shared for sample in row) - _longest_context(row) for row in rows]
        teacher_length = None
        if self._config.loss_type == "distill":
            names = dict(zip(TEACHER_COLUMNS, ("input_ids", "labels"), strict=True))
            columns = trainer.train_dataset.select_columns(list(names)).rename_columns(names)
            teacher_length = max(sample.context for sample in measure_samples(columns, Cut(cut.mode)))
        return self._setting(
            max(map(_longest_context, rows)),
            max(sample.decision for row in rows for sample in row),
            turns=max(map(len, rows)) if cut.mode == "turns" else 1,
            turn_length=max(sample.context - sample.shared for row in rows for sample in row),
            branch_length=max(branches) if self._config.renders_turns else 0,
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


def _longest_context(samples: Sequence[SampleLengths]) -> int:
    return max(sample.context for sample in samples)


def memory_limit(device: torch.device) -> int:
    """Bytes that a run may take: all of a GPU, or what is free of the machine's memory now."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available

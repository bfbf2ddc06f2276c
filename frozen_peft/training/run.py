# SPDX-License-Identifier: Apache-2.0
"""A recipe's run: checked, loaded, trained, and evaluated before and after."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from frozen_peft.adapters import require_no_pickle
from frozen_peft.training.checkpoints import checkpoint_to_resume, require_no_way_out
from frozen_peft.training.memory_check import MemoryCheck
from frozen_peft.training.recipe import Recipe, build_trainer, is_sharded_run, load_base_config

__all__ = ["RecipeRun"]


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
        trainer = self.trainer
        trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
        rows = [
            ("results", str(Path(trainer.args.output_dir).resolve())),
            ("trained", f"{trainable:,} weights, {trainer.state.global_step} steps, {self._train_seconds:.0f} s"),
        ]
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if logged:
            rows.append(("training loss", f"{logged[0]:.4f} first logged, {logged[-1]:.4f} last"))
        if self._losses:
            rows.append(("held-out loss", ", ".join(self._losses)))
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

# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft train`: adapters from a recipe."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from frozen_peft.adapters import require_no_pickle
from frozen_peft.cli.errors import reported
from frozen_peft.cli.memory_check import MemoryCheck
from frozen_peft.cli.run_record import RunRecord
from frozen_peft.cli.training import (
    build_trainer,
    is_sharded_run,
    load_base_config,
    load_held_out,
    make_parser,
    require_sources,
    resolve_demo,
)
from frozen_peft.training.checkpoints import checkpoint_to_resume, require_no_way_out
from frozen_peft.training.sft import FrozenContextTrainer

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Trains, evaluates before and after where there is held-out data, saves, and prints what happened.

    Args:
        arguments: Command-line arguments after `train`.

    Raises:
        CommandError: A field, file, model or dataset cannot be used.
    """
    parser = make_parser()
    if not arguments or set(arguments) & {"-h", "--help", "--help-all"}:
        print(parser.help(every_field="--help-all" in arguments))
        return
    with reported():
        model, data, adapter, config, report = parser.parse(arguments)
        require_sources(model, data)
    with reported(raised_in="frozen_peft"):
        resolve_demo(model, data)
    with reported():
        require_no_way_out(config.output_dir)
        checkpoint = checkpoint_to_resume(_as_wanted(config.resume_from_checkpoint), config.output_dir)
        for folder in (model.model_name_or_path, checkpoint):
            if folder is not None and not model.allow_pickle:
                require_no_pickle(folder)
        check = MemoryCheck(load_base_config(model, config), model, adapter, config)
        check.before_loading()
        trainer = build_trainer(model, data, adapter, config)
        check.before_training(trainer)
        record = RunRecord(trainer, report, parser.given(arguments))
        record.begin()
    with reported(raised_in="frozen_peft"):
        # A run that goes on from a checkpoint has no loss before training to show, and before it begins transformers
        # 5.23 evaluates no model of DeepSpeed's but ZeRO-3's.
        before = None if checkpoint or is_sharded_run("DEEPSPEED") else _evaluate(trainer, "eval_before")
        start = time.monotonic()
        trainer.train(resume_from_checkpoint=checkpoint)
        train_seconds = time.monotonic() - start
        record.trained()
        after = _evaluate(trainer, "eval")
    trainer.save_model()
    trainer.save_state()
    with reported(raised_in="frozen_peft"):
        page = record.end(lambda: load_held_out(data, config))
    if trainer.is_world_process_zero():
        print(_summary(trainer, train_seconds, before, after, page))


def _evaluate(trainer: FrozenContextTrainer, name: str) -> float | None:
    """Returns the held-out loss and writes all metrics to `{name}_results.json`; None without held-out samples."""
    if trainer.eval_dataset is None:
        return None
    metrics = trainer.evaluate()
    trainer.save_metrics(name, metrics, combined=False)
    return metrics["eval_loss"]


def _as_wanted(value: str | None) -> str | bool | None:
    """Reads `resume_from_checkpoint`: a folder, `auto`, true or false."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _summary(
    trainer: FrozenContextTrainer,
    train_seconds: float,
    before: float | None,
    after: float | None,
    page: Path | None,
) -> str:
    """Says where the results are and what changed, in aligned lines."""
    rows = [("results", str(Path(trainer.args.output_dir).resolve()))]
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    rows.append(("trained", f"{trainable:,} weights, {trainer.state.global_step} steps, {train_seconds:.0f} s"))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if logged:
        rows.append(("training loss", f"{logged[0]:.4f} first logged, {logged[-1]:.4f} last"))
    if after is not None:
        rows.append(
            ("held-out loss", f"{after:.4f} after" if before is None else f"{before:.4f} before, {after:.4f} after")
        )
    if torch.cuda.is_available():
        rows.append(("peak memory", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"))
    if page is not None:
        rows.append(("report", str(page.resolve())))
    width = max(len(title) for title, _ in rows)
    return "\n" + "\n".join(f"  {title:<{width}}  {text}" for title, text in rows)

# SPDX-License-Identifier: Apache-2.0
"""Training that goes on after it was killed as if it had not been: what a checkpoint takes beyond the parent's."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from frozen_peft.training.checkpoints import UNFINISHED, clear_unfinished, publish_checkpoint, settle_best

__all__ = ["Memory", "read_history", "save_whole_checkpoint"]

logger = logging.get_logger(__name__)

# In a checkpoint, what each process kept of earlier steps.
_HISTORY = "history_{process}.json"


class Memory(Protocol):
    """What a trainer keeps of earlier steps."""

    def forget(self) -> None:
        """Drops what is not in a checkpoint."""

    def record(self) -> dict[str, Any] | None:
        """What has to be known to go on in the same way, for JSON; None: nothing."""

    def restore(self, record: dict[str, Any]) -> None:
        """Goes on with what `record` gave.

        Raises:
            ValueError: It did not give this.
        """


def save_whole_checkpoint(trainer: Trainer, save: Callable[[], None], run_dir: Path) -> Path:
    """Has a checkpoint written in a hidden folder, which gets its name when all processes are done.

    Args:
        trainer: A `FrozenContextMixin`.
        save: Writes the checkpoint where `_part_dir` says.
        run_dir: Folder of the run, or of one trial of a search.

    Returns:
        Where it is.
    """
    args, state, accelerator = trainer.args, trainer.state, trainer.accelerator
    final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    part = run_dir / UNFINISHED / final.name
    if args.should_save:
        clear_unfinished(run_dir)
    accelerator.wait_for_everyone()
    trainer._part_dir = part.parent
    try:
        save()
    finally:
        trainer._part_dir = None
    if not args.save_only_model:
        _write_history(part, args.process_index, trainer._memories)
    if args.should_save:
        settle_best(state, run_dir)
        state.save_to_json(str(part / "trainer_state.json"))
    accelerator.wait_for_everyone()
    if args.should_save:
        publish_checkpoint(part, final, resumable=not args.save_only_model)
    accelerator.wait_for_everyone()
    # On a disk of its own, a node holds the random states of its processes.
    if args.local_process_index == 0 and part.is_dir():
        publish_checkpoint(part, final, resumable=not args.save_only_model)
    if args.should_save:
        clear_unfinished(run_dir)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
            use_mtime=True,
        )
    return final


def _write_history(folder: Path, process: int, memories: Mapping[str, Memory]) -> None:
    records = {name: memory.record() for name, memory in memories.items()}
    history = {name: record for name, record in records.items() if record is not None}
    if history:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _HISTORY.format(process=process)
        path.write_text(json.dumps(history) + "\n", encoding="utf-8")


def read_history(folder: Path, process: int, memories: Mapping[str, Memory]) -> None:
    """Goes on with what was kept of the steps before a checkpoint."""
    path = folder / _HISTORY.format(process=process)
    if not path.is_file():
        return
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        for name, memory in memories.items():
            if name in history:
                memory.restore(history[name])
    except (ValueError, AttributeError, TypeError) as error:
        logger.warning(
            f"{path} is passed over ({error}): what the run had kept is encoded anew, and the same up to rounding."
        )

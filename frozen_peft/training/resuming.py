# SPDX-License-Identifier: Apache-2.0
"""Training that goes on after it was killed as if it had not been."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from frozen_peft.training.checkpoints import (
    UNFINISHED,
    checkpoint_to_resume,
    clear_unfinished,
    publish_checkpoint,
    require_no_way_out,
    settle_best,
    whole_files,
)
from frozen_peft.training.memory_advice import AdvisedTrainer

__all__ = ["ResumableTrainer"]

logger = logging.get_logger(__name__)

# In a checkpoint, what each process kept of earlier steps.
_HISTORY = "history_{process}.json"


class ResumableTrainer(AdvisedTrainer):
    """`SFTTrainer` whose checkpoints are there whole or not at all, and from which a run ends as it would have.

    Everything is inherited but these hooks, which add to the parent's:

    - `train` chooses the checkpoint (`checkpoint_to_resume`) and refuses a folder with a way out.
    - `_save_checkpoint`, with `_get_output_dir`, has the checkpoint written in a hidden folder, and
      `_push_from_checkpoint` uploads it when it has its name.
    - `_save` writes a model so that each of its files appears whole.
    - `_run_epoch` does not train a run further that had ended.
    - `evaluation_loop` leaves the random state as it is.

    A subclass says in `_forget_history` what it remembers of earlier steps, in `_history` and `_restore_history` what
    of that a run has to know that goes on from here, and in `_write_model` what else it saves.
    """

    # Where a checkpoint is being written; None: nowhere.
    _part_dir: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's, from the checkpoint that `checkpoint_to_resume` chooses."""
        require_no_way_out(self.args.output_dir)
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            self._read_history(Path(checkpoint))
        return super().train(checkpoint, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, which draws a random number for each dataloader.

        A run that goes on from a checkpoint may not evaluate where the first one did: before training, or at the end
        of the epoch whose last step saved the checkpoint.
        """
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            return super().evaluation_loop(*args, **kwargs)

    def _forget_history(self) -> None:
        """Drops what was kept of earlier steps and is not in a checkpoint."""

    def _history(self) -> dict[str, Any]:
        """What is kept of earlier steps and has to be known to go on in the same way, for JSON."""
        return {}

    def _restore_history(self, history: dict[str, Any]) -> None:
        """Goes on with what `_history` said.

        Raises:
            ValueError: It did not say this.
        """

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # transformers 5.23 takes one more step when it goes on from the last checkpoint of a run whose `max_steps` end
        # within an epoch.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._part_dir is None else str(self._part_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # The run that goes on from this checkpoint has no more than what is in it; so neither has this one.
        self._forget_history()
        run_dir = Path(super()._get_output_dir(trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        part = run_dir / UNFINISHED / final.name
        if self.args.should_save:
            clear_unfinished(run_dir)
        self.accelerator.wait_for_everyone()
        self._part_dir = part.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._part_dir = None
        self._write_history(part)
        if self.args.should_save:
            settle_best(self.state, run_dir)
            self.state.save_to_json(str(part / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(part, final, resumable=not self.args.save_only_model)
        self.accelerator.wait_for_everyone()
        # On a disk of its own, a node holds the random states of its processes.
        if self.args.local_process_index == 0 and part.is_dir():
            publish_checkpoint(part, final, resumable=not self.args.save_only_model)
        if self.args.should_save:
            clear_unfinished(run_dir)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _write_history(self, folder: Path) -> None:
        history = self._history()
        if history and not self.args.save_only_model:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _HISTORY.format(process=self.args.process_index)
            path.write_text(json.dumps(history) + "\n", encoding="utf-8")

    def _read_history(self, folder: Path) -> None:
        path = folder / _HISTORY.format(process=self.args.process_index)
        if not path.is_file():
            return
        try:
            self._restore_history(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, AttributeError, TypeError) as error:
            logger.warning(
                f"{path} is passed over ({error}): what the run had kept is encoded anew, and the same up to rounding."
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # It uploads in the background, so not from a folder that is about to be renamed.
        if self._part_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self._part_dir is not None or not self.args.should_save:
            self._write_model(folder, state_dict)
            return
        with whole_files(folder) as part:
            self._write_model(part, state_dict)

    def _write_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Writes the model and what belongs to it, in a folder in which nobody looks yet."""
        super()._save(str(folder), state_dict)

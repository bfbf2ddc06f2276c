# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are there whole or not at all, and which of them a run goes on from.

1. transformers 5.23 writes a checkpoint file by file under its final name, and reads what it finds there: of a run
   that was killed meanwhile, half a checkpoint would be the last one, and an optimizer that is missing would begin
   anew without a word. Here a checkpoint is written in the hidden folder `.unfinished` of the run.
2. When every process has written its part, the main one lists all files with their sizes in `whole.json`, syncs them
   to the disk and renames the folder. Only then older checkpoints go.
3. A folder that lacks a listed file, or has one of another size, is no checkpoint any more: removing one takes many
   steps too, and disks lose what was not synced.
4. What a trainer keeps of earlier steps, frozen contexts for one, is recorded too (`history_*.json`), so that a run
   that was killed goes on as if it had not been.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from frozen_peft.utils.files import sync

__all__ = [
    "AUTO",
    "MANIFEST",
    "UNFINISHED",
    "checkpoint_to_resume",
    "last_whole_checkpoint",
    "read_history",
    "require_no_way_out",
    "save_whole_checkpoint",
    "whole_files",
    "why_not_whole",
]

logger = logging.get_logger(__name__)

# The last whole checkpoint of the output directory, if there is one.
AUTO = "auto"
MANIFEST = "whole.json"
UNFINISHED = ".unfinished"
_STATE = "trainer_state.json"
# What each process kept of earlier steps.
_HISTORY = "history_{process}.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# What a run writes to under the name that is there, in its folder or in that of one trial of a search: checkpoints in
# the making, logs, and files that TRL, transformers (5.23) and its callbacks open. All else gets its name by renaming.
_WRITTEN_IN_PLACE = re.compile(
    rf"(?:run-[^/]*/)?(?:{re.escape(UNFINISHED)}|run-[^/]*|runs|completions|README\.md|trainer_state\.json"
    r"|[^/]*_results\.json|emissions\.csv)"
)


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
        _clear_unfinished(run_dir)
    accelerator.wait_for_everyone()
    trainer._part_dir = part.parent
    try:
        save()
    finally:
        trainer._part_dir = None
    if not args.save_only_model:
        _write_history(part, args.process_index, trainer._memories)
    if args.should_save:
        # The best one, as it will be found.
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and (best.is_dir() or best == final):
            state.best_model_checkpoint = str(best)
        state.save_to_json(str(part / _STATE))
    accelerator.wait_for_everyone()
    if args.should_save:
        _publish(part, final, resumable=not args.save_only_model)
    accelerator.wait_for_everyone()
    # On a disk of its own, a node holds the random states of its processes.
    if args.local_process_index == 0 and part.is_dir():
        _publish(part, final, resumable=not args.save_only_model)
    if args.should_save:
        _clear_unfinished(run_dir)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
            use_mtime=True,
        )
    return final


def _publish(part: Path, final: Path, *, resumable: bool) -> None:
    """Gives a checkpoint its name, once all of it is written.

    Args:
        part: Where it was written, on the same file system.
        final: Its name. What has it already is replaced.
        resumable: Optimizer, scheduler and random state are part of it.
    """
    sizes = {str(path.relative_to(part)): path.stat().st_size for path in sorted(part.rglob("*")) if path.is_file()}
    text = json.dumps({"resumable": resumable, "files": sizes}, indent=2)
    (part / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for path in part.rglob("*"):
        sync(path)
    sync(part)
    if os.path.lexists(final):
        # A folder cannot be renamed onto one that holds something.
        old = part.with_name(f"{final.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    part.rename(final)
    sync(final.parent)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A hidden folder to write files to, each of which appears in `folder`, whole, when the block ends.

    What has a file's name already is replaced, and so is a link in place of its folder, which may lead anywhere.
    Weights come last, after what describes them.
    """
    _clear_unfinished(folder)
    part = folder / UNFINISHED / "files"
    part.mkdir(parents=True)
    try:
        yield part
        written = [path for path in part.rglob("*") if path.is_file()]
        for path in sorted(written, key=lambda path: (path.suffix == ".safetensors", path)):
            sync(path)
            target = folder / path.relative_to(part)
            for parent in list(path.relative_to(part).parents)[-2::-1]:
                if (folder / parent).is_symlink():
                    (folder / parent).unlink()
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        _clear_unfinished(folder)


def _clear_unfinished(folder: Path) -> None:
    """Removes what this run, or one that was killed, has begun to write in a folder."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def require_no_way_out(folder: str | Path) -> None:
    """Refuses a run folder with a link through which the run would write elsewhere: it may have come from anywhere.

    What is only read, such as checkpoints that lie on another disk, may be behind links.

    Raises:
        ValueError: There is such a link.
    """
    inside = Path(folder).resolve()
    for path in Path(folder).rglob("*"):
        is_written = _WRITTEN_IN_PLACE.fullmatch(path.relative_to(folder).as_posix())
        if is_written and path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise ValueError(
                f"`output_dir`: {path} leads to {path.readlink()}, outside of {folder}, and a run that writes there "
                "would change that. Remove it or name another folder."
            )


def checkpoint_to_resume(wanted: str | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint folder that a run goes on from.

    Args:
        wanted: A folder; True for the last whole checkpoint of `output_dir`; `"auto"` for the same if there is one;
            None or False for none.
        output_dir: Of the run.

    Returns:
        The folder; None to start anew.

    Raises:
        ValueError: It is not there, or not whole; or True is given, and there is none.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True or wanted == AUTO:
        last = last_whole_checkpoint(Path(output_dir))
        if last is None and wanted is True:
            raise ValueError(
                f"`resume_from_checkpoint` is true, and {output_dir} has no whole checkpoint. Name one, or resume "
                f"with `{AUTO}`, which starts anew where there is none."
            )
        if last is None:
            logger.warning(f"{output_dir} has no whole checkpoint: training starts anew.")
            return None
        logger.info(f"Resuming from {last}.")
        return str(last)
    folder = Path(wanted)
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint`: there is no folder {folder} (looked in {Path.cwd()}).")
    if not (folder / MANIFEST).is_file() and (folder / _STATE).is_file():
        logger.warning(f"{folder} has no {MANIFEST}, so nothing tells whether it is whole; it is read as it is.")
    elif problem := why_not_whole(folder):
        raise ValueError(f"`resume_from_checkpoint`: {folder} cannot be resumed from: {problem}. Name another one.")
    return str(folder)


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint with the most steps that can be resumed from; None where there is none.

    Names those with more steps that cannot.
    """
    steps = {}
    if output_dir.is_dir():
        named = ((_NAME.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir())
        steps = {path: int(match[1]) for match, path in named if match}
    for path in sorted(steps, key=lambda path: -steps[path]):
        problem = why_not_whole(path)
        if problem is None:
            return path
        logger.warning(f"{path} is passed over: {problem}.")
    return None


def why_not_whole(folder: Path) -> str | None:
    """Says what keeps a folder from being a checkpoint that a run can go on from; None where nothing does."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes, resumable = dict(manifest["files"]), bool(manifest["resumable"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
    if not resumable:
        return "it holds the model alone (`save_only_model`)"
    return None if _STATE in sizes else f"its file {_STATE} is missing"


def _write_history(folder: Path, process: int, memories: Mapping[str, Any]) -> None:
    records = {name: memory.record() for name, memory in memories.items()}
    history = {name: record for name, record in records.items() if record is not None}
    if history:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _HISTORY.format(process=process)
        path.write_text(json.dumps(history) + "\n", encoding="utf-8")


def read_history(folder: Path, process: int, memories: Mapping[str, Any]) -> None:
    """Has those that keep something of earlier steps go on with what a checkpoint says of it."""
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

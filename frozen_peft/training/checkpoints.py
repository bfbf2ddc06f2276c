# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are there whole or not at all, and which of them a run goes on from.

1. transformers 5.23 writes a checkpoint file by file under its final name, and reads what it finds there: of a run
   that was killed meanwhile, half a checkpoint would be the last one, and an optimizer that is missing would begin
   anew without a word. Here a checkpoint is written in the hidden folder `.unfinished` of the run.
2. When every process has written its part, the main one lists all files with their sizes in `whole.json`, syncs them
   to the disk and renames the folder. Only then older checkpoints go.
3. A folder that lacks a listed file, or has one of another size, is no checkpoint any more: removing one takes many
   steps too, and disks lose what was not synced.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from frozen_peft.utils.files import sync

__all__ = [
    "AUTO",
    "MANIFEST",
    "UNFINISHED",
    "checkpoint_to_resume",
    "clear_unfinished",
    "last_whole_checkpoint",
    "publish_checkpoint",
    "require_no_way_out",
    "settle_best",
    "whole_files",
    "why_not_whole",
]

logger = logging.get_logger(__name__)

# The last whole checkpoint of the output directory, if there is one.
AUTO = "auto"
MANIFEST = "whole.json"
UNFINISHED = ".unfinished"
_STATE = "trainer_state.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# What a run writes to under the name that is there, in its folder or in that of one trial of a search: checkpoints in
# the making, logs, and files that TRL, transformers (5.23) and its callbacks open. All else gets its name by renaming.
_WRITTEN_IN_PLACE = re.compile(
    rf"(?:run-[^/]*/)?(?:{re.escape(UNFINISHED)}|run-[^/]*|runs|completions|README\.md|trainer_state\.json"
    r"|[^/]*_results\.json|emissions\.csv)"
)


def publish_checkpoint(part: Path, final: Path, *, resumable: bool) -> None:
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
    clear_unfinished(folder)
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
        clear_unfinished(folder)


def clear_unfinished(folder: Path) -> None:
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


def settle_best(state: TrainerState, run_dir: Path) -> None:
    """Has the state name the best checkpoint as it will be found in `run_dir`."""
    if not state.best_global_step:
        return
    best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if best.is_dir() or state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(best)

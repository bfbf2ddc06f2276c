# SPDX-License-Identifier: Apache-2.0
"""A folder that appears under its name when it is whole, and not before."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frozen_peft.utils.files import sync

__all__ = ["require_free", "require_space", "whole_folder"]


def require_free(output: Path) -> None:
    """Refuses a folder that holds something.

    Raises:
        FileExistsError: It is there and not an empty folder.
        FileNotFoundError: The folder it is to be in is not there.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise FileExistsError(f"{output} is there already and not an empty folder. Remove it or name another one.")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.absolute().parent} to write {output.name} to.")


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuses to start what the disk cannot hold.

    Raises:
        OSError: Fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{folder} has {free / 1e9:.2f} GB free, and {num_bytes / 1e9:.2f} GB are to be written. Free some, or "
            "write elsewhere."
        )


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` to write to, which gets its name when the block ends.

    It is removed where the block fails. One that a killed process has left is removed first; so nothing that is
    found under `output` is ever a part of something.

    Raises:
        FileExistsError: `output` holds something, another process is writing it, or what has the hidden folder's name
            is no folder.
    """
    output = output.absolute()
    require_free(output)
    part = output.parent / f".{output.name}.unfinished"
    # The lock of a process that is killed goes with it.
    handle = _open(part)
    try:
        _lock(handle, part, output)
        try:
            _clear(part)
            yield part
            for path in part.rglob("*"):
                sync(path)
            sync(part)
            require_free(output)
            part.rename(output)
            sync(output.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _open(part: Path) -> int:
    """Opens the folder, made where it is missing; never what a link leads to, whose content would be cleared."""
    try:
        part.mkdir(exist_ok=True)
        return os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if part.is_symlink() or (part.exists() and not part.is_dir()):
            raise FileExistsError(f"{part} is in the way: it is no folder. Remove it.") from error
        raise


def _lock(handle: int, part: Path, output: Path) -> None:
    """Locks the folder, which another process may have renamed or removed since it was opened."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        still_there = part.exists() and os.path.samestat(part.stat(), os.fstat(handle))
    except BlockingIOError:
        still_there = False
    if not still_there:
        raise FileExistsError(f"Another process is writing {output} just now.")


def _clear(part: Path) -> None:
    for path in part.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

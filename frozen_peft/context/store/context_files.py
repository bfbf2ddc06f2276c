# SPDX-License-Identifier: Apache-2.0
"""Encoded contexts as files in a directory that several processes may share.

1. An entry is written whole, in a temporary directory beside its place, and then moved there in one step. Whoever is
   killed meanwhile leaves a temporary directory, which is never read and is removed at a later start.
2. An entry is believed only when its checksum is right. Files therefore need not be synced to the device: what a power
   failure leaves is recognised.
3. What is not a whole entry is reported, removed and missing from then on, so that it is encoded again.
4. The first failure to write ends writing, not reading: a run goes on without the disk.
"""

import errno
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from frozen_peft.context.keys import PrefixKey
from frozen_peft.context.store.entry_file import read_entry, write_entry

__all__ = ["ContextFiles"]

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
# What a writer that was killed leaves: its process id and what `tempfile` adds. Younger ones may still be written to.
TEMPORARY = re.compile(r"[0-9]+-[a-z0-9_]+\.tmp")
TEMPORARY_SECONDS = 3600


class ContextFiles:
    """Named tensors with metadata in files `<folder>/<namespace>/<num_tokens>-<digest>.safetensors`.

    A namespace, a plain file name, keeps apart what other models or settings encoded. Faults of the disk are
    warnings, never exceptions: an entry that cannot be had is a miss. Methods may be called from several threads.

    Attributes:
        usable: Entries can be written; False once that failed.

    Args:
        folder: Created where it does not exist.
        field: The configuration's field that names it, for messages.
    """

    def __init__(self, folder: str | Path, *, field: str = "context_cache_dir") -> None:
        self._field = field
        self.folder = Path(folder)
        self.usable = True
        self._reported: set[Path] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._stop_writing(error)
        self._remove_abandoned()

    def keys(self, namespace: str) -> set[PrefixKey]:
        """Keys of the entries that are there now, without a look into them."""
        found = set()
        for key, item in self._listed(namespace):
            path = Path(item.path)
            if item.is_dir(follow_symlinks=False):
                self._report_once(path, "it is a directory")
            elif item.is_file(follow_symlinks=False) and path not in self._reported:
                found.add(key)
        return found

    def num_bytes(self, namespace: str) -> int:
        """Bytes that a namespace's entries take on the disk."""
        total = 0
        for _, item in self._listed(namespace):
            with suppress(FileNotFoundError):
                if item.is_file(follow_symlinks=False):
                    total += item.stat(follow_symlinks=False).st_size
        return total

    def read(self, namespace: str, key: PrefixKey) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        """An entry's tensors, in the CPU's memory and nobody else's, and its metadata.

        Returns:
            None where there is no such entry, or none that is whole.
        """
        path = self._path(namespace, key)
        try:
            return read_entry(path, _entry_name(namespace, key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._report_once(path, f"it cannot be read ({error.strerror or error})")
        except ValueError as error:
            self._reject(path, str(error))
        return None

    def write(
        self, namespace: str, key: PrefixKey, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
    ) -> bool:
        """Writes an entry, in place of one that is there.

        Args:
            namespace: Where it belongs.
            key: What it encodes.
            tensors: On any device. None may overlap another in memory.
            metadata: Whatever else a reader needs.

        Returns:
            Whether it is there now.

        Raises:
            RuntimeError: Tensors overlap in memory.
        """
        if not self.usable:
            return False
        path = self._path(namespace, key)
        try:
            if path.is_dir():
                self._report_once(path, "it is a directory")
                return False
            with self._temporary(path.parent) as temporary:
                written = Path(temporary) / path.name
                write_entry(written, _entry_name(namespace, key), tensors, metadata)
                # safetensors lets the owner alone read it; the directory says who may.
                written.chmod(path.parent.stat().st_mode & 0o666)
                written.replace(path)
        except (OSError, SafetensorError) as error:
            self._stop_writing(error)
            return False
        self._reported.discard(path)
        return True

    def remove(self, namespace: str, key: PrefixKey) -> None:
        """Removes an entry, if it is there."""
        path = self._path(namespace, key)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            self._report_once(path, f"it cannot be removed ({error.strerror})")

    def _temporary(self, parent: Path) -> tempfile.TemporaryDirectory:
        for _ in range(3):
            parent.mkdir(parents=True, exist_ok=True)
            # Another process may have removed the empty directory in between.
            with suppress(FileNotFoundError):
                return tempfile.TemporaryDirectory(
                    prefix=f"{os.getpid()}-", suffix=".tmp", dir=parent, ignore_cleanup_errors=True
                )
        raise FileNotFoundError(errno.ENOENT, "its directory is removed again and again", str(parent))

    def remove_empty(self, namespace: str) -> None:
        """Removes a namespace's directory if nothing is in it."""
        with suppress(OSError):
            (self.folder / namespace).rmdir()

    def _path(self, namespace: str, key: PrefixKey) -> Path:
        assert re.fullmatch(r"\w[\w.-]*", namespace), f"{namespace!r} is not a plain file name"
        return self.folder / namespace / f"{key}{SUFFIX}"

    def _listed(self, namespace: str) -> Iterator[tuple[PrefixKey, os.DirEntry]]:
        """What has the name of an entry, be it one or not."""
        try:
            with os.scandir(self.folder / namespace) as items:
                for item in items:
                    key = PrefixKey.from_text(item.name.removesuffix(SUFFIX))
                    if key is not None and item.name.endswith(SUFFIX):
                        yield key, item
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            self._report_once(self.folder / namespace, f"it cannot be listed ({error.strerror})")

    def _remove_abandoned(self) -> None:
        # Another process may be removing them as well, or own them.
        with suppress(OSError):
            for path in self.folder.glob("*/*.tmp"):
                if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > TEMPORARY_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)

    def _stop_writing(self, error: Exception) -> None:
        if self.usable:
            self.usable = False
            logger.warning(
                "`%s` cannot be written: %s (%s). No more is kept there by this run; what is there is still read.",
                self._field,
                self.folder,
                error,
            )

    def _reject(self, path: Path, reason: str) -> None:
        try:
            path.unlink()
        except FileNotFoundError:
            return  # another process met it too, and reports it
        except OSError as error:
            self._report_once(path, f"{reason}, and it cannot be removed ({error.strerror})")
        else:
            logger.warning("%s is removed, because %s. What it held is computed again.", path, reason)

    def _report_once(self, path: Path, reason: str) -> None:
        """Reports what stays where it is and is no entry from now on."""
        if path not in self._reported:
            self._reported.add(path)
            logger.warning("%s is left alone and not used: %s.", path, reason)


def _entry_name(namespace: str, key: PrefixKey) -> str:
    return f"{namespace}/{key}"

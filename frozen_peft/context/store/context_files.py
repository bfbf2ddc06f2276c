# SPDX-License-Identifier: Apache-2.0
"""Encoded contexts as files in a directory that several processes may share.

1. An entry is one safetensors file with a checksum of all that it holds, and the name of what it is.
2. It is written whole, in a temporary directory beside its place, and then moved there in one step. Whoever is killed
   meanwhile leaves a temporary directory, which is never read and is removed at a later start.
3. An entry is believed only when its checksum is right. Files therefore need not be synced to the device: what a power
   failure leaves is recognised.
4. What is not a whole entry is reported, removed and missing from then on, so that it is encoded again.
5. The first failure to write ends writing, not reading: a run goes on without the disk.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from frozen_peft.context.keys import PrefixKey

__all__ = ["ContextFiles"]

logger = logging.getLogger(__name__)

FORMAT = "frozen_peft.context"
VERSION = "1"
SUFFIX = ".safetensors"
# What a writer that was killed leaves: its process id and what `tempfile` adds. Younger ones may still be written to.
TEMPORARY = re.compile(r"[0-9]+-[a-z0-9_]+\.tmp")
TEMPORARY_SECONDS = 3600

Tensors = dict[str, torch.Tensor]


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
        return {key for key, path in self._listed(namespace).items() if path not in self._reported}

    def num_bytes(self, namespace: str) -> int:
        """Bytes that a namespace's entries take on the disk."""
        total = 0
        for path in self._listed(namespace).values():
            with suppress(OSError):
                total += path.stat().st_size
        return total

    def read(self, namespace: str, key: PrefixKey) -> tuple[Tensors, dict[str, str]] | None:
        """An entry's tensors, in the CPU's memory and nobody else's, and its metadata.

        Returns:
            None where there is no such entry, or none that is whole.
        """
        path = self._path(namespace, key)
        try:
            return _read_entry(path, f"{namespace}/{key}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._report_once(path, f"it cannot be read ({error.strerror or error})")
        except ValueError as error:
            self._reject(path, str(error))
        return None

    def write(self, namespace: str, key: PrefixKey, tensors: Tensors, metadata: dict[str, str]) -> bool:
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
            with self._temporary(path.parent) as temporary:
                written = Path(temporary) / path.name
                _write_entry(written, f"{namespace}/{key}", tensors, metadata)
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

    def remove_empty(self, namespace: str) -> None:
        """Removes a namespace's directory if nothing is in it."""
        with suppress(OSError):
            (self.folder / namespace).rmdir()

    def _temporary(self, parent: Path) -> tempfile.TemporaryDirectory:
        prefix = f"{os.getpid()}-"
        parent.mkdir(parents=True, exist_ok=True)
        try:
            return tempfile.TemporaryDirectory(".tmp", prefix, parent, ignore_cleanup_errors=True)
        except FileNotFoundError:
            # Another process has removed the empty directory in between.
            parent.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryDirectory(".tmp", prefix, parent, ignore_cleanup_errors=True)

    def _path(self, namespace: str, key: PrefixKey) -> Path:
        assert re.fullmatch(r"\w[\w.-]*", namespace), f"{namespace!r} is not a plain file name"
        return self.folder / namespace / f"{key}{SUFFIX}"

    def _listed(self, namespace: str) -> dict[PrefixKey, Path]:
        """What has the name of an entry, be it one or not."""
        try:
            paths = list((self.folder / namespace).glob(f"*{SUFFIX}"))
        except OSError as error:
            self._report_once(self.folder / namespace, f"it cannot be listed ({error.strerror})")
            return {}
        return {key: path for path in paths if (key := PrefixKey.from_text(path.stem)) is not None}

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


def _write_entry(path: Path, entry: str, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes tensors, on any device, to a file that knows which entry it is."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(metadata, sort_keys=True)
    stamp = {"format": FORMAT, "version": VERSION, "entry": entry, "metadata": text}
    save_file(packed, path, metadata=stamp | {"checksum": _checksum(packed, text)})


def _read_entry(path: Path, entry: str) -> tuple[Tensors, dict[str, str]]:
    """Reads tensors, into the CPU's memory, and metadata.

    Raises:
        ValueError: The file is not whole, or not that entry; the message says why.
        OSError: There is no such file, or it cannot be read.
    """
    try:
        with path.open("rb") as held, safe_open(_name_of(held, path), "pt") as file:
            stamp = file.metadata() or {}
            if (stamp.get("format"), stamp.get("version")) != (FORMAT, VERSION):
                raise ValueError("it is no encoded context that this version wrote")
            if stamp.get("entry") != entry:
                raise ValueError(f"it holds {stamp.get('entry')} and not {entry}")
            # Copies, since the library maps the file and another process may remove it. Copying, unlike reading the
            # file's bytes, lets other threads run.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it is no whole safetensors file ({error})") from None
    if stamp.get("checksum") != _checksum(tensors, stamp.get("metadata")):
        raise ValueError("its checksum is wrong")
    return tensors, json.loads(stamp["metadata"])


def _name_of(file: BinaryIO, path: Path) -> str:
    """A name of this very file, also after another one has taken its place, where the system has such names.

    safetensors 0.8 opens a file twice, and would read the header of one and the tensors of the other.
    """
    name = Path(f"/dev/fd/{file.fileno()}")
    return str(name if name.exists() else path)


def _checksum(tensors: Tensors, metadata: object) -> str:
    """XXH3 of 128 bits over the metadata and the tensors' names, types, shapes and bytes."""
    names = sorted(tensors)
    described = [metadata, [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]]
    state = xxhash.xxh3_128(json.dumps(described).encode())
    for name in names:
        # As bytes, because NumPy has no bfloat16.
        state.update(tensors[name].view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()

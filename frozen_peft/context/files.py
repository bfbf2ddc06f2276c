# SPDX-License-Identifier: Apache-2.0
"""Encoded contexts as safetensors files in a directory that several processes may share.

1. An entry is written whole, in a temporary directory beside its place, and then moved there in one step. Whoever is
   killed meanwhile leaves a temporary directory, which is never read and removed at a later start.
2. An entry carries a checksum of all that it holds and is believed only when that is right. Files therefore need not
   be synced to the device: what a power failure leaves is recognised.
3. What is not a whole entry is reported, removed and missing from then on, so that it is encoded again.
4. The first failure to write ends writing, not reading: a run goes on without the disk.

Files are written by safetensors, and any of its readers reads them. Here they are read into tensors of our own. Its
two readers do not fit: one maps the file, and a file that another process cuts off, or deletes over a network, then
kills the run with a signal; the other copies everything while it keeps all other threads of Python waiting, and needs
twice the memory.
"""

import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from frozen_peft.context.keys import PrefixKey

__all__ = ["ContextFiles"]

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
FORMAT = "frozen_peft.context"
VERSION = "1"
# The limit of the safetensors format itself.
MAX_HEADER_BYTES = 100_000_000
# What a writer that was killed leaves: its process id and what `tempfile` adds. Younger ones may still be written to.
TEMPORARY = re.compile(r"[0-9]+-[a-z0-9_]+\.tmp")
TEMPORARY_SECONDS = 3600
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class ContextFiles:
    """Named tensors with metadata in files `<folder>/<namespace>/<num_tokens>-<digest>.safetensors`.

    A namespace, a plain file name, keeps apart what other models or settings encoded. Faults of the disk are
    warnings, never exceptions: an entry that cannot be had is a miss. Methods may be called from several threads.

    Attributes:
        usable: Entries can be written; False once that failed.

    Args:
        folder: Created where it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
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
            if not item.is_file():
                self._report_once(path, "it is not a file")
            elif path not in self._reported:
                found.add(key)
        return found

    def num_bytes(self, namespace: str) -> int:
        """Bytes that a namespace's entries take on the disk."""
        total = 0
        for _, item in self._listed(namespace):
            with suppress(FileNotFoundError):
                total += item.stat().st_size if item.is_file() else 0
        return total

    def read(self, namespace: str, key: PrefixKey) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        """An entry's tensors, in the CPU's memory and nobody else's, and its metadata.

        Returns:
            None where there is no such entry, or none that is whole.
        """
        path = self._path(namespace, key)
        try:
            with path.open("rb") as file:
                return _read_entry(file, _entry_name(namespace, key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._report_once(path, f"it cannot be read ({error.strerror})")
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
            tensors: On any device. No two may share memory.
            metadata: Whatever else a reader needs.

        Returns:
            Whether it is there now.

        Raises:
            ValueError: A tensor has a type that entries cannot hold.
        """
        if not self.usable:
            return False
        _check_dtypes(tensors)
        path = self._path(namespace, key)
        if path.is_dir():
            self._report_once(path, "it is not a file")
            return False
        packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        stamp = _stamp(_entry_name(namespace, key), packed, metadata)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                prefix=f"{os.getpid()}-", suffix=".tmp", dir=path.parent, ignore_cleanup_errors=True
            ) as temporary:
                written = Path(temporary) / path.name
                save_file(packed, written, metadata=stamp)
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
        for path in self.folder.glob("*/*.tmp"):
            # Another process may be removing it as well, or own it.
            with suppress(OSError):
                old = time.time() - path.stat().st_mtime > TEMPORARY_SECONDS
                if old and TEMPORARY.fullmatch(path.name):
                    shutil.rmtree(path)

    def _stop_writing(self, error: Exception) -> None:
        if self.usable:
            self.usable = False
            logger.warning(
                "`context_cache_dir` cannot be written: %s (%s). No more contexts are kept there by this run; those "
                "that are there are still read.",
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
            logger.warning("%s is removed, because %s. Its context is encoded again.", path, reason)

    def _report_once(self, path: Path, reason: str) -> None:
        """Reports what stays where it is and is no entry from now on."""
        if path not in self._reported:
            self._reported.add(path)
            logger.warning("%s is left alone and not used: %s.", path, reason)


def _entry_name(namespace: str, key: PrefixKey) -> str:
    return f"{namespace}/{key}"


def _stamp(entry: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """The metadata that safetensors writes."""
    text = json.dumps(metadata, sort_keys=True)
    return {
        "format": FORMAT,
        "version": VERSION,
        "entry": entry,
        "metadata": text,
        "checksum": _checksum(tensors, text),
    }


def _checksum(tensors: dict[str, torch.Tensor], metadata: str) -> str:
    """XXH3 of 128 bits over the metadata and the tensors' names, types, shapes and bytes."""
    names = sorted(tensors)
    described = [metadata, [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]]
    state = xxhash.xxh3_128(json.dumps(described).encode())
    for name in names:
        state.update(_bytes_of(tensors[name]))
    return state.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's own memory; NumPy has no bfloat16."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"`{name}` is {tensor.dtype}, which no file of an encoded context can hold.")


def _read_entry(file: BinaryIO, entry: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads an entry.

    Raises:
        ValueError: It is not whole, or not that entry; the message says why.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    header_bytes = int.from_bytes(file.read(8), "little")
    data_start = 8 + header_bytes
    if not 0 < header_bytes <= MAX_HEADER_BYTES or data_start > num_bytes:
        raise ValueError("it is cut off or no safetensors file")
    try:
        header = json.loads(file.read(header_bytes))
        stamp = header.pop("__metadata__", {})
        found = [stamp.get(name) for name in ("format", "version", "entry")]
    except (ValueError, AttributeError, RecursionError):
        raise ValueError("its header is damaged or no safetensors header") from None
    if found != [FORMAT, VERSION, entry]:
        raise ValueError(f"its metadata say {' '.join(map(str, found))} and not {FORMAT} {VERSION} {entry}")
    try:
        spans = {name: _span(description) for name, description in header.items()}
    except (ValueError, TypeError, KeyError):
        raise ValueError("its header is damaged") from None
    if max((end for *_, end in spans.values()), default=0) != num_bytes - data_start:
        raise ValueError("it is cut off, or longer than its header says")
    tensors = {name: _read_tensor(file, data_start, *span) for name, span in spans.items()}
    if stamp.get("checksum") != _checksum(tensors, stamp.get("metadata")):
        raise ValueError("its checksum is wrong")
    return tensors, json.loads(stamp["metadata"])


def _span(description: dict[str, Any]) -> tuple[torch.dtype, list[int], int, int]:
    """A tensor's type and shape and where its bytes begin and end, sane enough to make room for it."""
    dtype, shape = DTYPES[description["dtype"]], description["shape"]
    begin, end = description["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in [*shape, begin, end]):
        raise ValueError(f"sizes must be whole numbers, found {shape}, {begin}, {end}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shape} of {dtype} does not take the bytes from {begin} to {end}")
    return dtype, shape, begin, end


def _read_tensor(
    file: BinaryIO, data_start: int, dtype: torch.dtype, shape: list[int], begin: int, end: int
) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    file.seek(data_start + begin)
    if file.readinto(_bytes_of(tensor)) != end - begin:  # type: ignore[attr-defined]
        raise ValueError("it is cut off")
    return tensor

# SPDX-License-Identifier: Apache-2.0
"""The disk level of the store: entries as files, written behind and read ahead by a thread each.

On a GPU, what the reading thread has read begins its way there at once, while the thread reads the next file and the
GPU computes.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from frozen_peft.context.keys import PrefixKey
from frozen_peft.context.store.context_files import ContextFiles
from frozen_peft.context.store.memory_level import Entry, EntryKey
from frozen_peft.context.store.residence import DeviceCopy, pinned, to_host

__all__ = ["DiskLevel"]

# Entries that may wait to be written; more would be memory beyond the budget.
MAX_UNWRITTEN = 2
# How many times as long as listing a directory took it is not listed again, though every write changes it.
LISTING_PAUSE = 20


@dataclass(frozen=True)
class _Listing:
    """Entries of a namespace, the time of the last change that they show, and when they may be listed again."""

    changed: int
    next_time: float
    keys: set[PrefixKey]


class DiskLevel:
    """Entries in files.

    Args:
        files: Where they lie.
    """

    def __init__(self, files: ContextFiles):
        self.files = files
        # Whether what is read goes to a GPU: then the reader puts it into pinned memory, from which the copy to the
        # GPU does not hold up the thread that computes.
        self.pins = False
        # Begins the copy of what was read ahead, where there is room for it; called by the reader.
        self.copy_ahead: Callable[[dict[str, torch.Tensor]], DeviceCopy | None] = lambda tensors: None
        self._reader, self._writer = (ThreadPoolExecutor(1, f"contexts-{kind}") for kind in ("read", "write"))
        self._reading: dict[EntryKey, Future[dict[EntryKey, Entry]]] = {}
        self._arrived: dict[EntryKey, Entry] = {}
        self._writing: list[Future[bool]] = []
        self._written: dict[str, set[PrefixKey]] = {}
        self._listed: dict[str, _Listing] = {}
        # Entries that were written since they were last added to the listings, by the writer.
        self._done: deque[EntryKey] = deque()

    @classmethod
    def at(cls, folder: str | Path | None) -> Self | None:
        """Entries in a folder, `~` included; None without one."""
        return None if folder is None else cls(ContextFiles(Path(folder).expanduser()))

    def keys(self, namespace: str) -> set[PrefixKey]:
        """Entries of a namespace, listed again when its directory has changed."""
        try:
            changed = (self.files.folder / namespace).stat().st_mtime_ns
        except OSError:
            return set()
        listed = self._listed.get(namespace)
        now = time.monotonic()
        if listed is None or (listed.changed != changed and now >= listed.next_time):
            keys = self.files.keys(namespace)
            stop = time.monotonic()
            self._listed[namespace] = listed = _Listing(changed, stop + LISTING_PAUSE * (stop - now), keys)
        while self._done:
            done, key = self._done.popleft()
            if done in self._listed:
                self._listed[done].keys.add(key)
        return listed.keys

    def read(self, key: EntryKey) -> Entry | None:
        """An entry in host memory; None where there is none, or none that is whole."""
        if (reading := self._reading.pop(key, None)) is not None:
            self._arrived |= reading.result()
        found = self._arrived.pop(key, None) or self._read(key)
        if found is None and key[0] in self._listed:
            self._listed[key[0]].keys.discard(key[1])
        return found

    def read_ahead(self, keys: Sequence[EntryKey], is_at_hand: Callable[[EntryKey], bool]) -> None:
        """Begins to read entries, each with the prefixes that it needs and that are not at hand.

        What was begun before is forgotten, unless it is wanted again.
        """
        self._arrived = {}
        self._reading = {key: self._reading[key] for key in keys if key in self._reading}
        begun: set[EntryKey] = set()
        # Prefixes before what extends them, which then finds them begun.
        for key in sorted(keys, key=lambda key: key[1].num_tokens):
            if key not in self._reading:
                self._reading[key] = self._reader.submit(self._read_chain, key, is_at_hand, begun)

    def write(self, key: EntryKey, entry: Entry) -> None:
        """Begins to write an entry, after waiting while too many others are unwritten."""
        if not self.files.usable or key[1] in self.keys(key[0]):
            return
        while len(self._writing) >= MAX_UNWRITTEN:
            self._writing.pop(0).result()
        self._written.setdefault(key[0], set()).add(key[1])
        self._writing.append(self._writer.submit(self._write, key, entry))

    def remove(self, key: EntryKey) -> None:
        """Removes an entry that is of no use, so that it can be written again."""
        self.files.remove(*key)
        self._listed.pop(key[0], None)

    def remove_written(self, namespace: str) -> None:
        """Removes the entries of a namespace that this process has written, and its directory when it is empty."""
        self._listed.pop(namespace, None)
        for key in self._written.pop(namespace, set()):
            self._writer.submit(self.files.remove, namespace, key)
        self._writer.submit(self.files.remove_empty, namespace)

    def flush(self) -> None:
        """Waits until everything is written."""
        self._writer.submit(bool).result()
        self._writing.clear()

    def _read_chain(
        self, key: EntryKey, is_at_hand: Callable[[EntryKey], bool], begun: set[EntryKey]
    ) -> dict[EntryKey, Entry]:
        chain: dict[EntryKey, Entry] = {}
        while key not in begun and (entry := self._read(key)) is not None:
            begun.add(key)
            chain[key] = replace(entry, copying=self.copy_ahead(entry.tensors))
            if entry.prefix is None or is_at_hand((key[0], entry.prefix)):
                break
            key = (key[0], entry.prefix)
        return chain

    def _read(self, key: EntryKey) -> Entry | None:
        found = self.files.read(*key)
        if found is None:
            return None
        tensors, metadata = found
        if self.pins:
            tensors = pinned(tensors)
        prefix = json.loads(metadata["prefix"])
        return Entry(PrefixKey(*prefix) if prefix else None, tuple(json.loads(metadata["windows"])), tensors)

    def _write(self, key: EntryKey, entry: Entry) -> bool:
        prefix = [entry.prefix.num_tokens, entry.prefix.digest] if entry.prefix is not None else None
        metadata = {"prefix": json.dumps(prefix), "windows": json.dumps(entry.windows)}
        on_device = any(tensor.is_cuda for tensor in entry.tensors.values())
        tensors = to_host(entry.tensors) if on_device else entry.tensors
        is_there = self.files.write(*key, tensors, metadata)
        if is_there:
            self._done.append(key)
        return is_there

# SPDX-License-Identifier: Apache-2.0
"""The memory level of the store: entries within a budget of bytes, the least recently used of which goes first."""

import itertools
from collections import Counter
from collections.abc import Iterator

from cachetools import Cache, LRUCache

from frozen_peft.context.store.entry import Entry, EntryKey

__all__ = ["MemoryLevel"]


class MemoryLevel(LRUCache):
    """Entries within a budget of bytes, and how many of each length a namespace has."""

    def __init__(self, max_bytes: int):
        super().__init__(max_bytes, getsizeof=lambda entry: entry.num_bytes)
        self.lengths: dict[str, Counter[int]] = {}
        self._uses = itertools.count(1)

    def __getitem__(self, key: EntryKey) -> Entry:
        entry: Entry = super().__getitem__(key)
        entry.last_use = next(self._uses)
        return entry

    def __setitem__(self, key: EntryKey, entry: Entry) -> None:
        is_new = key not in self
        super().__setitem__(key, entry)
        entry.last_use = next(self._uses)
        if is_new:
            self.lengths.setdefault(key[0], Counter())[key[1].num_tokens] += 1

    def __delitem__(self, key: EntryKey) -> None:
        super().__delitem__(key)
        self.lengths[key[0]][key[1].num_tokens] -= 1

    def add(self, key: EntryKey, entry: Entry) -> None:
        """Adds an entry if it fits, together with the prefixes that it needs."""
        before = (key[0], entry.prefix) if entry.prefix is not None else None
        if entry.num_bytes > self.maxsize or (before is not None and before not in self):
            return
        if before is not None:
            self.touch(before)
        self[key] = entry
        if before is not None and before not in self:
            del self[key]
        else:
            self.touch(key)

    def pay(self, key: EntryKey, entry: Entry) -> bool:
        """Puts an entry in the place of one that is owed, which counts as no use; False where none is."""
        owed = Cache.__getitem__(self, key) if key in self else None
        if owed is None or owed.owed_bytes != entry.num_bytes or owed.prefix != entry.prefix:
            return False
        owed.windows, owed.tensors, owed.on_host, owed.owed_bytes = entry.windows, entry.tensors, entry.on_host, 0
        return True

    def touch(self, key: EntryKey) -> None:
        """Marks an entry as used, and after it its prefixes, so that they go later."""
        while (entry := self.get(key)) is not None and entry.prefix is not None:
            key = (key[0], entry.prefix)

    def unused(self) -> Iterator[Entry]:
        """The entries in the order they came; looking at them here does not count as use."""
        for key in self:
            yield Cache.__getitem__(self, key)

    def least_recent_first(self) -> list[tuple[EntryKey, Entry]]:
        """The entries in the order in which they would go, with their keys; looking at them does not count as use."""
        return sorted(zip(self, self.unused(), strict=True), key=lambda pair: pair[1].last_use)

    def drop(self, namespace: str) -> None:
        """Removes the entries of a namespace."""
        for key in [key for key in self if key[0] == namespace]:
            del self[key]
        self.lengths.pop(namespace, None)

    def drop_all(self) -> None:
        """Removes every entry."""
        for namespace in list(self.lengths):
            self.drop(namespace)

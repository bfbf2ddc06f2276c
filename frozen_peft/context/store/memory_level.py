# SPDX-License-Identifier: Apache-2.0
"""The memory level of the store: entries within a budget of bytes, the least recently used of which goes first."""

from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from frozen_peft.context.keys import PrefixKey
from frozen_peft.context.store.residence import DeviceCopy

__all__ = ["Entry", "EntryKey", "MemoryLevel"]

# A namespace, which stands for everything but the tokens, and the tokens.
EntryKey = tuple[str, PrefixKey]


@dataclass
class Entry:
    """What a context adds to its prefix.

    Attributes:
        prefix: The context it extends; None: none.
        windows: Sliding window of each layer in tokens, None for any other layer.
        tensors: `EncodedContext.own_tensors`, or what `rounding.pack` made of them.
        on_host: The tensors were moved from the model's device to host memory.
        copying: They are on their way there, since they were read ahead; never of an entry that is kept.
        owed_bytes: What the tensors will take, where another process kept them and this one has yet to encode them;
            0: they are here.
        num_bytes: Bytes of the tensors when they came, with whatever else their storage held.
    """

    prefix: PrefixKey | None
    windows: tuple[int | None, ...]
    tensors: dict[str, torch.Tensor]
    on_host: bool = False
    copying: DeviceCopy | None = None
    owed_bytes: int = 0
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = self.owed_bytes or sum(each.untyped_storage().nbytes() for each in self.tensors.values())


class MemoryLevel:
    """Entries within a budget of bytes.

    Attributes:
        max_bytes: The budget.
        num_bytes: Bytes of all entries.
        entries: The least recently used first. Looking at them here does not count as use.

    Args:
        max_bytes: The budget.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.entries: OrderedDict[EntryKey, Entry] = OrderedDict()

    def __contains__(self, key: EntryKey) -> bool:
        return key in self.entries

    def add(self, key: EntryKey, entry: Entry) -> None:
        """Adds an entry if it fits, together with the prefixes that it needs."""
        before = (key[0], entry.prefix) if entry.prefix is not None else None
        if entry.num_bytes > self.max_bytes or (before is not None and before not in self):
            return
        if before is not None:
            self.touch(before)
        self.insert(key, entry)
        if before is not None and before not in self:
            self.remove(key)
        else:
            self.touch(key)

    def insert(self, key: EntryKey, entry: Entry) -> None:
        """Puts an entry behind all others, wherever its prefixes are, and drops what there is no more room for."""
        self.remove(key)
        self.entries[key] = entry
        self.num_bytes += entry.num_bytes
        while self.num_bytes > self.max_bytes:
            self.remove(next(iter(self.entries)))

    def pay(self, key: EntryKey, entry: Entry) -> bool:
        """Puts an entry in the place of one that is owed, which counts as no use; False where none is."""
        owed = self.entries.get(key)
        if owed is None or owed.owed_bytes != entry.num_bytes or owed.prefix != entry.prefix:
            return False
        self.entries[key] = entry
        return True

    def touch(self, key: EntryKey) -> None:
        """Marks an entry as used, and after it its prefixes, so that they go later."""
        while key in self:
            self.entries.move_to_end(key)
            prefix = self.entries[key].prefix
            if prefix is None:
                return
            key = (key[0], prefix)

    def remove(self, key: EntryKey) -> None:
        """Removes an entry, if it is there."""
        if (entry := self.entries.pop(key, None)) is not None:
            self.num_bytes -= entry.num_bytes

    def drop(self, namespace: str) -> None:
        """Removes the entries of a namespace."""
        for key in [key for key in self.entries if key[0] == namespace]:
            self.remove(key)

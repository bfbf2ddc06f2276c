# SPDX-License-Identifier: Apache-2.0
"""Encoded contexts kept for later, in memory within a budget of bytes and in files.

1. An entry is what a context adds to the prefix it extends (`EncodedContext.own_tensors`), under the digest of its
   tokens and a *namespace*: the digest of everything else it depends on. Another model, dtype, kernel or adapter state
   has another namespace, so what does not fit is never found.
2. With adapters active in contexts, every optimizer step begins a new namespace. Namespaces that are at most
   `max_staleness` steps old may still be read; older ones are dropped. What goes on from an older prefix is as old as
   that prefix.
3. The least recently used entry goes first. Reading an entry also touches all its prefixes, after it, so a prefix is
   never older than what extends it and none of its extensions is left without it.
4. On a GPU, entries stay there as long as it has room to spare, and lie in pinned memory otherwise; both count.
5. Files are written behind, and read ahead once the next batch is known, by one thread each. What was read ahead, and
   what lies in pinned memory and is needed next, is copied to the GPU meanwhile, as far as there is room.
6. With `dtype="int8"` an entry holds what `rounding.pack` makes of it. A context is rounded as it is put, so that it
   is the same whether it was just encoded or is found.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from cachetools import Cache, LRUCache

from frozen_peft.context.disk import DiskLevel
from frozen_peft.context.encoded import EncodedContext
from frozen_peft.context.entry import Entry, EntryKey
from frozen_peft.context.fingerprint import adapter_fingerprint, base_fingerprint, base_state, run_fingerprint
from frozen_peft.context.keys import PrefixKey, prefix_keys
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.residence import DeviceCopy, copy_ahead, device_room, to_device, to_host
from frozen_peft.context.rounding import CacheDtype, round_in_place, rounding_name, unpack
from frozen_peft.context.sharding import reshard

__all__ = ["ContextStore"]

# Digests are kept of every so many tokens of a context, to notice where a later one branches off.
BRANCH_TOKENS = 64
MAX_BRANCHES = 1 << 20


class _Memory(LRUCache):
    """Entries within a budget of bytes, and how many of each length a namespace has."""

    def __init__(self, max_bytes: int):
        super().__init__(max_bytes, getsizeof=lambda entry: entry.num_bytes)
        self.lengths: dict[str, Counter[int]] = {}

    def __setitem__(self, key: EntryKey, entry: Entry) -> None:
        is_new = key not in self
        super().__setitem__(key, entry)
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

    def touch(self, key: EntryKey) -> None:
        """Marks an entry as used, and after it its prefixes, so that they go later."""
        while (entry := self.get(key)) is not None and entry.prefix is not None:
            key = (key[0], entry.prefix)

    def unused(self) -> Iterator[Entry]:
        """The entries in the order they came; looking at them here does not count as use."""
        for key in self:
            yield Cache.__getitem__(self, key)

    def drop(self, namespace: str) -> None:
        """Removes the entries of a namespace."""
        for key in [key for key in self if key[0] == namespace]:
            del self[key]
        self.lengths.pop(namespace, None)


class ContextStore:
    """Keeps encoded contexts of one model.

    Args:
        max_bytes: Budget in memory, of the GPU's and pinned memory together.
        disk: Where entries are written as well; None: nowhere.
        max_staleness: Optimizer steps for which an entry is kept while adapters are active in contexts.
        dtype: `"int8"`: keep keys and values in 8 bit; `"auto"`: keep everything as it was encoded.
        room: Bytes that entries may still take on a device; by default what a GPU has free beyond a reserve.
    """

    def __init__(
        self,
        max_bytes: int,
        disk: DiskLevel | None = None,
        *,
        max_staleness: int = 0,
        dtype: CacheDtype = "auto",
        room: Callable[[torch.device], int] = device_room,
    ):
        self.max_staleness, self.dtype = max_staleness, dtype
        self._memory = _Memory(max_bytes)
        self._disk = disk
        if disk is not None:
            disk.copy_ahead = self._copy_ahead
        self._room = room
        self._device = torch.device("cpu")
        self._base = ""
        self._readable_base = ""
        self._base_state: tuple[object, ...] | None = None
        self._adapters = True
        # Namespaces that are kept, with the last step at which they were current; the current one, and the readable.
        self._steps: dict[str, int] = {}
        self._current = ""
        self._readable: tuple[str, ...] = ()
        # Namespaces of the contexts of this step: what extends one of them is as old as it is.
        self._origin: dict[PrefixKey, str] = {}
        self._branches: LRUCache = LRUCache(MAX_BRANCHES)
        self._copying: dict[EntryKey, DeviceCopy] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the entries in memory."""
        return int(self._memory.currsize)

    @property
    def num_bytes_on_disk(self) -> int:
        """Bytes of the files that may be read now."""
        return sum(self._disk.files.num_bytes(namespace) for namespace in self._readable) if self._disk else 0

    def open(self, model: torch.nn.Module, *, adapters: bool, step: int, stale: bool = True) -> None:
        """Settles what may be read from here on, and under which namespace entries are put.

        Args:
            model: The model that encodes.
            adapters: Whether adapters are active in contexts.
            step: Optimizer steps so far.
            stale: Whether entries up to `max_staleness` steps old may be read.
        """
        reshard(model)
        state = base_state(model)
        if state != self._base_state:
            self._base, self._base_state = base_fingerprint(model), state
        self._device = get_pretrained_model(model).get_input_embeddings().weight.device
        if self._disk is not None:
            self._disk.pins = self._device.type == "cuda"
        self._adapters = adapters
        base = f"{self._base} {run_fingerprint(model)}{rounding_name(self.dtype)}"
        trained = adapter_fingerprint(model) if adapters else "adapters off"
        namespace = hashlib.blake2b(f"{base} {trained}".encode(), digest_size=16).hexdigest()
        if base != self._readable_base or (adapters and self._is_another_training(namespace, step)):
            # Nothing that was encoded before is known to be near the weights of now.
            self._keep_only(set())
        self._readable_base = base
        if namespace != self._current:
            self._origin.clear()
        self._current = namespace
        self._steps[namespace] = step
        self._keep_only({name for name, last in self._steps.items() if step - last <= self.max_staleness})
        newest_first = tuple(sorted(self._steps, key=lambda name: -self._steps[name]))
        self._readable = newest_first if stale else (namespace,)
        self._make_room()

    def find(
        self,
        tokens: np.ndarray,
        known: dict[PrefixKey, EncodedContext],
        *,
        rope_length: int = 0,
        longer_than: int = 0,
        whole: bool = False,
    ) -> PrefixKey | None:
        """Looks for the longest prefix of a context that is kept, and adds it to `known`.

        Args:
            tokens: Token ids, shape `(tokens,)`, int64.
            known: Encoded contexts that are at hand.
            rope_length: How its positions are computed (see `rope`).
            longer_than: Tokens that the prefix must have more than.
            whole: Only the whole context will do.

        Returns:
            The prefix; None where there is none.
        """
        for namespace, key in self._candidates(tokens, rope_length, longer_than, whole):
            if self._assemble(namespace, key, known) is not None:
                self._memory.touch((namespace, key))
                return key
        return None

    def put(self, key: PrefixKey, context: EncodedContext, *, prefix: PrefixKey | None) -> None:
        """Keeps a context where there is room for it.

        Args:
            key: The context.
            context: What it was encoded to. With `dtype="int8"` it is rounded in place: what it adds to its prefix is
                overwritten by what will be found.
            prefix: The context that it extends; None: none.

        Raises:
            ValueError: It is not finite, and `dtype="int8"`.
        """
        namespace = self._current if prefix is None else self._origin.get(prefix, self._current)
        self._origin[key] = namespace
        tensors = round_in_place(context) if self.dtype == "int8" else context.own_tensors()
        entry = Entry(prefix, context.windows(), tensors)
        self._remember((namespace, key), entry)
        if self._disk is not None:
            self._disk.write((namespace, key), entry)

    def read_ahead(self, contexts: Sequence[tuple[np.ndarray, int]]) -> None:
        """Begins to fetch what these contexts, each with its rope length, will need and the device does not have.

        What was begun before for other contexts is forgotten.
        """
        if self._nothing_outlives_a_step():
            return
        candidates = (next(iter(self._candidates(tokens, rope, 0, False)), None) for tokens, rope in contexts)
        wanted = dict.fromkeys(key for key in candidates if key is not None)
        on_host = [key for key in wanted if key in self._memory and self._memory[key].on_host]
        begun = {key: self._copying.get(key) or self._copy_ahead(self._memory[key].tensors) for key in on_host}
        self._copying = {key: copying for key, copying in begun.items() if copying is not None}
        if self._disk is not None:
            self._disk.read_ahead([key for key in wanted if key not in self._memory], self._memory.__contains__)

    def branch(
        self, tokens: np.ndarray, cuts: tuple[PrefixKey, ...], *, rope_length: int = 0
    ) -> tuple[PrefixKey, ...]:
        """The cuts of a context, with one more where it branches off from a context of an earlier step.

        A context that is seen for the first time leaves no state where later ones will branch off; from the second
        one on there is one. (Marconi, arXiv 2411.19379, has the same policy for serving hybrid models.)

        Args:
            tokens: Token ids of the context, shape `(tokens,)`, int64.
            cuts: Its prefixes to cut at, shortest first, itself the last.
            rope_length: How its positions are computed (see `rope`).
        """
        if self._nothing_outlives_a_step():
            return cuts
        lengths = range(BRANCH_TOKENS, len(tokens), BRANCH_TOKENS)
        places = prefix_keys(tokens, lengths, rope_length=rope_length)
        length = max((length for length, key in places.items() if key in self._branches), default=0)
        is_known = cuts[-1] in self._branches
        self._branches.update(dict.fromkeys([*places.values(), cuts[-1]], True))
        if is_known or not length or any(length <= cut.num_tokens for cut in cuts[:-1]):
            return cuts
        return (*cuts[:-1], places[length], cuts[-1])

    def forget(self) -> None:
        """Drops what another process that goes on from here would not find.

        That is everything, or nothing where entries are in files and good for ever.
        """
        self.flush()
        if self._disk is not None and not self._adapters:
            return
        self._keep_only(set())
        self._current, self._readable = "", ()
        self._origin.clear()
        self._branches.clear()
        self._copying.clear()

    def flush(self) -> None:
        """Waits until everything is written."""
        if self._disk is not None:
            self._disk.flush()

    def _candidates(self, tokens: np.ndarray, rope_length: int, longer_than: int, whole: bool) -> list[EntryKey]:
        """Kept prefixes of a context, longest first, of equally long ones the freshest first."""
        on_disk = {name: self._disk.keys(name) if self._disk is not None else set() for name in self._readable}
        lengths = {key.num_tokens for keys in on_disk.values() for key in keys}
        for namespace in self._readable:
            lengths.update(length for length, count in self._memory.lengths.get(namespace, {}).items() if count)
        wanted = [length for length in lengths if longer_than < length <= len(tokens)]
        if whole:
            wanted = [length for length in wanted if length == len(tokens)]
        keys = prefix_keys(tokens, wanted, rope_length=rope_length)
        return [
            (namespace, keys[length])
            for length in sorted(keys, reverse=True)
            for namespace in self._readable
            if (namespace, keys[length]) in self._memory or keys[length] in on_disk[namespace]
        ]

    def _assemble(
        self, namespace: str, key: PrefixKey, known: dict[PrefixKey, EncodedContext]
    ) -> EncodedContext | None:
        """A context, of its entry and those of its prefixes; None where one of them is missing."""
        chain: list[tuple[PrefixKey, Entry, bool]] = []
        missing: PrefixKey | None = key
        while missing is not None and not (missing in known and self._origin.get(missing, namespace) == namespace):
            entry = self._memory.get((namespace, missing))
            is_new = entry is None
            if entry is None and self._disk is not None:
                entry = self._disk.read((namespace, missing))
            if entry is None:
                self._forget_extensions(namespace, chain)
                return None
            chain.append((missing, entry, is_new))
            missing = entry.prefix
        context = known[missing] if missing is not None else None
        for part, entry, is_new in reversed(chain):
            copying = self._copying.pop((namespace, part), None) or entry.copying
            tensors = copying.wait() if copying is not None else to_device(entry.tensors, self._device)
            if is_new:
                self._remember((namespace, part), replace(entry, tensors=tensors, copying=None))
            own = unpack(tensors) if self.dtype == "int8" else tensors
            context = EncodedContext.from_own_tensors(part.num_tokens, own, entry.windows, context)
            known[part] = context
            self._origin[part] = namespace
        return context

    def _forget_extensions(self, namespace: str, chain: list[tuple[PrefixKey, Entry, bool]]) -> None:
        """Removes files of contexts whose prefix is lost, so that they are written again."""
        for part, _, is_new in chain:
            if is_new and self._disk is not None:
                self._disk.remove((namespace, part))

    def _copy_ahead(self, tensors: dict[str, torch.Tensor]) -> DeviceCopy | None:
        return copy_ahead(tensors, self._device, self._room)

    def _remember(self, key: EntryKey, entry: Entry) -> None:
        if self._room(self._device) < 0:
            entry = replace(entry, tensors=to_host(entry.tensors), on_host=True)
        self._memory.add(key, entry)

    def _make_room(self) -> None:
        """Moves entries off the device, in the order they came, until it has its reserve back."""
        for entry in self._memory.unused():
            if entry.on_host:
                continue
            if self._room(self._device) >= 0:
                return
            entry.tensors, entry.on_host = to_host(entry.tensors), True

    def _nothing_outlives_a_step(self) -> bool:
        return self._adapters and not self.max_staleness

    def _is_another_training(self, namespace: str, step: int) -> bool:
        """Whether weights changed without a step, or steps are counted from an earlier one again."""
        last = self._steps.get(self._current, -1)
        return step < last or (step == last and namespace != self._current)

    def _keep_only(self, namespaces: set[str]) -> None:
        for name in self._steps.keys() - namespaces:
            del self._steps[name]
            self._memory.drop(name)
            if self._disk is not None and self._adapters:
                self._disk.remove_written(name)

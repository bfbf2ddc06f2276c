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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache

from frozen_peft.context.encoded import EncodedContext
from frozen_peft.context.keys import PrefixKey, prefix_keys
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.sharding import are_sharded, reshard
from frozen_peft.context.store.disk_level import DiskLevel
from frozen_peft.context.store.fingerprint import adapter_fingerprint, base_fingerprint, base_state, run_fingerprint
from frozen_peft.context.store.memory_level import Entry, EntryKey, MemoryLevel
from frozen_peft.context.store.residence import DeviceCopy, copy_ahead, device_room, to_device, to_host
from frozen_peft.context.store.rounding import CacheDtype, round_in_place, rounding_name, unpack

__all__ = ["ContextStore", "Found"]

# Digests are kept of every so many tokens of a context, to notice where a later one branches off.
BRANCH_TOKENS = 64
MAX_BRANCHES = 1 << 20


@dataclass(frozen=True)
class Found:
    """What a store has of a context.

    Attributes:
        prefix: Its longest part that is at hand now; None: none is.
        owed: What follows on it and was kept by the process that this one goes on from, shortest first: to be encoded
            in these pieces, and put, to be what it was.
    """

    prefix: PrefixKey | None
    owed: tuple[PrefixKey, ...] = ()


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
        self._memory = MemoryLevel(max_bytes)
        self._disk = disk
        if disk is not None:
            disk.copy_ahead = self._copy_ahead
        self._room = room
        self._device = torch.device("cpu")
        self._base = ""
        self._readable_base = ""
        self._base_state: tuple[object, ...] | None = None
        self._trained = ""
        self._goes_stale = True
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
        """Bytes of the entries in memory, without those that are owed."""
        return self._memory.num_bytes - sum(entry.owed_bytes for entry in self._memory.entries.values())

    @property
    def num_bytes_on_disk(self) -> int:
        """Bytes of the files that may be read now."""
        return sum(self._disk.files.num_bytes(namespace) for namespace in self._readable) if self._disk else 0

    def open(
        self, model: torch.nn.Module, *, fixed: str | None, step: int, stale: bool = True, changed: bool = True
    ) -> None:
        """Settles what may be read from here on, and under which namespace entries are put.

        Args:
            model: The model that encodes.
            fixed: See `ContextEncoder`; None: what is active in contexts is in training.
            step: Optimizer steps so far.
            stale: Whether entries up to `max_staleness` steps old may be read.
            changed: Whether what training changes may be different from what it was at the last call. It is read in
                full then.
        """
        reshard(model)
        state = base_state(model)
        if state != self._base_state:
            self._base, self._base_state = base_fingerprint(model), state
        self._device = get_pretrained_model(model).get_input_embeddings().weight.device
        if self._disk is not None:
            self._disk.pins = self._device.type == "cuda"
        self._goes_stale = fixed is None
        base = f"{self._base} {run_fingerprint(model)}{rounding_name(self.dtype)}"
        if fixed is not None:
            self._trained = fixed
        elif changed or are_sharded(model):
            # In shards it takes all processes, and what one of them notices the others may not.
            self._trained = adapter_fingerprint(model)
        namespace = hashlib.blake2b(f"{base} {self._trained}".encode(), digest_size=16).hexdigest()
        if base != self._readable_base or (self._goes_stale and self._is_another_training(namespace, step)):
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
    ) -> Found | None:
        """Looks for the longest prefix of a context that is kept, and adds it to `known`.

        Args:
            tokens: Token ids, shape `(tokens,)`, int64.
            known: Encoded contexts that are at hand.
            rope_length: How its positions are computed (see `rope`).
            longer_than: Tokens that the prefix must have more than.
            whole: Only the whole context will do.

        Returns:
            What there is of it; None where there is nothing.
        """
        for namespace, key in self._candidates(tokens, rope_length, longer_than, whole):
            if (found := self._assemble(namespace, key, known)) is not None:
                self._memory.touch((namespace, key))
                return found
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
        begun = {}
        for key in wanted:
            entry = self._memory.entries.get(key)
            if entry is not None and entry.on_host:
                begun[key] = self._copying.get(key) or self._copy_ahead(entry.tensors)
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
        """Drops what goes stale, and where contexts branched off; what the base encoded is kept, see `record`."""
        self.flush()
        if self._goes_stale:
            self._keep_only(set())
            self._current, self._readable = "", ()
            self._origin.clear()
        elif self._disk is not None:
            return
        self._branches.clear()
        self._copying.clear()

    def record(self) -> dict[str, Any] | None:
        """What a process that goes on from here has to know to encode as this one does, for JSON.

        Which contexts are at hand decides where others are cut, and so the last bits of them. What goes stale is
        forgotten and leaves nothing to know, and what lies in files is found there: None.
        """
        if self._goes_stale or self._disk is not None or not self._current:
            return None
        entries = [
            [str(key), str(entry.prefix or ""), entry.num_bytes]
            for (namespace, key), entry in self._memory.entries.items()
            if namespace == self._current
        ]
        return {"base": self._readable_base, "namespace": self._current, "entries": entries}

    def restore(self, record: dict[str, Any]) -> None:
        """Owes from here on what another process kept; a store that keeps something already stays as it is.

        What is owed is encoded where it is asked for, in the pieces in which the other process encoded it. Another
        base than the other one's owes nothing: see `open`.

        Raises:
            ValueError: This is no `record`.
        """
        if self._memory.entries:
            return
        try:
            base, namespace = str(record["base"]), str(record["namespace"])
            for text, prefix, num_bytes in record["entries"]:
                key, before = PrefixKey.from_text(text), PrefixKey.from_text(prefix) if prefix else None
                if key is None or bool(prefix) != (before is not None) or not isinstance(num_bytes, int):
                    raise ValueError(f"{text} after {prefix} is not the name of a context")
                if num_bytes <= self._memory.max_bytes:
                    self._memory.insert((namespace, key), Entry(before, (), {}, owed_bytes=num_bytes))
        except (KeyError, TypeError, ValueError) as error:
            self._memory = MemoryLevel(self._memory.max_bytes)
            raise ValueError(f"not a record of kept contexts ({type(error).__name__}: {error})") from error
        self._goes_stale, self._readable_base, self._current = False, base, namespace
        self._steps, self._readable = {namespace: 0}, (namespace,)

    def flush(self) -> None:
        """Waits until everything is written."""
        if self._disk is not None:
            self._disk.flush()

    def _candidates(self, tokens: np.ndarray, rope_length: int, longer_than: int, whole: bool) -> list[EntryKey]:
        """Kept prefixes of a context, longest first, of equally long ones the freshest first."""
        on_disk = {name: self._disk.keys(name) if self._disk is not None else set() for name in self._readable}
        kept = {key for namespace, key in self._memory.entries if namespace in on_disk}.union(*on_disk.values())
        shortest = len(tokens) if whole else longer_than + 1
        lengths = {key.num_tokens for key in kept if shortest <= key.num_tokens <= len(tokens)}
        keys = prefix_keys(tokens, lengths, rope_length=rope_length)
        return [
            (namespace, keys[length])
            for length in sorted(keys, reverse=True)
            for namespace in self._readable
            if (namespace, keys[length]) in self._memory or keys[length] in on_disk[namespace]
        ]

    def _assemble(self, namespace: str, key: PrefixKey, known: dict[PrefixKey, EncodedContext]) -> Found | None:
        """A context, of its entry and those of its prefixes; None where one of them is missing."""
        chain: list[tuple[PrefixKey, Entry, bool]] = []
        missing: PrefixKey | None = key
        while missing is not None and not (missing in known and self._origin.get(missing, namespace) == namespace):
            entry = self._memory.entries.get((namespace, missing))
            is_new = entry is None
            if entry is None and self._disk is not None:
                entry = self._disk.read((namespace, missing))
                if entry is None:
                    # Files of contexts whose prefix is lost are of no use, and are written again.
                    for part, _, is_read in chain:
                        if is_read:
                            self._disk.remove((namespace, part))
            if entry is None:
                return None
            chain.append((missing, entry, is_new))
            missing = entry.prefix
        at_hand, context = missing, known[missing] if missing is not None else None
        while chain and not chain[-1][1].owed_bytes:
            part, entry, is_new = chain.pop()
            copying = self._copying.pop((namespace, part), None) or entry.copying
            tensors = copying.wait() if copying is not None else to_device(entry.tensors, self._device)
            if is_new:
                self._remember((namespace, part), replace(entry, tensors=tensors, copying=None))
            own = unpack(tensors) if self.dtype == "int8" else tensors
            context = EncodedContext.from_own_tensors(part.num_tokens, own, entry.windows, context)
            at_hand, known[part] = part, context
            self._origin[part] = namespace
        return Found(at_hand, tuple(part for part, _, _ in reversed(chain)))

    def _copy_ahead(self, tensors: dict[str, torch.Tensor]) -> DeviceCopy | None:
        return copy_ahead(tensors, self._device, self._room)

    def _remember(self, key: EntryKey, entry: Entry) -> None:
        if self._room(self._device) < 0:
            entry = replace(entry, tensors=to_host(entry.tensors), on_host=True)
        if not self._memory.pay(key, entry):
            self._memory.add(key, entry)

    def _make_room(self) -> None:
        """Moves entries off the device, the least recently used first, until it has its reserve back."""
        for entry in self._memory.entries.values():
            if entry.on_host or entry.owed_bytes:
                continue
            if self._room(self._device) >= 0:
                return
            entry.tensors, entry.on_host = to_host(entry.tensors), True

    def _nothing_outlives_a_step(self) -> bool:
        return self._goes_stale and not self.max_staleness

    def _is_another_training(self, namespace: str, step: int) -> bool:
        """Whether weights changed without a step, or steps are counted from an earlier one again."""
        last = self._steps.get(self._current, -1)
        return step < last or (step == last and namespace != self._current)

    def _keep_only(self, namespaces: set[str]) -> None:
        for name in self._steps.keys() - namespaces:
            del self._steps[name]
            self._memory.drop(name)
            if self._disk is not None and self._goes_stale:
                self._disk.remove_written(name)

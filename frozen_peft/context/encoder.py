# SPDX-License-Identifier: Apache-2.0
"""Encodes contexts as few times as correctness allows.

1. The contexts of a batch, or of a whole optimizer step once it is announced, are cut where they branch
   (see `prefixes`).
2. Each context goes on from its longest prefix that is encoded already: earlier in this step, or in the store.
3. What is missing is encoded between two cuts at a time, equal lengths together while they stay within one chunk.
4. A prefix is kept while a context of this step is still to come that begins with it, and the weights are what they
   were; the store keeps what it has
   room for beyond that.
5. Where the GPU's memory does not suffice for a forward, what that pass has written is dropped, and it begins again in
   chunks of half the size, which are kept to from there on.
6. What the base encodes for a store, which keeps it for good, is encoded one context at a time: then nothing about it
   depends on what came along with it but where it was cut, and a process that goes on from this one, and knows that,
   encodes it bit for bit again.
7. Processes that share a model's weights in shards encode at the same time, and run as many forwards as each other.
   They do not go on in smaller chunks.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from frozen_peft.context.adapter_kinds import require_adapters_by_position
from frozen_peft.context.boundary import MIN_DECISION_TOKENS, ContextTokens
from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.encoded import EncodedContext
from frozen_peft.context.halving import free_unused_memory, halved_chunk, out_of_memory_in_prefill
from frozen_peft.context.kernels import choose_kernels
from frozen_peft.context.keys import PrefixKey, prefix_keys
from frozen_peft.context.models import (
    get_pretrained_model,
    require_exact_continuation,
    require_separable_adapters,
    require_weights_at_hand,
)
from frozen_peft.context.modes import prefill_mode
from frozen_peft.context.prefill import extend_contexts, num_forwards
from frozen_peft.context.prefixes import PrefixPlan
from frozen_peft.context.rope import rope_limits
from frozen_peft.context.segments import is_segmented
from frozen_peft.context.sharding import are_sharded, num_missing_forwards, reshard, run_idle_forwards
from frozen_peft.context.store import AdapterWatch, ContextStore
from frozen_peft.context.writable import can_extend, keeps_all_keys

__all__ = ["ADAPTERS_OFF", "ContextEncoder", "EncoderCounts", "encode_context"]

logger = logging.getLogger(__name__)

EMPTY = EncodedContext(0, ())
# What contexts depend on besides a base that encodes them alone, see `ContextEncoder`.
ADAPTERS_OFF = "adapters off"


@dataclass
class EncoderCounts:
    """What an encoder has done.

    Attributes:
        num_tokens_asked: Tokens of the contexts that were asked for.
        num_tokens_encoded: Tokens that ran through the model for them.
    """

    num_tokens_asked: int = 0
    num_tokens_encoded: int = 0


@dataclass(frozen=True)
class _Extension:
    """Tokens to encode after a prefix.

    Attributes:
        prefix: What they follow on; None: nothing.
        tokens: Shape `(tokens,)`, int64.
        rope_length: How their positions are computed (see `rope`).
    """

    prefix: PrefixKey | None
    tokens: np.ndarray
    rope_length: int


@dataclass
class _Missing:
    """What has to be encoded, by the prefix that results.

    Attributes:
        owed: What the store owes, which comes before all else.
        new: What follows on that, or on what is at hand.
    """

    owed: dict[PrefixKey, _Extension] = field(default_factory=dict)
    new: dict[PrefixKey, _Extension] = field(default_factory=dict)

    @property
    def all(self) -> dict[PrefixKey, _Extension]:
        return self.owed | self.new


@dataclass(frozen=True)
class _Asked:
    """A context that is asked for.

    Attributes:
        tokens: Shape `(tokens,)`, int64.
        rope_length: See `_Extension`.
    """

    tokens: np.ndarray
    rope_length: int

    @property
    def key(self) -> PrefixKey | None:
        """Its key; None for one without tokens."""
        num_tokens = len(self.tokens)
        keys = prefix_keys(self.tokens, [num_tokens] if num_tokens else [], rope_length=self.rope_length)
        return keys.get(num_tokens)


class ContextEncoder:
    """Encodes contexts of one model, and remembers what is worth it.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.
        chunk_size: Context tokens per forward; 0 encodes what lies between two cuts in one forward.
        adapters: Whether adapters are active while contexts are encoded.
        decision_adapters: Whether they are active in the decisions' forward.
        store: Where encoded contexts are kept for later; None: nowhere.
        fixed: Says that nothing active while contexts are encoded is trained any more, so that they are good for ever:
            a digest of it, by which the store knows them. None: active adapters are in training.

    Raises:
        ValueError: `chunk_size` is negative, or `adapters=False` without a `PeftModel` or with adapters that would
            meet the context in the decision's forward, or adapters that act on parts of a sequence otherwise than on
            the whole, or the store keeps 8 bit and the model has no use for it.
        ContextMismatchError: transformers does not continue this architecture exactly from a cache.
        UnsupportedArchitectureError: The model has no cache to continue from.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        chunk_size: int = 2048,
        adapters: bool = True,
        decision_adapters: bool = True,
        store: ContextStore | None = None,
        fixed: str | None = None,
    ):
        if chunk_size < 0:
            raise ValueError(f"`prefill_chunk_size` must be 0 (one forward) or more, found {chunk_size}.")
        self._pretrained = get_pretrained_model(model)
        require_weights_at_hand(self._pretrained)
        require_exact_continuation(self._pretrained)
        choose_kernels(self._pretrained)
        if adapters or decision_adapters:
            require_adapters_by_position(model)
        if not adapters and decision_adapters:
            require_separable_adapters(self._pretrained)
        if store is not None and store.dtype == "int8" and not keeps_all_keys(self._pretrained):
            raise ValueError(
                f"`context_cache_dtype='int8'` is for keys and values of all context tokens, and no layer of "
                f"`{self._pretrained.config.get_text_config().model_type}` keeps those: contexts of any length are "
                "equally small. Leave `context_cache_dtype` at 'auto'."
            )
        self.model, self.chunk_size, self.adapters, self.store = model, chunk_size, adapters, store
        self.counts = EncoderCounts()
        self._fixed = fixed if adapters else ADAPTERS_OFF
        self._has_said_smaller = False
        self._can_extend = can_extend(self._pretrained)
        self.rope = rope_limits(self._pretrained)
        self._plan = PrefixPlan([])
        self._step = 0
        self._kept: dict[PrefixKey, EncodedContext] = {}
        self._watch = AdapterWatch()

    def expect(self, contexts: Sequence[torch.Tensor | ContextTokens], *, step: int = 0) -> None:
        """Announces all contexts that will be asked for in an optimizer step, in any order.

        What was announced before is forgotten.

        Args:
            contexts: See `encode`.
            step: Optimizer steps so far; contexts encoded at another one share nothing with these.
        """
        self._plan = self._planned(self._asked(contexts))
        self._step = step
        self._kept.clear()

    def read_ahead(self, contexts: Sequence[torch.Tensor | ContextTokens]) -> None:
        """Begins to fetch from the store what the batch after this one will need."""
        if self.store is not None:
            self.store.read_ahead([(asked.tokens, asked.rope_length) for asked in self._asked(contexts)])

    def forget(self) -> None:
        """Drops what is kept of earlier steps, but for contexts that are good for ever."""
        self._kept.clear()
        if self.store is not None:
            self.store.forget()

    def record(self) -> dict[str, Any] | None:
        """What is kept of earlier steps, see `ContextStore.record`; None: nothing that has to be known."""
        return self.store.record() if self.store is not None else None

    def restore(self, record: dict[str, Any]) -> None:
        """Goes on as the encoder whose `record` this is, where both have a store.

        Raises:
            ValueError: This is no record.
        """
        if self.store is not None and self._fixed is not None:
            self.store.restore(record)

    def encode(
        self, contexts: Sequence[torch.Tensor | ContextTokens], *, step: int = 0, stale: bool = True
    ) -> FrozenContext:
        """Encodes contexts, or finds them.

        Args:
            contexts: Token ids of each context, shape `(context tokens,)`, possibly empty for some, int64. A model
                whose rope follows the length of a forward (see `rope`) needs to know that of the sample
                (`ContextTokens`); without, it is taken for that of the context and a decision of two tokens.
            step: Optimizer steps so far, by which the store tells how old an entry is.
            stale: Whether entries of the store may be as old as it allows, or not at all.

        Returns:
            One row per context, in their order, on the model's device and in its dtype.

        Raises:
            ValueError: Every context is empty.
            UnsupportedArchitectureError: A sample is longer than the model's rope can be told of.
        """
        asked = self._asked(contexts)
        keys = [one.key for one in asked]
        self._open(step, stale)
        plan = self._plan
        if any(key is not None and key not in plan for key in keys):
            plan = self._planned(asked)
        found = dict(self._kept)
        missing = _Missing()
        for key, one in zip(keys, asked, strict=True):
            if key is not None:
                self._add_missing(plan.cuts(key), one, found, missing)
        self._extend(missing, found)
        for key in keys:
            if key is not None:
                plan.finish(key)
        self._kept = {key: context for key, context in found.items() if self._plan.is_to_come(key)}
        self.counts.num_tokens_asked += sum(len(one.tokens) for one in asked)
        self.counts.num_tokens_encoded += sum(len(each.tokens) for each in missing.all.values())
        rows = [found[key] if key is not None else EMPTY for key in keys]
        rope_lengths = [one.rope_length for one in asked]
        return FrozenContext(rows, segmented=is_segmented(self._pretrained), rope_lengths=rope_lengths)

    def encode_elsewhere(self, *, step: int = 0, stale: bool = True) -> None:
        """Takes part in what other processes encode, where this one has no context and weights are in shards.

        Args:
            step: See `encode`.
            stale: See `encode`.
        """
        if are_sharded(self.model):
            self._open(step, stale)
            self._extend(_Missing(), {})

    def _open(self, step: int, stale: bool) -> None:
        if step != self._step:
            self.expect([], step=step)
        reshard(self.model)
        changed = self._fixed is None and self._watch.has_changed(self.model, step)
        if changed:
            self._kept.clear()
        if self.store is not None:
            self.store.open(self.model, fixed=self._fixed, step=step, stale=stale, changed=changed)

    def _asked(self, contexts: Sequence[torch.Tensor | ContextTokens]) -> list[_Asked]:
        asked = []
        for context in contexts:
            if isinstance(context, torch.Tensor):
                context = ContextTokens(context, len(context) + MIN_DECISION_TOKENS)
            tokens = context.tokens.detach().cpu().numpy().astype(np.int64, copy=False)
            asked.append(_Asked(tokens, self.rope.rope_length(context.num_sample_tokens)))
        return asked

    def _planned(self, asked: Sequence[_Asked]) -> PrefixPlan:
        contexts, rope_lengths = [one.tokens for one in asked], [one.rope_length for one in asked]
        return PrefixPlan(contexts, rope_lengths, can_extend=self._can_extend)

    def _add_missing(
        self, cuts: tuple[PrefixKey, ...], asked: _Asked, found: dict[PrefixKey, EncodedContext], missing: _Missing
    ) -> None:
        """Adds what has to be encoded for one context to `missing`, and what the store has of it to `found`."""
        tokens, rope_length = asked.tokens, asked.rope_length
        base = next((cut for cut in reversed(cuts) if cut in found), None)
        if self.store is not None and base != cuts[-1]:
            num_known = base.num_tokens if base is not None else 0
            whole = not self._can_extend
            kept = self.store.find(tokens, found, rope_length=rope_length, longer_than=num_known, whole=whole)
            if kept is not None:
                base = _add_extensions(missing.owed, kept.prefix, kept.owed, asked)
            cuts = self.store.branch(tokens, cuts, rope_length=rope_length) if self._can_extend else cuts
        _add_extensions(missing.new, base, cuts, asked)

    def _extend(self, missing: _Missing, found: dict[PrefixKey, EncodedContext]) -> None:
        """Encodes what is missing and adds it to `found`."""
        groups = [*self._groups(missing.owed), *self._groups(missing.new)]
        extensions = missing.all
        sizes = [len(extensions[group[0]].tokens) for group in groups]
        num_idle = num_missing_forwards(self.model, sum(num_forwards(size, self.chunk_size) for size in sizes))
        if not groups and not num_idle:
            return
        with prefill_mode(self.model, adapters=self.adapters):
            for group in groups:
                members = [extensions[key] for key in group]
                encoded = self._encode_together(members, found)
                for key, member, context in zip(group, members, encoded, strict=True):
                    found[key] = context
                    if self.store is not None:
                        self.store.put(key, context, prefix=member.prefix)
            run_idle_forwards(self.model, num_idle)

    def _encode_together(
        self, members: list[_Extension], found: dict[PrefixKey, EncodedContext]
    ) -> list[EncodedContext]:
        """Encodes extensions of one shape: in one batch, and in smaller forwards where memory runs out."""
        prefixes = [found[member.prefix] for member in members if member.prefix is not None]
        tokens = torch.from_numpy(np.stack([member.tokens for member in members]))
        num_new, rope_length = tokens.shape[1], members[0].rope_length
        try:
            return extend_contexts(self.model, prefixes, tokens, chunk_size=self.chunk_size, rope_length=rope_length)
        except torch.OutOfMemoryError as error:
            num_forward_tokens = len(members) * min(self.chunk_size or num_new, num_new)
            # In the middle of a forward, the other processes wait for their part of it.
            smaller = None if are_sharded(self.model) else halved_chunk(num_forward_tokens)
            if smaller is None:
                num_tokens = num_new + (prefixes[0].num_tokens if prefixes else 0)
                raise out_of_memory_in_prefill(error, num_tokens, num_forward_tokens) from error
        # Not inside `except`: the exception holds what the forward held. What the failed pass has written goes with
        # it, since a cache belongs to one pass.
        free_unused_memory()
        self._use_chunks_of(smaller)
        size = max(smaller // num_new, 1)
        groups = [members[start : start + size] for start in range(0, len(members), size)]
        return [context for group in groups for context in self._encode_together(group, found)]

    def _use_chunks_of(self, num_tokens: int) -> None:
        """Encodes in smaller chunks from here on; says so once."""
        log = logger.info if self._has_said_smaller else logger.warning
        log(
            "The GPU ran out of memory while encoding contexts with `prefill_chunk_size=%d`: going on with %d, which "
            "changes the time and, up to rounding, nothing else.",
            self.chunk_size,
            num_tokens,
        )
        self._has_said_smaller = True
        self.chunk_size = num_tokens

    def _groups(self, extensions: dict[PrefixKey, _Extension]) -> list[list[PrefixKey]]:
        """Extensions to run together, prefixes before what follows on them: of one shape, within one chunk."""
        alone = self.store is not None and self._fixed is not None
        groups: list[list[PrefixKey]] = []
        waiting = list(extensions)
        while waiting:
            to_come = set(waiting)
            ready = [key for key in waiting if extensions[key].prefix not in to_come]
            by_shape: dict[tuple[int, int, int], list[PrefixKey]] = {}
            for key in ready:
                extension = extensions[key]
                shape = key.num_tokens, len(extension.tokens), extension.rope_length
                by_shape.setdefault(shape, []).append(key)
            for (_, num_new, _), members in by_shape.items():
                size = 1 if alone else max(self.chunk_size // num_new, 1)
                groups += [members[start : start + size] for start in range(0, len(members), size)]
            waiting = [key for key in waiting if extensions[key].prefix in to_come]
        return groups


def _add_extensions(
    extensions: dict[PrefixKey, _Extension], base: PrefixKey | None, ends: Sequence[PrefixKey], asked: _Asked
) -> PrefixKey | None:
    """Adds what leads from a prefix of a context to each of these ends of it, and gives the last that is reached."""
    for end in ends:
        start = base.num_tokens if base is not None else 0
        if end.num_tokens > start:
            extensions[end] = _Extension(base, asked.tokens[start : end.num_tokens], asked.rope_length)
            base = end
    return base


def encode_context(
    model: torch.nn.Module,
    contexts: Sequence[torch.Tensor | ContextTokens],
    *,
    chunk_size: int = 2048,
    adapters: bool = True,
) -> FrozenContext:
    """Encodes contexts once, without gradient; what several of them begin with is encoded once for all of them.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.
        contexts: See `ContextEncoder.encode`.
        chunk_size: Context tokens per forward; 0 encodes a context in one forward.
        adapters: Whether adapters are active while the context is encoded.

    Returns:
        One row per context, in their order, on the model's device and in its dtype.

    Raises:
        ValueError: Every context is empty, `chunk_size` is negative, or `adapters=False` without a `PeftModel` or with
            adapters that would meet the context in the decision's forward.
        ContextMismatchError: transformers does not continue this architecture exactly from a cache.
    """
    return ContextEncoder(model, chunk_size=chunk_size, adapters=adapters).encode(contexts)

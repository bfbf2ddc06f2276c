# SPDX-License-Identifier: Apache-2.0
"""Batches of samples as decisions over their frozen contexts: cut, announced, encoded, read ahead, counted."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from frozen_peft.config import ContextFields
from frozen_peft.context import (
    Carried,
    ContextEncoder,
    ContextStore,
    ContextTokens,
    DiskLevel,
    FrozenContext,
)
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.training.batches import BatchCutter, CuttingCollator, DecisionBatch, SampleBatch
from frozen_peft.training.checks import BatchChecks
from frozen_peft.training.metrics import ContextMetrics
from frozen_peft.utils.cache_argument import given_cache
from frozen_peft.utils.sizes import parse_size
from frozen_peft.utils.stopwatch import Mode

__all__ = ["FrozenContexts", "make_base_store", "make_store"]


def make_store(config: ContextFields, share: float = 1.0) -> ContextStore | None:
    """The store that a configuration asks for; None where it keeps nothing.

    Args:
        config: The configuration.
        share: Of the memory, where another one has the rest; 0: it keeps nothing, and rounds what another one keeps.
    """
    if config.gradient_horizon == -1:
        return None
    max_bytes, folder = int(share * parse_size(config.context_cache_size)), config.context_cache_dir if share else None
    staleness, dtype = config.max_context_staleness, config.context_cache_dtype
    if not max_bytes and folder is None and (share or dtype == "auto"):
        return None
    return ContextStore(max_bytes, DiskLevel.at(folder), max_staleness=staleness, dtype=dtype)


def make_base_store(size: str, folder: str | None) -> ContextStore | None:
    """A store for what the base encodes for a teacher, as large as the other one; None where it keeps nothing.

    Args:
        size: `context_cache_size`.
        folder: `context_cache_dir`; None: in memory alone.
    """
    max_bytes, disk = parse_size(size), DiskLevel.at(folder)
    return ContextStore(max_bytes, disk) if max_bytes or disk is not None else None


class FrozenContexts:
    """What a trainer does about the contexts of its batches; with `gradient_horizon=-1`, nothing.

    Args:
        model: With its adapters, without what an engine wraps it in.
        args: The configuration.
        cutter: Cuts batches.
        checks: Of contexts.
        accelerator: Of the training.
        encoder: Encodes contexts; None where none are frozen.
        name: Of contexts and figures, in logs.

    Attributes:
        encoder: See above.
        metrics: Of that.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: ContextFields,
        cutter: BatchCutter,
        checks: BatchChecks,
        accelerator: Accelerator,
        encoder: ContextEncoder | None,
        name: str = "context",
    ):
        self.cutter, self.encoder = cutter, encoder
        self._model, self._args, self._checks, self._accelerator, self._name = model, args, checks, accelerator, name
        self.metrics = ContextMetrics(encoder, args.device, name) if encoder is not None else None
        self._collator: CuttingCollator | None = None
        # Contexts of the micro-batches to come: of this step, and as far as it is known of the next.
        self._upcoming: list[list[ContextTokens]] = []

    def cutting(self, collator: Callable[[list[Any]], Any]) -> CuttingCollator:
        """A collator for training whose batches are cut.

        accelerate makes a batch ahead of the one it yields, so its last batch is the first one of the next step.
        """
        self._collator = CuttingCollator(collator, self.cutter)
        return self._collator

    def timed(self, mode: Mode) -> AbstractContextManager[None]:
        """Counts the time of a batch, its contexts included."""
        return self.metrics.step(mode) if self.metrics is not None else nullcontext()

    def follow(self, other: "FrozenContexts") -> None:
        """Reads ahead what another one's collator, which makes the batches of both, has made last."""
        self._collator = other._collator

    def expect(self, batches: Sequence[SampleBatch], *, step: int) -> None:
        """Announces the batches of an optimizer step."""
        if self.encoder is None:
            return
        self._upcoming = [batch.contexts for batch in batches]
        self.encoder.expect(list(itertools.chain(*self._upcoming)), step=step)
        if self._collator is not None and self._collator.last is not None:
            self._upcoming.append(self._collator.last.contexts)

    def read_ahead(self) -> None:
        """Lets the store fetch what the next micro-batch needs, while the one that begins is computed."""
        if self.encoder is None:
            return
        current, *following = self._upcoming or [[]]
        self._upcoming = following
        self.encoder.read_ahead([*current, *itertools.chain(*following[:1])])

    def freeze(self, part: DecisionBatch, *, step: int, mode: Mode, is_training: bool) -> list[FrozenContext]:
        """The frozen contexts of a batch's decisions, in the order of its `all_contexts`; none where it has none.

        Raises:
            ContextMismatchError: The decision over it is not what a plain forward gives.
        """
        if self.encoder is None or self.metrics is None:
            return []
        with self._accelerator.autocast():
            self._checks.check_contexts(
                self.encoder.model,
                part.contexts,
                lambda row: part["input_ids"][row][part["attention_mask"][row].bool()],
                name=f"{self._name}s",
                adapters=self.encoder.adapters,
            )
        if not part.contexts:
            with self.metrics.prefill(mode), self._accelerator.autocast():
                self.encoder.encode_elsewhere(step=step, stale=is_training)
            return []
        groups = list(part.all_contexts.values())
        frozen = self.encode(list(itertools.chain(*groups)), step=step, mode=mode, is_training=is_training)
        return frozen.split([len(group) for group in groups])

    def encode(self, contexts: Sequence[ContextTokens], *, step: int, mode: Mode, is_training: bool) -> FrozenContext:
        """Contexts that decisions are trained over, one of which has tokens; where none are frozen, for this once."""
        if self.encoder is None or self.metrics is None:
            return self.encode_as_now(contexts)
        with self.metrics.prefill(mode), self._accelerator.autocast():
            return self.encoder.encode(contexts, step=step, stale=is_training)

    def carried(self, part: DecisionBatch, *, step: int, mode: Mode, is_training: bool) -> list[Carried]:
        """A batch's decisions, and what `freeze` gives for them."""
        frozen = self.freeze(part, step=step, mode=mode, is_training=is_training)
        return [
            Carried.behind(contexts, each, part[f"{name}input_ids"])
            for (name, contexts), each in zip(part.all_contexts.items() if frozen else (), frozen, strict=True)
        ]

    def figures(self, mode: Mode, *, seconds_elsewhere: float = 0.0) -> dict[str, float]:
        """What `ContextMetrics.read` gives; nothing where no contexts are frozen."""
        return self.metrics.read(mode, seconds_elsewhere=seconds_elsewhere) if self.metrics is not None else {}

    def encode_as_now(self, contexts: Sequence[ContextTokens]) -> FrozenContext:
        """Contexts for a forward in which the adapters are not what they are in training."""
        with self._accelerator.autocast():
            return ContextEncoder(self._model, chunk_size=self._args.prefill_chunk_size).encode(contexts)

    def require_own_model(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        """Refuses to compute over contexts that another model encodes."""
        if self.encoder is None or get_pretrained_model(model) is get_pretrained_model(self.encoder.model):
            return
        if given_cache(inputs) is not None or self.cutter.cut(inputs).contexts:
            raise ValueError(
                "The decisions' model is not the one that encodes their contexts, which is the one that this trainer "
                "was made with. Make a trainer for the other model."
            )

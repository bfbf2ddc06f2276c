# SPDX-License-Identifier: Apache-2.0
"""Checks of the first batch, or of every batch, against plain forwards."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.utils import logging

from frozen_peft.config import ContextFields
from frozen_peft.context import ContextTokens, Decision, verify_context, verify_rounding
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.rope import rope_limits
from frozen_peft.context.sharding import same_everywhere
from frozen_peft.distillation import verify_head
from frozen_peft.gradient import MIN_TOKENS_TO_VERIFY, verify_stretches

__all__ = ["BatchChecks"]

logger = logging.get_logger(__name__)

TEACHER = "teacher"


class BatchChecks:
    """Compares what training computes with plain forwards, once or in every batch.

    Args:
        args: The configuration, whose `verify_context` says when.
    """

    def __init__(self, args: ContextFields):
        self._args = args
        self._verified: set[str] = set()

    def _is_due(self, name: str) -> bool:
        mode = self._args.verify_context
        return mode == "always" or (mode == "first_batch" and name not in self._verified)

    def _note(self, name: str, what: str, check: object) -> None:
        """Counts a check as made, and logs what it found."""
        self._verified.add(name)
        logger.info(f"{what}: {check}")

    def check_contexts(
        self,
        model: torch.nn.Module,
        contexts: Sequence[ContextTokens],
        decision: Callable[[int], torch.Tensor],
        *,
        name: str = "contexts",
        adapters: bool,
    ) -> None:
        """Compares the decision with the longest context with a plain forward.

        Where positions depend on a sample's length (see `context.rope`), that is once on each side of the limit.
        Processes that share weights in shards compare the longest of all of theirs, and have to call this together.

        Args:
            model: See `verify_context`.
            contexts: Of each decision; without any that is not empty, there is nothing to compare.
            decision: Gives the token ids of a decision, without padding, by its number.
            name: What they are; a teacher's are never kept in 8 bit.
            adapters: Whether adapters are active in them, see `verify_context`.

        Raises:
            ContextMismatchError: See `verify_context` and `verify_rounding`.
        """
        chunk_size = self._args.prefill_chunk_size
        limits = rope_limits(get_pretrained_model(model))
        names = {limit: f"{name} beyond {limit} tokens" if limit else name for limit in (0, *limits.all)}
        if not any(map(self._is_due, names.values())):
            return
        due = [
            row
            for row, context in enumerate(contexts)
            if len(context) and self._is_due(names[limits.crossed(context.num_sample_tokens)])
        ]
        own = None
        if due:
            row = max(due, key=lambda index: len(contexts[index]))
            own = len(contexts[row]), torch.cat([contexts[row].tokens, decision(row)])
        sample = same_everywhere(model, own)
        if sample is None:
            return
        boundary, input_ids = sample
        check = verify_context(model, input_ids, boundary, chunk_size=chunk_size, adapters=adapters)
        side = names[limits.crossed(len(input_ids))]
        self._note(side, "The decision over a frozen context agrees with a plain forward", check)
        if self._args.context_cache_dtype == "int8" and name != TEACHER:
            change = verify_rounding(model, input_ids, boundary, chunk_size=chunk_size, adapters=adapters)
            logger.info(f"What `context_cache_dtype='int8'` changes in it: {change}")

    def check_teacher(self, model: torch.nn.Module, decisions: Sequence[Decision]) -> None:
        """Compares the head that a distillation reads beside the model, and the teacher's longest context.

        Raises:
            ContextMismatchError: See `verify_head` and `verify_context`.
        """
        if self._is_due("head"):
            error = verify_head(model, decisions[0].input_ids)
            self._note("head", "The head gives the model's own log-probabilities, largest error", error)
        contexts = [decision.to_encode for decision in decisions]
        self.check_contexts(model, contexts, lambda row: decisions[row].input_ids, name=TEACHER, adapters=False)

    def check_stretches(self, model: torch.nn.Module, inputs: dict[str, Any], stretch_size: int) -> None:
        """Compares the longest sample of a batch, where one is long enough, with a plain forward and backward.

        Processes that share weights in shards compare the longest of all of theirs, and have to call this together.

        Raises:
            ContextMismatchError: See `verify_stretches`.
        """
        if not self._is_due("stretches"):
            return
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        row = int(mask.sum(-1).argmax())
        input_ids = inputs["input_ids"][row][mask[row]]
        sample = same_everywhere(model, (len(input_ids), input_ids))
        if sample is None or sample[0] < MIN_TOKENS_TO_VERIFY:
            return
        check = verify_stretches(model, sample[1], stretch_size)
        self._note("stretches", "The gradient in stretches agrees with that of a plain forward and backward", check)

# SPDX-License-Identifier: Apache-2.0
"""The teacher: the base model, with the instructions in its context."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from frozen_peft.context import ContextEncoder, ContextStore, Decision, decision_forward, pad_decisions
from frozen_peft.context.boundary import IGNORED_LABEL
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.context.modes import prefill_mode
from frozen_peft.context.rope import rows_of_lengths
from frozen_peft.distillation.answers import AnswerStore, decision_key
from frozen_peft.distillation.divergence import Answers, Divergence, select_answers
from frozen_peft.distillation.head import LogitHead
from frozen_peft.utils.cache_argument import as_cache_argument

__all__ = ["Teacher", "TeacherCounts", "predicted_labels"]


@dataclass
class TeacherCounts:
    """What a teacher has done.

    Attributes:
        num_asked: Decisions that it was asked about.
        num_computed: Decisions that ran through the model for that.
    """

    num_asked: int = 0
    num_computed: int = 0


class Teacher:
    """Says what the base model would have said at a decision's supervised tokens.

    Args:
        model: A `PeftModel`, which is run with its adapters off, without dropout and without gradient.
        divergence: What is to be kept of its answers.
        answers: Where they are kept.
        chunk_size: Context tokens per forward of prefill; 0: one forward.
        store: Where its encoded contexts are kept; None: nowhere.

    Raises:
        ValueError, ContextMismatchError, UnsupportedArchitectureError: See `ContextEncoder`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        divergence: Divergence,
        answers: AnswerStore,
        *,
        chunk_size: int = 2048,
        store: ContextStore | None = None,
    ):
        self._model = model
        self._divergence = divergence
        self._answers = answers
        self._encoder = ContextEncoder(
            model, chunk_size=chunk_size, adapters=False, decision_adapters=False, store=store
        )
        self.counts = TeacherCounts()

    @property
    def head(self) -> LogitHead:
        """The base model's head."""
        return LogitHead.of(get_pretrained_model(self._model), adapters=False)

    def expect(self, decisions: Sequence[Decision]) -> None:
        """Announces the decisions of an optimizer step, whose contexts may begin alike."""
        self._answers.open(self._model, self._divergence)
        missing = [decision for decision in decisions if self._answers.find(decision_key(decision)) is None]
        # Its contexts are those of every step: the base model does not learn.
        self._encoder.expect([decision.to_encode for decision in missing if len(decision.context)])

    def forget(self) -> None:
        """Drops the answers that are kept in memory alone."""
        self._answers.forget()
        self._encoder.forget()

    def record(self) -> dict[str, Any] | None:
        """What is kept of its contexts, see `ContextStore.record`."""
        return self._encoder.record()

    def restore(self, record: dict[str, Any]) -> None:
        """Goes on as the teacher whose `record` this is.

        Raises:
            ValueError: This is no record.
        """
        self._encoder.restore(record)

    def answer(self, decisions: Sequence[Decision]) -> list[Answers]:
        """What the teacher says about the supervised tokens of each decision, in their order."""
        self._answers.open(self._model, self._divergence)
        keys = [decision_key(decision) for decision in decisions]
        found = {key: answers for key in keys if (answers := self._answers.find(key)) is not None}
        missing = {key: decision for key, decision in zip(keys, decisions, strict=True) if key not in found}
        if missing:
            computed = self._compute(list(missing.values()))
            for key, answers in zip(missing, computed, strict=True):
                self._answers.put(key, answers)
                found[key] = answers
        self.counts.num_asked += len(decisions)
        self.counts.num_computed += len(missing)
        return [found[key] for key in keys]

    def _compute(self, decisions: list[Decision]) -> list[Answers]:
        batch = pad_decisions(decisions)
        contexts = [decision.to_encode for decision in decisions]
        frozen = self._encoder.encode(contexts) if batch.num_context_tokens else None
        pretrained = get_pretrained_model(self._model)
        decoder = get_decoder(pretrained)
        rows = rows_of_lengths(pretrained, [context.num_sample_tokens for context in contexts])
        with prefill_mode(self._model, adapters=False), rows, decision_forward(self._model):
            hidden = decoder(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                **as_cache_argument(decoder, frozen),
                use_cache=False,
            ).last_hidden_state
            predicting = batch.labels[:, 1:] != IGNORED_LABEL
            answers = self._divergence.answers(hidden[:, :-1][predicting], self.head)
        stops = predicting.sum(-1).cumsum(0).tolist()
        return [
            select_answers(answers, slice(start, stop)) for start, stop in zip([0, *stops[:-1]], stops, strict=True)
        ]


def predicted_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels of one row `(tokens,)` that an output predicts, in their order."""
    return labels[1:][labels[1:] != IGNORED_LABEL]

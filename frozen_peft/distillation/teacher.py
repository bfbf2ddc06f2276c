# SPDX-License-Identifier: Apache-2.0
"""The teacher: the base model, with the instructions in its context, and what it said.

Its answers are kept across epochs in host memory and across runs in files. One is what is kept of the teacher for one
decision, under the digest of its tokens, with its context's and which of them are supervised, and a *namespace*: the
digest of everything else that it depends on. Nothing of it ever goes stale, since the teacher does not learn.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache
from transformers.utils import logging

from frozen_peft.context import ContextEncoder, ContextFiles, ContextStore, Decision, decision_forward, pad_decisions
from frozen_peft.context.boundary import IGNORED_LABEL
from frozen_peft.context.keys import PrefixKey, prefix_keys
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.context.modes import prefill_mode
from frozen_peft.context.rope import rows_of_lengths
from frozen_peft.context.store import base_fingerprint, base_state, run_fingerprint
from frozen_peft.distillation.divergence import Answers, Divergence, select_answers
from frozen_peft.distillation.head import LogitHead
from frozen_peft.utils.cache_argument import as_cache_argument

__all__ = ["AnswerStore", "Teacher", "decision_key"]

logger = logging.get_logger(__name__)

# Changes where entries of one version cannot be read as those of another.
VERSION = "1"
# No token and no label has this number.
SEPARATOR = np.array([-1])


class AnswerStore:
    """Keeps the teacher's answers.

    Args:
        max_bytes: Budget in host memory.
        files: Where answers are written as well; None: nowhere.
    """

    def __init__(self, max_bytes: int, files: ContextFiles | None = None):
        self._memory: LRUCache[tuple[str, PrefixKey], Answers] = LRUCache(max_bytes, getsizeof=_num_bytes)
        # That it does not hold them all is said once, and not where files do.
        self._is_quiet = files is not None
        self._files = files
        self._namespace = ""
        self._base = ""
        self._base_state: tuple[object, ...] | None = None

    def open(self, model: torch.nn.Module, divergence: Divergence) -> None:
        """Settles under which namespace answers are found from here on."""
        state = base_state(model)
        if state != self._base_state:
            self._base, self._base_state = base_fingerprint(model), state
        # Hidden states, which stand for the whole vocabulary, know no temperature.
        kept = f"{divergence.top_k} {divergence.temperature}" if divergence.top_k else "hidden"
        text = f"answers {VERSION} {self._base} {run_fingerprint(model)} {kept}"
        self._namespace = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def find(self, key: PrefixKey) -> Answers | None:
        """Answers in host memory; None where there are none."""
        entry = (self._namespace, key)
        found = self._memory.get(entry)
        if found is None and self._files is not None:
            read = self._files.read(*entry)
            found = read[0] if read is not None else None
            self._remember(entry, found)
        return found

    def put(self, key: PrefixKey, answers: Answers) -> None:
        """Keeps answers where there is room for them."""
        # Tensors of their own: a part of a batch's would keep all of it.
        own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in answers.items()}
        entry = (self._namespace, key)
        self._remember(entry, own)
        if self._files is not None:
            self._files.write(*entry, own, {})

    def forget(self) -> None:
        """Drops the answers that are kept in memory alone; those in files are found again as they were."""
        if self._files is None:
            self._memory.clear()

    def _remember(self, entry: tuple[str, PrefixKey], answers: Answers | None) -> None:
        if answers is None or _num_bytes(answers) > self._memory.maxsize:
            return
        num_kept = len(self._memory)
        self._memory[entry] = answers
        if len(self._memory) <= num_kept and not self._is_quiet:
            self._is_quiet = True
            logger.warning(
                f"What the teacher says takes more than `distill_cache_size` ({int(self._memory.maxsize)} bytes): the "
                "least recently used is dropped, and computed again in the next epoch. Raise it, set "
                "`distill_cache_dir`, or lower `distill_top_k`."
            )


def decision_key(decision: Decision) -> PrefixKey:
    """The name of a decision: its context, its tokens, and which of them are supervised."""
    parts = (decision.context, decision.input_ids, decision.labels)
    context, tokens, labels = (part.detach().cpu().numpy().astype(np.int64) for part in parts)
    row = np.concatenate([context, SEPARATOR, tokens, SEPARATOR, labels])
    return prefix_keys(row, [len(row)])[len(row)]


def _num_bytes(answers: Answers) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in answers.values())


class Teacher:
    """Says what the base model would have said at a decision's supervised tokens.

    Args:
        model: A `PeftModel`, which is run with its adapters off, without dropout and without gradient.
        divergence: What is to be kept of its answers.
        answers: Where they are kept.
        chunk_size: Context tokens per forward of prefill; 0: one forward.
        store: Where its encoded contexts are kept; None: nowhere.

    Attributes:
        num_asked: Decisions of the data that it was asked about, since the last batch.
        num_computed: Decisions that ran through the model for that.

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
        self.num_asked = self.num_computed = 0

    @property
    def head(self) -> LogitHead:
        """The base model's head."""
        return LogitHead.of(get_pretrained_model(self._model), adapters=False)

    def expect(self, decisions: Sequence[Decision]) -> None:
        """Announces the decisions of an optimizer step, whose contexts may begin alike."""
        self._answers.open(self._model, self._divergence)
        missing = [decision for decision in decisions if self._found(decision) is None]
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
        asked = dict(zip(keys, decisions, strict=True))
        found = {key: answers for key, each in asked.items() if (answers := self._found(each)) is not None}
        missing = {key: decision for key, decision in asked.items() if key not in found}
        if missing:
            computed = self._compute(list(missing.values()))
            for (key, decision), answers in zip(missing.items(), computed, strict=True):
                if not decision.is_written:
                    self._answers.put(key, answers)
                found[key] = answers
        self.num_asked += sum(not decision.is_written for decision in decisions)
        self.num_computed += sum(not decision.is_written for decision in missing.values())
        return [found[key] for key in keys]

    def _found(self, decision: Decision) -> Answers | None:
        """What is kept about a decision; nothing is about one that will not come again."""
        return None if decision.is_written else self._answers.find(decision_key(decision))

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

# SPDX-License-Identifier: Apache-2.0
"""What the teacher said, kept across epochs in host memory and across runs in files.

An entry is what is kept of the teacher for one decision, under the digest of its tokens, with its context's and which
of them are supervised, and a *namespace*: the digest of everything else that it depends on. Nothing of it ever goes
stale, since the teacher does not learn.
"""

import hashlib

import numpy as np
import torch
from cachetools import LRUCache
from transformers.utils import logging

from frozen_peft.context import ContextFiles, Decision
from frozen_peft.context.keys import PrefixKey, prefix_keys
from frozen_peft.context.store import base_fingerprint, base_state, run_fingerprint
from frozen_peft.distillation.divergence import Answers, Divergence

__all__ = ["AnswerStore", "decision_key"]

logger = logging.get_logger(__name__)

# Changes where entries of one version cannot be read as those of another.
VERSION = "1"
# No token and no label has this number.
SEPARATOR = np.array([-1])


class _Memory(LRUCache):
    """Answers within a budget of bytes; says once that it does not hold them all."""

    def __init__(self, max_bytes: int, *, has_files: bool):
        super().__init__(max_bytes, getsizeof=_num_bytes)
        self._is_quiet = has_files

    def popitem(self) -> tuple[tuple[str, PrefixKey], Answers]:
        if not self._is_quiet:
            self._is_quiet = True
            logger.warning(
                f"What the teacher says takes more than `distill_cache_size` ({int(self.maxsize)} bytes): the least "
                "recently used is dropped, and computed again in the next epoch. Raise it, set `distill_cache_dir`, "
                "or lower `distill_top_k`."
            )
        return super().popitem()


class AnswerStore:
    """Keeps the teacher's answers.

    Args:
        max_bytes: Budget in host memory.
        files: Where answers are written as well; None: nowhere.
    """

    def __init__(self, max_bytes: int, files: ContextFiles | None = None):
        self._memory = _Memory(max_bytes, has_files=files is not None)
        self._files = files
        self._namespace = ""
        self._base = ""
        self._base_state: tuple[object, ...] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the answers in memory."""
        return int(self._memory.currsize)

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
            # `clear` would take them for answers that there is no room for.
            for entry in list(self._memory):
                del self._memory[entry]

    def _remember(self, entry: tuple[str, PrefixKey], answers: Answers | None) -> None:
        if answers is not None and _num_bytes(answers) <= self._memory.maxsize:
            self._memory[entry] = answers


def decision_key(decision: Decision) -> PrefixKey:
    """The name of a decision: its context, its tokens, and which of them are supervised."""
    parts = (decision.context, decision.input_ids, decision.labels)
    context, tokens, labels = (part.detach().cpu().numpy().astype(np.int64) for part in parts)
    row = np.concatenate([context, SEPARATOR, tokens, SEPARATOR, labels])
    return prefix_keys(row, [len(row)])[len(row)]


def _num_bytes(answers: Answers) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in answers.values())

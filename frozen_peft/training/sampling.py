# SPDX-License-Identifier: Apache-2.0
"""Brings samples whose contexts begin alike into the same optimizer step, where the shared part is encoded once.

1. `group_by_shared_prefix` reads each row's context from a prepared dataset and groups rows by their common prefixes,
   on two levels: a group, such as all rows under one system prompt, and closer groups in it, such as the rows of one
   document under that prompt.
2. `GroupByContextSampler` orders an epoch: it distributes samples over steps that they fill exactly, the members of a
   group over as few steps as it can, and in the same way the samples of a step over processes, since every process
   encodes for itself.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers.utils import logging

from frozen_peft.config import ContextFields
from frozen_peft.context import Cut
from frozen_peft.context.boundary import DecisionMode
from frozen_peft.context.branches import BRANCHES
from frozen_peft.context.start import NO_START, ContextStart
from frozen_peft.training.pairs import PROMPT
from frozen_peft.training.samples import measure_row, row_sequences
from frozen_peft.utils.numpy_rows import numpy_rows

__all__ = ["GroupByContextSampler", "group_by_shared_prefix", "make_sampler", "require_groupable"]

logger = logging.get_logger(__name__)

# Big-endian, so that comparing bytes compares token ids in order.
TOKEN_TYPE = np.dtype(">u4")
# A shorter common prefix, such as the opening of a chat template, is not worth a place in the same step.
MIN_SHARED_TOKENS = 16


def require_groupable(dataset: Any) -> None:
    """Refuses a training dataset that `group_by_context` cannot order.

    Raises:
        ValueError: The dataset is neither None nor a `datasets.Dataset`, whose rows can be read in any order.
    """
    if dataset is not None and not isinstance(dataset, Dataset):
        raise ValueError(
            "`group_by_context=True` reads every context before training and orders the rows, which takes a "
            f"`datasets.Dataset`; found `{type(dataset).__name__}`. Load the dataset without streaming, or leave "
            "`group_by_context` at False."
        )


def group_by_shared_prefix(
    dataset: Dataset,
    *,
    decision_mode: DecisionMode = "tail",
    max_context_length: int | None = None,
    start: ContextStart = NO_START,
) -> np.ndarray:
    """Groups the rows of a prepared dataset by common prefixes of their contexts.

    Rows are sorted by their context's tokens. Neighbours belong to one group when their common prefix covers at least
    half of the shorter context and 16 tokens. Within a group they belong closer together when the same holds of what
    follows the prefix that the whole group shares. A row without context is a group of its own.

    For n rows of at most L context tokens this takes O(n log n) comparisons of O(L), and memory of 4 bytes per
    context token of the dataset.

    Args:
        dataset: Has the columns `input_ids` and `labels`; without labels, no row has a context. Or `prompt_ids`, whose
            last token belongs to the answers.
        decision_mode: As the trainer's: "tail" takes as context what is before the boundary of the first supervised
            span, "turns" what is before that of the last.
        max_context_length: As the trainer's: only this many context tokens are kept, dropping the oldest.
        start: What stays of a context's beginning all the same.

    Returns:
        Group and closer group of each row, shape `(rows, 2)`, int64; closer groups are numbered across groups.

    Raises:
        ValueError: The dataset has neither.
    """
    if not {"input_ids", PROMPT} & set(dataset.column_names):
        raise ValueError(
            "`group_by_context=True` needs a dataset with `input_ids`, as TRL prepares it; found the columns "
            f"{', '.join(f'`{name}`' for name in dataset.column_names)}. Let TRL prepare it, or leave "
            "`group_by_context` at False."
        )
    contexts = list(_read_contexts(dataset, Cut(decision_mode, max_context_length=max_context_length, start=start)))
    groups = np.zeros((len(contexts), 2), dtype=np.int64)
    num_closer = 0
    for group, run in enumerate(_runs(sorted(range(len(contexts)), key=contexts.__getitem__), contexts)):
        shared = _common_prefix(contexts[run[0]], contexts[run[-1]])
        for closer in _runs(run, contexts, beyond=shared):
            groups[closer] = group, num_closer
            num_closer += 1
    return groups


def _longest_context(row: dict[str, Any], index: int, cut: Cut) -> np.ndarray:
    """Of the decisions of a row, the context of the one with the most."""
    lengths = [sample.context for sample in measure_row(row, index, Cut(cut.mode))]
    longest = int(np.argmax(lengths))
    tokens = row_sequences(row)[longest][0].numpy() if BRANCHES in row else row["input_ids"]
    return tokens[: lengths[longest]]


def _read_contexts(dataset: Dataset, cut: Cut) -> Iterator[bytes]:
    """The context of each row, 4 bytes per token."""
    names = (PROMPT,) if PROMPT in dataset.column_names else ("input_ids", "labels", BRANCHES)
    for index, row in enumerate(
        tqdm(numpy_rows(dataset, names), "Grouping contexts", len(dataset), unit=" rows", delay=2)
    ):
        context = row[PROMPT][:-1] if PROMPT in row else _longest_context(row, index, cut)
        kept = cut.kept(context, cut.num_excess(len(context), len(context)))
        yield kept.astype(TOKEN_TYPE).tobytes()


def _runs(rows: list[int], contexts: list[bytes], beyond: int = 0) -> Iterator[list[int]]:
    """Cuts sorted rows where neighbours do not belong together."""
    run = rows[:1]
    for row in rows[1:]:
        if _belong(contexts[run[-1]], contexts[row], beyond):
            run.append(row)
        else:
            yield run
            run = [row]
    if run:
        yield run


def _belong(left: bytes, right: bytes, beyond: int) -> bool:
    """Whether two contexts share enough of what follows their first `beyond` bytes, which are the same."""
    shorter = min(len(left), len(right)) - beyond
    size = TOKEN_TYPE.itemsize
    needed = max(MIN_SHARED_TOKENS, -(-shorter // (2 * size))) * size
    return shorter >= needed and left[: beyond + needed] == right[: beyond + needed]


def _common_prefix(left: bytes, right: bytes) -> int:
    """Bytes of the tokens that two contexts begin with alike."""
    length = min(len(left), len(right))
    differ = np.frombuffer(left[:length], TOKEN_TYPE) != np.frombuffer(right[:length], TOKEN_TYPE)
    return int(differ.argmax()) * TOKEN_TYPE.itemsize if differ.any() else length


class GroupByContextSampler(torch.utils.data.Sampler[int]):
    """Every index once per epoch, in an order that brings the members of a group into the same optimizer steps.

    The order is random and depends on nothing but the arguments and the epoch, so that every process draws the same
    one and a resumed run continues it. Steps come in random order, the incomplete one last.

    Args:
        groups: Group of each sample, shape `(samples,)`; or, from the widest to the closest, a group on each of
            several levels, shape `(samples, levels)`, those of a level lying within those of the level before.
        batch_size: Samples of a micro-batch on one process.
        accumulation_steps: Micro-batches of a step.
        num_processes: Processes that take micro-batches in turn, as accelerate hands them out.
        seed: Of the order.
        drop_last: The incomplete step may not be trained on, so its samples are drawn at random; otherwise it holds
            what fills no step, which may be the same few samples in every epoch.
    """

    def __init__(
        self,
        groups: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        seed: int = 0,
        drop_last: bool = False,
    ):
        levels = np.asarray(groups, dtype=np.int64)
        self._groups = levels[:, None] if levels.ndim == 1 else levels
        self._batch_size = batch_size
        self._num_processes = num_processes
        self._step_size = batch_size * accumulation_steps * num_processes
        self._seed = seed
        self._drop_last = drop_last
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order that the next iteration follows."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self._seed, self._epoch])
        samples = generator.permutation(len(self._groups))
        incomplete = []
        if self._drop_last and len(samples) % self._step_size:
            samples, drawn = np.split(samples, [len(samples) - len(samples) % self._step_size])
            incomplete = [drawn]
        steps = self._distribute(samples, _divide(len(samples), self._step_size))
        if steps and len(steps[-1]) < self._step_size:
            incomplete = [steps.pop()]
        for index in generator.permutation(len(steps)):
            yield from self._across_processes(steps[index]).tolist()
        for step in incomplete:
            yield from self._across_processes(step).tolist()

    def _across_processes(self, step: np.ndarray) -> np.ndarray:
        """Orders a step so that members of a group go to the same process where they can."""
        places = np.arange(len(step))
        processes = places // self._batch_size % self._num_processes
        capacities = np.bincount(processes)
        ordered = np.empty_like(step)
        ordered[np.argsort(processes, kind="stable")] = np.concatenate(self._distribute(step, capacities.tolist()))
        return ordered

    def _distribute(self, samples: np.ndarray, capacities: list[int], level: int = 0) -> list[np.ndarray]:
        """Distributes samples over bins that they fill exactly, each group of a level over as few bins as it can.

        Args:
            samples: Indices of samples; groups of one size are taken in the order in which they appear.
            capacities: Samples that each bin takes, in all as many as there are.
            level: Level of the widest groups to keep together. Closer ones are kept together within their parts.
        """
        if level == self._groups.shape[1]:
            return np.split(samples, np.cumsum(capacities)[:-1])
        parts = []
        for group in _split_by(samples, self._groups[samples, level]):
            if len(group) == 1:
                parts.append(group)
            else:
                parts += self._distribute(group, _divide(len(group), max(capacities)), level + 1)
        return _pack(parts, capacities)


def make_sampler(
    dataset: Dataset,
    config: ContextFields,
    *,
    batch_size: int,
    num_processes: int,
    start: ContextStart = NO_START,
) -> GroupByContextSampler:
    """The sampler that `group_by_context` asks for, with a word on what it found.

    Args:
        dataset: A prepared dataset.
        config: The configuration of the training.
        batch_size: Samples per process and micro-batch.
        num_processes: Processes that train.
        start: What stays of a context's beginning where it is cut.
    """
    groups = group_by_shared_prefix(
        dataset, decision_mode=config.decision_mode, max_context_length=config.max_context_length, start=start
    )
    num_groups = len(set(groups[:, 0].tolist()))
    if num_groups == len(dataset):
        logger.warning("`group_by_context=True` has no effect: no two contexts begin alike for long enough.")
    else:
        logger.info(f"`group_by_context`: {len(dataset)} samples in {num_groups} groups.")
    return GroupByContextSampler(
        groups,
        batch_size=batch_size,
        accumulation_steps=config.gradient_accumulation_steps,
        num_processes=num_processes,
        seed=config.seed if config.data_seed is None else config.data_seed,
        drop_last=config.dataloader_drop_last,
    )


def _divide(total: int, size: int) -> list[int]:
    """`total` in parts of `size`, what remains last."""
    return [size] * (total // size) + [total % size] * (total % size > 0)


def _split_by(samples: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Samples by key, keys and samples in the order in which they appear."""
    if not len(samples):
        return []
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    appearance = first[inverse]
    order = np.argsort(appearance, kind="stable")
    return np.split(samples[order], np.flatnonzero(np.diff(appearance[order])) + 1)


def _pack(parts: list[np.ndarray], capacities: list[int]) -> list[np.ndarray]:
    """Fills bins: the largest part first, into the fullest bin with room for it; one that fits nowhere is cut."""
    bins: list[list[np.ndarray]] = [[] for _ in capacities]
    rooms = sorted((capacity, index) for index, capacity in enumerate(capacities))
    for part in sorted(parts, key=len, reverse=True):
        while len(part):
            place = min(bisect_left(rooms, (len(part), 0)), len(rooms) - 1)
            room, index = rooms.pop(place)
            bins[index].append(part[:room])
            if room > len(part):
                insort(rooms, (room - len(part), index))
            part = part[room:]
    return [np.concatenate(content) for content in bins]

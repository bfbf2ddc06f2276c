# SPDX-License-Identifier: Apache-2.0
"""Groups of contexts that begin alike, and the order that brings them into the same steps."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from frozen_peft.training.sampling import GroupByContextSampler, group_by_shared_prefix, require_groupable

IGNORED = -100
SUPERVISED_TAIL = 3


def sampler(groups: Any, epoch: int = 0, **fields: Any) -> GroupByContextSampler:
    made = GroupByContextSampler(groups, **({"batch_size": 2} | fields))
    made.set_epoch(epoch)
    return made


def cut(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def num_parts(order: Sequence[int], groups: Sequence[int], size: int) -> int:
    """Pairs of a step and a group that has members in it."""
    return sum(len({groups[index] for index in step}) for step in cut(order, size))


def groups_of(sizes: Sequence[int]) -> list[int]:
    return [group for group, size in enumerate(sizes) for _ in range(size)]


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, Any]]:
    """Nested groups on one or two levels, and the arguments of a sampler."""
    closer = draw(st.lists(st.integers(0, 12), max_size=60))
    levels = draw(st.sampled_from([1, 2]))
    groups = np.array([[one // 4, one] for one in closer], dtype=np.int64).reshape(-1, 2)[:, 2 - levels :]
    positive = st.integers(1, 4)
    fields = {name: draw(positive) for name in ("batch_size", "accumulation_steps", "num_processes")}
    return groups, {**fields, "seed": draw(st.integers(0, 2**40)), "drop_last": draw(st.booleans())}


@given(arrangements(), st.integers(0, 5))
def test_every_index_comes_once_and_in_the_same_order_again(
    arrangement: tuple[np.ndarray, dict[str, Any]], epoch: int
) -> None:
    groups, fields = arrangement
    order = list(sampler(groups, epoch, **fields))
    assert sorted(order) == list(range(len(groups)))
    assert all(type(index) is int for index in order)
    again = sampler(groups.tolist(), 9, **fields)
    assert len(again) == len(groups)
    list(again)
    again.set_epoch(epoch)
    assert list(again) == list(again) == order


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    groups = groups_of([4] * 16)
    orders = {tuple(sampler(groups, epoch, seed=seed)) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25


def test_without_groups_every_sample_comes_everywhere() -> None:
    orders = np.array([list(sampler(range(6), epoch)) for epoch in range(600)])
    counts = np.array([np.bincount(column, minlength=6) for column in orders.T])
    # 100 expected, with a standard deviation of 9.
    assert counts.min() > 60
    assert counts.max() < 140


@cache
def fewest_parts(sizes: tuple[int, ...], step_size: int) -> int:
    """By trying every way to fill the next step from groups of these sizes."""
    if not sizes:
        return 0
    step = min(step_size, sum(sizes))
    best = sum(sizes)
    for taken in itertools.product(*(range(size + 1) for size in sizes)):
        if sum(taken) == step:
            left = tuple(sorted(size - part for size, part in zip(sizes, taken, strict=True) if size > part))
            best = min(best, sum(part > 0 for part in taken) + fewest_parts(left, step_size))
    return best


def partitions(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    if total == 0:
        yield ()
    for first in range(min(total, largest), 0, -1):
        for rest in partitions(total - first, first):
            yield (first, *rest)


def test_groups_lie_in_about_as_few_steps_as_there_can_be() -> None:
    """All ways to group up to nine samples: mostly the fewest parts, and never more than one above."""
    excess: Counter[int] = Counter()
    for total, step_size in itertools.product(range(1, 10), (2, 3, 4, 5)):
        for sizes in partitions(total, total):
            groups = groups_of(sizes)
            order = list(sampler(groups, batch_size=step_size))
            excess[num_parts(order, groups, step_size) - fewest_parts(tuple(sorted(sizes)), step_size)] += 1
    assert excess.keys() <= {0, 1}
    assert excess[0] >= 0.99 * excess.total()


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 100),
)
def test_groups_that_divide_a_step_are_never_cut(
    kinds: list[int], num_processes: int, accumulation_steps: int, seed: int
) -> None:
    """Each size divides the next, up to what a process takes of a step, a step and two steps."""
    fields = {"batch_size": 4, "accumulation_steps": accumulation_steps, "num_processes": num_processes, "seed": seed}
    on_process = 4 * accumulation_steps
    step_size = on_process * num_processes
    sizes = [(1, 2, 4, on_process, step_size, 2 * step_size)[kind] for kind in kinds]
    groups = groups_of(sizes)
    order = list(sampler(groups, **fields))
    fewest = sum(-(-size // step_size) for size in sizes)
    assert num_parts(order, groups, step_size) == fewest
    for step in cut(order, step_size)[: len(order) // step_size]:
        places = {group: set() for group in groups}
        for batch, members in enumerate(cut(step, 4)):
            for index in members:
                places[groups[index]].add(batch % num_processes)
        counts = Counter(groups[index] for index in step)
        assert all(len(places[group]) == -(-count // on_process) for group, count in counts.items())


def test_closer_groups_stay_together_within_a_group_of_many_steps() -> None:
    """Eight documents of four rows behind each of three prompts, over two processes with room for four rows each."""
    rows = [(prompt, 8 * prompt + document) for prompt in range(3) for document in range(8) for _ in range(4)]
    order = list(sampler(rows, accumulation_steps=2, num_processes=2))
    steps = cut([rows[index] for index in order], 8)
    assert all(len({prompt for prompt, _ in step}) == 1 for step in steps)
    assert all(len({document for _, document in step}) == 2 for step in steps)
    for step in steps:
        assert len({document for _, document in step[0:2] + step[4:6]}) == 1


def test_the_incomplete_step_comes_last() -> None:
    groups = groups_of([4] * 8 + [3])
    for epoch in range(20):
        steps = cut(list(sampler(groups, epoch, batch_size=4)), 4)
        assert [groups[index] for index in steps[-1]] == [8, 8, 8]
        assert all(len({groups[index] for index in step}) == 1 for step in steps)


def test_what_may_be_dropped_changes_from_epoch_to_epoch() -> None:
    groups = groups_of([4] * 4 + [1])
    assert {list(sampler(groups, epoch, batch_size=4))[-1] for epoch in range(50)} == {16}
    dropped = {list(sampler(groups, epoch, batch_size=4, drop_last=True))[-1] for epoch in range(200)}
    assert dropped == set(range(17))


def dataset_of(contexts: Sequence[Sequence[int]]) -> Dataset:
    """A row per context, each with another decision behind it; the boundary token belongs to the decision."""
    rows = [[*context, *[90 + row] * (1 + SUPERVISED_TAIL)] for row, context in enumerate(contexts)]
    labels = [[IGNORED] * (len(row) - SUPERVISED_TAIL) + row[-SUPERVISED_TAIL:] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def partition(groups: Sequence[int]) -> set[frozenset[int]]:
    members: dict[int, set[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(int(group), set()).add(row)
    return {frozenset(rows) for rows in members.values()}


def num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))))


def expected_partitions(contexts: Sequence[list[int]]) -> tuple[set[frozenset[int]], set[frozenset[int]]]:
    """Groups and closer groups, token by token on lists."""
    wide, close = [], []
    for run in runs_by_hand(sorted(range(len(contexts)), key=lambda row: contexts[row]), contexts, 0):
        wide.append(frozenset(run))
        shared = min(num_shared(contexts[left], contexts[right]) for left in run for right in run)
        close += [frozenset(closer) for closer in runs_by_hand(run, contexts, shared)]
    return set(wide), set(close)


def runs_by_hand(rows: list[int], contexts: Sequence[list[int]], beyond: int) -> list[list[int]]:
    found: list[list[int]] = []
    for row in rows:
        if found:
            left, right = contexts[found[-1][-1]][beyond:], contexts[row][beyond:]
            shared = num_shared(left, right)
            if shared >= 16 and shared >= min(len(left), len(right)) / 2:
                found[-1].append(row)
                continue
        found.append([row])
    return found


TOKENS = st.sampled_from([1, 2, 255, 256, 40_000, 151_000])
DOCUMENTS = [np.random.default_rng(seed).integers(0, 152_000, 60).tolist() for seed in range(3)]


@st.composite
def rows_with_labels(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Rows that begin like a document and another one behind it, with supervised spans anywhere."""
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        ids = DOCUMENTS[draw(st.integers(0, 2))][: draw(st.sampled_from([0, 15, 16, 17, 40, 60]))]
        ids = ids + DOCUMENTS[draw(st.integers(0, 2))][: draw(st.sampled_from([0, 16, 31, 60]))]
        ids = ids + draw(st.lists(TOKENS, max_size=20)) + [3, 4]
        labels = [IGNORED] * len(ids)
        for _ in range(draw(st.integers(0, 3))):
            start = draw(st.integers(0, len(ids) - 1))
            for place in range(start, min(start + draw(st.integers(1, 6)), len(ids))):
                labels[place] = ids[place]
        rows.append((ids, labels))
    return rows


def context_by_hand(ids: list[int], labels: list[int], mode: str, kept: int | None) -> list[int]:
    starts = [
        place
        for place, label in enumerate(labels)
        if label != IGNORED and (place == 0 or labels[place - 1] == IGNORED)
    ]
    if not starts:
        return []
    boundary = max((starts[0] if mode == "tail" else starts[-1]) - 1, 0)
    return ids[:boundary][-kept if kept else 0 :]


@given(rows_with_labels(), st.sampled_from(["tail", "turns"]), st.sampled_from([None, 20, 50]))
def test_groups_are_those_found_token_by_token(
    rows: list[tuple[list[int], list[int]]], mode: str, kept: int | None
) -> None:
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})
    groups = group_by_shared_prefix(dataset, decision_mode=mode, max_context_length=kept)
    wide, close = expected_partitions([context_by_hand(ids, labels, mode, kept) for ids, labels in rows])
    assert partition(groups[:, 0]) == wide
    assert partition(groups[:, 1]) == close


def test_a_context_that_is_cut_belongs_to_an_equal_one_that_is_not() -> None:
    shared = list(range(300, 320))
    rows = [[*shared, 3, 4], [7, 8, 9, *shared, 3, 4]]
    labels = [[IGNORED] * (len(row) - 1) + [4] for row in rows]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": labels})
    groups = group_by_shared_prefix(dataset, max_context_length=20)
    assert partition(groups[:, 0]) == {frozenset({0, 1})}


@pytest.mark.parametrize("shared", [15, 16, 19, 20])
def test_half_of_the_shorter_context_and_sixteen_tokens_make_a_group(shared: int) -> None:
    document = DOCUMENTS[0]
    contexts = [document[:shared] + [1] * (30 - shared), document[:shared] + [2] * (50 - shared)]
    assert len(partition(group_by_shared_prefix(dataset_of(contexts))[:, 0])) == (1 if shared >= 16 else 2)
    contexts = [document[:shared] + [1] * (40 - shared), document[:shared] + [2] * (50 - shared)]
    assert len(partition(group_by_shared_prefix(dataset_of(contexts))[:, 0])) == (1 if shared >= 20 else 2)


@pytest.mark.parametrize(("lower", "higher"), [(1, 256), (255, 256), (40_000, 151_000)])
def test_a_context_joins_the_first_that_extends_it(lower: int, higher: int) -> None:
    """First by token ids, not by the order of their bytes in memory."""
    prompt = DOCUMENTS[0][:20]
    groups = group_by_shared_prefix(dataset_of([prompt + [higher] * 40, prompt, prompt + [lower] * 40]))
    assert partition(groups[:, 0]) == {frozenset({0}), frozenset({1, 2})}


def test_documents_under_one_prompt_are_closer_groups() -> None:
    prompt = DOCUMENTS[0]
    contexts = [prompt + DOCUMENTS[1 + row % 2][:40] + [5 + row] * 10 for row in range(8)]
    groups = group_by_shared_prefix(dataset_of(contexts))
    assert partition(groups[:, 0]) == {frozenset(range(8))}
    assert partition(groups[:, 1]) == {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})}


def test_groups_reach_across_tables_and_follow_selected_rows() -> None:
    """More rows than are read at a time, of a dataset that was shuffled and has other columns."""
    documents = np.random.default_rng(0).integers(0, 150_000, (70, 40)).tolist()
    rows = dataset_of([documents[row % 70] for row in range(700)]).add_column("document", [r % 70 for r in range(700)])
    rows = rows.shuffle(seed=1).select(range(650))
    groups = group_by_shared_prefix(rows)
    assert groups.shape == (650, 2)
    assert partition(groups[:, 0]) == partition(rows["document"])


def test_rows_without_context_are_groups_of_their_own() -> None:
    plain = Dataset.from_dict({"input_ids": [DOCUMENTS[0]] * 3})
    assert len(partition(group_by_shared_prefix(plain)[:, 0])) == 3
    assert len(partition(group_by_shared_prefix(dataset_of([[], [], []]))[:, 0])) == 3


def test_a_dataset_that_cannot_be_grouped() -> None:
    require_groupable(None)
    require_groupable(dataset_of([[1]]))
    with pytest.raises(ValueError, match=r"`group_by_context=True` .* found `IterableDataset`"):
        require_groupable(IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(ValueError, match=r"`group_by_context=True` .* columns `text`"):
        group_by_shared_prefix(Dataset.from_dict({"text": ["one"]}))

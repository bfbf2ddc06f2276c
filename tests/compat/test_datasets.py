# SPDX-License-Identifier: Apache-2.0
"""Whether `datasets` still needs what is not public of it."""

from collections.abc import Iterator

from datasets import IterableDataset
from datasets.fingerprint import Hasher

from frozen_peft.utils.compat.datasets import computed_by


def rows(count: int) -> Iterator[dict]:
    yield from ({"number": number} for number in range(count))


def stream(count: int, step: int) -> IterableDataset:
    return IterableDataset.from_generator(rows, gen_kwargs={"count": count}).map(
        lambda row: {"n": row["number"] + step}
    )


def test_equal_streams_have_equal_hashes_by_what_they_compute() -> None:
    assert Hasher.hash(computed_by(stream(3, 1))) == Hasher.hash(computed_by(stream(3, 1)))
    assert Hasher.hash(computed_by(stream(3, 1))) != Hasher.hash(computed_by(stream(3, 2)))


def test_a_stream_has_another_hash_once_it_was_read() -> None:
    """Else `computed_by` is not needed any more. (So it has in every process, which takes two to see.)"""
    read = stream(3, 1)
    before, of_what_it_computes = Hasher.hash(read), Hasher.hash(computed_by(read))
    assert [row["n"] for row in read] == [1, 2, 3]
    assert Hasher.hash(read) != before
    assert Hasher.hash(computed_by(read)) == of_what_it_computes

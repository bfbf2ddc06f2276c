# SPDX-License-Identifier: Apache-2.0
"""Rows in a `datasets.Dataset` without the types of Arrow between what is written and what is trained.

Arrow has one type for a column: it takes a text for a date, `1` for `1.0` beside a fraction, and gives each object the
keys of all others. So what is not of one simple type is kept as JSON, in the type of `datasets` for it:

1. Storage is the text that Python's `json` writes, which gives back what was read. (`Json` itself reads and writes
   with pandas' `ujson`, which rounds to ten decimals. That is what a look at a row shows; nothing is trained on it.)
2. `Dataset.map` would write every column anew after each step. So TRL prepares a stream of Python's own objects,
   decoded from storage by Python's `json`, and only token ids come back into a table.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import transformers
import trl
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from frozen_peft.data.row_checks import TRAINED_COLUMNS
from frozen_peft.utils.compat.datasets import computed_by

__all__ = [
    "JSON",
    "ColumnTypes",
    "as_table",
    "full_row",
    "has_json_columns",
    "needs_python_rows",
    "python_row",
    "python_rows",
    "require_no_dates",
    "stored_row",
]

# Of columns that no type of Arrow holds as they are.
JSON = Json()
_ROWS_PER_BATCH = 100
# Types of Arrow that no text of a sample is written in.
_DATES = ("date", "time", "duration")


class ColumnTypes:
    """Finds the type of each column: a simple one where all of its values are of that type, JSON otherwise."""

    def __init__(self) -> None:
        self._types: dict[str, Any] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Takes a row into account."""
        for column, value in row.items():
            found = _simple_type(value)
            known = self._types.setdefault(column, found)
            if known != found and found is not None:
                self._types[column] = found if known is None else JSON

    @property
    def features(self) -> Features:
        """The columns' types."""
        # Nulls alone: of any type.
        types = {column: JSON if kind is None else kind for column, kind in self._types.items()}
        # TRL takes it apart in every row, whatever is in it.
        return Features(types | ({"chat_template_kwargs": JSON} if "chat_template_kwargs" in types else {}))


def stored_row(row: dict[str, Any], features: Features) -> dict[str, Any]:
    """A row as a dataset of these types takes it."""
    return {
        column: json.dumps(value) if features[column] == JSON and value is not None else value
        for column, value in full_row(row, features).items()
    }


def full_row(row: dict[str, Any], features: Features) -> dict[str, Any]:
    """A row with every column, as Python's own objects."""
    full = {column: row.get(column) for column in features}
    if "chat_template_kwargs" in full and full["chat_template_kwargs"] is None:
        full["chat_template_kwargs"] = {}
    return full


def has_json_columns(dataset: Any) -> bool:
    """Whether something is a dataset of which `python_rows` gives more exact rows than it does itself."""
    return isinstance(dataset, Dataset) and any(map(_holds_json, dataset.features.values()))


def needs_python_rows(dataset: Any) -> bool:
    """Whether TRL has to prepare `python_rows`: what it reads is kept as JSON, or null where it takes it apart."""
    if not isinstance(dataset, Dataset) or "input_ids" in dataset.column_names:
        return False
    return has_json_columns(dataset) or "chat_template_kwargs" in dataset.column_names


def python_rows(dataset: Dataset, num_shards: int | None = None, number: str | None = None) -> IterableDataset:
    """A dataset's rows as a stream of Python's own objects, what is kept as JSON decoded exactly.

    Args:
        dataset: Has JSON columns.
        num_shards: Parts that the stream can be computed in, each of which counts its rows from 0.
        number: Column that gets each row's number in the dataset; None: none does.
    """
    num_shards = max(min(num_shards or 1, len(dataset)), 1)
    bounds = [len(dataset) * index // num_shards for index in range(num_shards + 1)]
    ranges = list(itertools.pairwise(bounds))
    return IterableDataset.from_generator(
        _decoded_rows, gen_kwargs={"dataset": dataset.with_format(None), "ranges": ranges, "number": number}
    )


def python_row(dataset: Dataset, index: int) -> dict[str, Any]:
    """One of these rows."""
    return next(_decoded_rows(dataset.with_format(None), [(index, index + 1)]))


def as_table(prepared: IterableDataset, source: Dataset, columns: tuple[str, ...]) -> Dataset:
    """Computes a stream that was made from `python_rows`, each of its parts in a process of its own.

    Args:
        prepared: One row for each row of the source, or rows that a trainer took apart.
        source: What it was made from.
        columns: What is kept of the stream, where it has it; of a source that it has a row for each of, what is not
            kept as JSON.
    """
    num_shards = prepared.num_shards
    # The first process computes, the others find what it wrote.
    with PartialState().main_process_first():
        parts: dict[str, Any] = {"prepared": prepared, "shards": list(range(num_shards)), "columns": columns}
        try:
            made = Dataset.from_generator(
                _prepared_rows,
                gen_kwargs=parts,
                num_proc=num_shards if num_shards > 1 else None,
                fingerprint=Hasher.hash([computed_by(prepared), columns, trl.__version__, transformers.__version__]),
            )
        except DatasetGenerationError:
            # What is wrong with a row is in none of its words, and from another process not even behind it.
            for _ in _prepared_rows(**parts):
                pass
            raise
    plain = [name for name, kind in source.features.items() if name not in made.column_names and not _holds_json(kind)]
    is_alike = plain and len(made) == len(source)
    return concatenate_datasets([made, source.select_columns(plain)], axis=1) if is_alike else made


def require_no_dates(dataset: Dataset | IterableDataset, name: str) -> None:
    """Refuses columns in which a reader took text for dates.

    Raises:
        ValueError: A column that is trained on has such a type; the message names it.
    """
    for column, kind in (dataset.features or {}).items():
        if column not in (*TRAINED_COLUMNS, "text", "chosen", "rejected"):
            continue
        for path, inner in _inner_types(kind, column):
            if isinstance(inner, Value) and inner.dtype.startswith(_DATES):
                raise ValueError(
                    f"The {name} dataset has {inner.dtype} in `{path}`, where text is trained: whatever read the file "
                    "took text for dates. Read JSON with `frozen_peft.load_samples`, which takes it as it is written, "
                    "or give `load_dataset` the column's type with `features`."
                )


def _decoded_rows(
    dataset: Dataset, ranges: list[tuple[int, int]], number: str | None = None
) -> Iterator[dict[str, Any]]:
    json_columns = [column for column, kind in dataset.features.items() if _holds_json(kind)]
    for first, stop in ranges:
        for start in range(first, stop, _ROWS_PER_BATCH):
            batch = range(start, min(start + _ROWS_PER_BATCH, stop))
            # As Arrow stores them: `datasets` itself would read JSON with pandas.
            for index, row in zip(batch, dataset.select(batch).with_format("arrow")[:].to_pylist(), strict=True):
                row |= {column: _decoded(row[column], dataset.features[column]) for column in json_columns}
                yield full_row(row, dataset.features) | ({number: index} if number is not None else {})


def _prepared_rows(prepared: IterableDataset, shards: list[int], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for row in prepared.shard(num_shards=prepared.num_shards, index=shard):
            yield {column: row[column] for column in columns if column in row}


def _simple_type(value: Any) -> Any:
    """The type of Arrow that holds a value as it is; None for null, which all of them hold."""
    if value is None:
        return None
    if isinstance(value, str):
        return Value("string")
    if isinstance(value, bool):
        return Value("bool")
    if isinstance(value, int):
        return Value("int64") if -(2**63) <= value < 2**63 else JSON
    if isinstance(value, float):
        return Value("float64")
    if isinstance(value, list) and value and all(type(item) is int and abs(item) < 2**63 for item in value):
        return List(Value("int64"))
    return JSON


def _decoded(value: Any, kind: Any) -> Any:
    """What a stored value of a type stands for."""
    if value is None:
        return None
    if isinstance(kind, Json):
        return json.loads(value)
    if isinstance(kind, List | LargeList):
        return [_decoded(item, kind.feature) for item in value]
    if isinstance(kind, dict):
        return {key: _decoded(item, kind[key]) for key, item in value.items()}
    return value


def _holds_json(kind: Any) -> bool:
    return any(isinstance(inner, Json) for _, inner in _inner_types(kind, ""))


def _inner_types(kind: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The types that a type is made of in the end, with their paths."""
    if isinstance(kind, List | LargeList):
        yield from _inner_types(kind.feature, f"{path}[]")
    elif isinstance(kind, dict):
        for key, inner in kind.items():
            yield from _inner_types(inner, f"{path}.{key}")
    else:
        yield path, kind

# SPDX-License-Identifier: Apache-2.0
"""Loading samples: a local JSON Lines, JSON or Parquet file, or a dataset of the hub.

A local file is checked before anything is trained on it, since a mistake in it would otherwise surface as an Arrow
error without a line number, or hours later.
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset, get_dataset_split_names, load_dataset
from tqdm import tqdm

__all__ = ["has_split", "load_samples"]

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# The columns that TRL trains on, by dataset type; `text` can be renamed with `dataset_text_field`.
_TRAINING_COLUMNS = ("messages", "conversations", "prompt", "input_ids")
# The value of a conversation's column is a list of messages with these keys.
_MESSAGE_KEYS = {"messages": "role", "prompt": "role", "completion": "role", "conversations": "from"}


def load_samples(
    name: str,
    split: str = "train",
    *,
    config: str | None = None,
    streaming: bool = False,
    text_field: str = "text",
) -> Dataset | IterableDataset:
    """Loads one split of a dataset.

    Args:
        name: A `.jsonl`, `.json` or `.parquet` file, which is one split whatever `split` says, a local dataset folder,
            or the id of a dataset on the hub.
        split: Split of a folder or hub dataset; slices such as `train[:100]` are understood unless streaming.
        config: Configuration of a hub dataset.
        streaming: Read while training instead of before. A local file is checked whole all the same.
        text_field: Column that holds the text of plain language modelling samples.

    Returns:
        The samples.

    Raises:
        ValueError: A local file is empty or malformed; the message names file, line and reason.
        FileNotFoundError: There is no such file or dataset.
    """
    path = Path(name)
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        return load_dataset(name, config, split=split, streaming=streaming)
    if not path.is_file():
        raise FileNotFoundError(f"no dataset file {name} (looked in {Path.cwd()})")
    if builder == "parquet":
        _check_parquet(path, text_field)
    else:
        _check_json(path, text_field)
    return load_dataset(builder, data_files=str(path), split="train", streaming=streaming)


def has_split(name: str, split: str, config: str | None = None) -> bool:
    """Says whether a dataset has a split; a local file has none but its own."""
    if Path(name).suffix.lower() in _BUILDERS:
        return False
    return split.partition("[")[0] in get_dataset_split_names(name, config)


def _check_json(path: Path, text_field: str) -> None:
    """Raises `ValueError` at the first row that is not a sample, or unlike the rows before it."""
    kinds: dict[str, tuple[str, str]] = {}
    num_rows = 0
    # The delay keeps the bar away from files that are read in a moment.
    for place, row in tqdm(_json_rows(path), desc=f"Checking {path.name}", unit=" rows", delay=2):
        num_rows += 1
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a sample is a JSON object, got {_kind(row)}")
        problem = _row_problem(row, text_field)
        if problem:
            raise ValueError(f"{place}: {problem}")
        for column, value in row.items():
            kind = _kind(value)
            known_kind, known_place = kinds.setdefault(column, (kind, place))
            if known_kind == "null":
                kinds[column] = (kind, place)
            elif kind not in (known_kind, "null"):
                raise ValueError(f"{place}: `{column}` is {kind}, but {known_kind} in {known_place}")
    if not num_rows:
        raise ValueError(f"{path}: the file has no samples")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields each row with the place to name in an error."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
        file.seek(0)
        if path.suffix.lower() == ".json" and first.lstrip().startswith(b"["):
            rows = _parse(file.read(), str(path), first_line=1)
            yield from ((f"{path}, sample {number}", row) for number, row in enumerate(rows, start=1))
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse(line, str(path), first_line=number)


def _parse(text: bytes, name: str, *, first_line: int) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + text.count(b"\n", 0, error.start)
        raise ValueError(f"{name}, line {line}: not UTF-8: {error.reason}") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{name}, line {line}, column {error.colno}: not JSON: {error.msg}") from error


def _check_parquet(path: Path, text_field: str) -> None:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    if not file.metadata.num_rows:
        raise ValueError(f"{path}: the file has no samples")
    columns = file.schema_arrow.names
    if not {*_TRAINING_COLUMNS, text_field} & set(columns):
        raise ValueError(f"{path}: {_no_training_column(columns, text_field)}")


def _row_problem(row: dict[str, Any], text_field: str) -> str | None:
    """Says what keeps a row from being a sample of any dataset type that TRL trains on."""
    if not {*_TRAINING_COLUMNS, text_field} & row.keys():
        return _no_training_column(row, text_field)
    if isinstance(row.get("prompt"), str | list) and "completion" not in row:
        return "there is a `prompt` but no `completion`"
    for column in chain([text_field], _TRAINING_COLUMNS, ["completion"]):
        if column not in row or (column == text_field and len({*_TRAINING_COLUMNS} & row.keys())):
            continue
        value = row[column]
        # An empty prompt is a sample without context.
        if not value and column != "prompt":
            return f"`{column}` is {'null' if value is None else 'empty'}"
        if column in _MESSAGE_KEYS and isinstance(value, list):
            problem = _messages_problem(value, column)
            if problem:
                return problem
        elif not isinstance(value, list if column in ("messages", "conversations", "input_ids") else str):
            return f"`{column}` is {_kind(value)}"
    return None


def _messages_problem(messages: list[Any], column: str) -> str | None:
    key = _MESSAGE_KEYS[column]
    content = "value" if key == "from" else "content"
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"`{column}[{number}]` is {_kind(message)}, a message is an object with `{key}` and `{content}`"
        if not isinstance(message.get(key), str):
            return f"`{column}[{number}]` has no `{key}`"
        if message.get(content) is None and "tool_calls" not in message:
            return f"`{column}[{number}]` has no `{content}`"
    return None


def _no_training_column(columns: Any, text_field: str) -> str:
    expected = ", ".join(f"`{name}`" for name in (*_TRAINING_COLUMNS, text_field))
    found = ", ".join(f"`{name}`" for name in columns) or "none"
    return f"none of the columns {expected}; found {found}"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

# SPDX-License-Identifier: Apache-2.0
"""Loading samples: a local JSON Lines, JSON or Parquet file, a folder of such, or a dataset of the hub.

A local file is checked before anything is trained on it, since a mistake in it would otherwise surface as an Arrow
error without a line number, or hours later. JSON is read by us, whoever holds it, since a reader that guesses types
changes what is written (`stored`).
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import (
    Dataset,
    DatasetBuilder,
    DownloadManager,
    Features,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    get_dataset_split_names,
    load_dataset,
    load_dataset_builder,
)
from tqdm import tqdm

from frozen_peft.data.json_text import BYTE_ORDER_MARK, JsonTextError, numbered_lines, parse_array, parse_json
from frozen_peft.data.row_checks import RowChecks, no_training_column
from frozen_peft.data.stored import ColumnTypes, full_row, stored_row

__all__ = ["has_split", "load_samples"]

# Files of JSON, compressed as pyarrow reads it.
_JSON = re.compile(r"\.jsonl?(\.(gz|bz2|zst|lz4))?$", re.IGNORECASE)
# Columns that a row may lack.
_OPTIONAL = ("tools", "chat_template_kwargs", "stripped")
# Changes where rows of one version are stored otherwise than those of another.
_FORMAT = 1


def load_samples(
    name: str,
    split: str = "train",
    *,
    config: str | None = None,
    streaming: bool = False,
    text_field: str = "text",
    method: str = "sft",
    prompts_alone: bool = False,
) -> Dataset | IterableDataset:
    """Loads one split of a dataset.

    Rows of JSON are trained exactly as they are written: what is not of one simple type in all rows is kept as JSON
    (`datasets.Json`), which the trainer reads from storage.

    Args:
        name: A `.jsonl`, `.json` or `.parquet` file, which is one split whatever `split` says (JSON may be compressed:
            `.jsonl.gz`, `.bz2`, `.zst`, `.lz4`), a local dataset folder, or the id of a dataset on the hub.
        split: Split of a folder or hub dataset; slices such as `train[:100]` are understood unless streaming.
        config: Configuration of a hub dataset.
        streaming: Read while training instead of before. A local file is checked whole all the same.
        text_field: Column that holds the text of plain language modelling samples.
        method: What they are trained with: `sft`, `dpo` (pairs of `chosen` and `rejected`) or `kto` (these, or a
            `completion` with its `label`).
        prompts_alone: Whether rows may be prompts without a `completion`, for `distill_on_policy=1`.

    Returns:
        The samples.

    Raises:
        ValueError: A file is empty or malformed, or has rows that cannot be trained as they are written; the message
            names file, line and reason.
        FileNotFoundError: There is no such file or dataset.
    """
    path = Path(name)
    kind = _file_kind(path)
    checks = RowChecks(text_field, method, prompts_alone=prompts_alone)
    if kind is None:
        return _load_named(name, split, config, streaming, checks)
    if not path.is_file():
        raise FileNotFoundError(f"no dataset file {name} (looked in {Path.cwd()})")
    return (
        _load_json([path], streaming, checks) if kind == "json" else _load_parquet(path, streaming, checks, text_field)
    )


def has_split(name: str, split: str, config: str | None = None) -> bool:
    """Says whether a dataset has a split; a local file has none but its own."""
    if _file_kind(Path(name)) is not None:
        return False
    return split.partition("[")[0] in get_dataset_split_names(name, config)


def _file_kind(path: Path) -> str | None:
    """What a file holds, by its name; None: it is no file of rows."""
    if _JSON.search(path.name):
        return "json"
    return "parquet" if path.suffix.lower() == ".parquet" else None


def _load_named(
    name: str, split: str, config: str | None, streaming: bool, checks: RowChecks
) -> Dataset | IterableDataset:
    """A folder or a dataset of the hub, whose JSON files are read as any other."""
    builder = load_dataset_builder(name, config)
    # A dataset that is one field of a file is none of lines.
    if builder.name != "json" or builder.config.field is not None:
        return load_dataset(name, config, split=split, streaming=streaming)
    if streaming:
        return _load_json(_files(builder, split), streaming, checks)
    parts = []
    for instruction in split.split("+"):
        base = instruction.partition("[")[0]
        samples = _load_json(_files(builder, base), streaming, checks)
        (chosen,) = ReadInstruction.from_spec(instruction).to_absolute({base: len(samples)})
        whole = range(len(samples))
        parts.append(samples.select(whole[chosen.from_ : chosen.to]))
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _files(builder: DatasetBuilder, split: str) -> list[Path]:
    """The files of a split, on this machine."""
    files = builder.config.data_files
    if split not in files:
        raise ValueError(f'Unknown split "{split}". Should be one of {[str(name) for name in files]}.')
    return [Path(file) for file in DownloadManager().download(list(files[split]))]


def _load_json(paths: Sequence[Path], streaming: bool, checks: RowChecks) -> Any:
    features, digest = _checked(paths, checks)
    files = [str(path) for path in paths]
    kwargs = {"features": features, "digest": digest, "format": _FORMAT}
    if streaming:
        # A list is read by several workers, a file each.
        return IterableDataset.from_generator(_rows_as, gen_kwargs={"make": full_row, "files": files, **kwargs})
    # What is stored is found again by these: the digest stands for what is in the files.
    kwargs |= {"make": stored_row, "files": tuple(files)}
    return Dataset.from_generator(_rows_as, features=features, gen_kwargs=kwargs)


def _rows_as(make: Any, files: Sequence[str], features: Features, **found_by: Any) -> Iterator[dict[str, Any]]:
    for file in files:
        for _, row in _json_rows(Path(file)):
            yield make(row, features)


def _checked(paths: Sequence[Path], checks: RowChecks) -> tuple[Features, str]:
    """Types of the columns, and a digest of what is in the files.

    Raises:
        ValueError: A row is not a sample, or unlike the rows before it.
    """
    types = ColumnTypes()
    digest = hashlib.blake2b(digest_size=16)
    num_rows = 0
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
        for row in _checked_rows(_json_rows(path), checks, path):
            num_rows += 1
            types.add(row)
    if not num_rows:
        raise ValueError(f"{', '.join(map(str, paths))}: the file has no samples")
    return types.features, digest.hexdigest()


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields each row with the place to name in an error."""
    try:
        with io.BufferedReader(pyarrow.input_stream(str(path), compression="detect")) as file:
            if ".jsonl" not in path.suffixes and file.peek(64).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"[":
                with _placed(path):
                    for number, row in enumerate(parse_array(file.read()), start=1):
                        yield f"{path}, sample {number}", row
                return
            for number, line in numbered_lines(file):
                with _placed(path, number):
                    row = parse_json(line)
                yield f"{path}, line {number}", row
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


@contextmanager
def _placed(path: Path, first_line: int = 1) -> Iterator[None]:
    """Names the file and the line of what is wrong with its text."""
    try:
        yield
    except JsonTextError as error:
        column = f", column {error.column}" if error.column is not None else ""
        raise ValueError(f"{path}, line {first_line + error.line - 1}{column}: {error.reason}") from error


def _load_parquet(path: Path, streaming: bool, checks: RowChecks, text_field: str) -> Dataset | IterableDataset:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    if not file.metadata.num_rows:
        raise ValueError(f"{path}: the file has no samples")
    columns = file.schema_arrow.names
    known = [name for name in columns if name in checks.columns]
    if not known:
        raise ValueError(f"{path}: {no_training_column(columns, text_field)}")
    samples = load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
    placed = (
        # What one row has, the table has as null in all others.
        (f"{path}, row {number}", {k: value for k, value in row.items() if value is not None or k not in _OPTIONAL})
        for number, row in enumerate(samples.select_columns(known), start=1)
    )
    for _ in _checked_rows(placed, checks, path):
        pass
    return samples


def _checked_rows(placed: Iterable[tuple[str, Any]], checks: RowChecks, path: Path) -> Iterator[Any]:
    """The rows of a file; `ValueError` at the first that is not a sample, or unlike the rows before it."""
    # The delay keeps the bar away from files that are read in a moment.
    for place, row in tqdm(placed, desc=f"Checking {path.name}", unit=" rows", delay=2):
        try:
            checks.require_sample(row, place)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        yield row

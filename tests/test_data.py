# SPDX-License-Identifier: Apache-2.0
"""Loading of local files: what is read, and what is refused with file, line and reason."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, IterableDataset

from frozen_peft.data import has_split, load_samples

GOOD = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "c"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def written(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("samples.jsonl", lines(GOOD)),
        ("blank-lines.jsonl", lines(GOOD[:1]) + "\n" + lines(GOOD[1:]) + "\n"),
        ("lines.json", lines(GOOD)),
        ("array.json", json.dumps(GOOD, indent=1)),
    ],
)
def test_json_files_load(tmp_path: Path, name: str, text: str) -> None:
    samples = load_samples(written(tmp_path / name, text))
    assert isinstance(samples, Dataset)
    assert samples.to_list() == GOOD


def test_conversations_load(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert load_samples(written(tmp_path / "chat.jsonl", lines(rows))).to_list() == rows


def test_parquet_loads(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), path)
    assert load_samples(str(path)).to_list() == GOOD


def test_streaming_reads_the_same(tmp_path: Path) -> None:
    samples = load_samples(written(tmp_path / "samples.jsonl", lines(GOOD)), streaming=True)
    assert isinstance(samples, IterableDataset)
    assert list(samples) == GOOD


MESSAGES = '{"messages": [{"role": "user", "content": "a"}, %s]}\n'


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("x.jsonl", "", ": the file has no samples"),
        ("x.jsonl", "\n\n", ": the file has no samples"),
        ("x.json", "[]", ": the file has no samples"),
        ("x.jsonl", '{"text": "a"}\n{"text" "b"}\n', ", line 2, column 9: not JSON: Expecting ':' delimiter"),
        ("x.json", '[{"text": "a"},\n {"text": }]', ", line 2, column 11: not JSON: Expecting value"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ", line 2: not UTF-8"),
        ("x.jsonl", '{"text": "a"}\n["b"]\n', ", line 2: a sample is a JSON object, got a list"),
        ("x.json", '[{"text": "a"}, 3]', ", sample 2: a sample is a JSON object, got a number"),
        ("x.jsonl", '{"question": "a"}\n', ", line 1: none of the columns"),
        ("x.jsonl", '{"prompt": "a"}\n', ", line 1: there is a `prompt` but no `completion`"),
        ("x.jsonl", '{"prompt": "a", "completion": ""}\n', ", line 1: `completion` is empty"),
        ("x.jsonl", '{"text": null}\n', ", line 1: `text` is null"),
        ("x.jsonl", '{"text": 3}\n', ", line 1: `text` is a number"),
        ("x.jsonl", '{"messages": "hello"}\n', ", line 1: `messages` is text"),
        ("x.jsonl", MESSAGES % '"b"', ", line 1: `messages[1]` is text"),
        ("x.jsonl", MESSAGES % '{"content": "b"}', ", line 1: `messages[1]` has no `role`"),
        ("x.jsonl", MESSAGES % '{"role": "assistant"}', ", line 1: `messages[1]` has no `content`"),
        (
            "x.jsonl",
            '{"text": "a", "id": 1}\n{"text": "b", "id": "two"}\n',
            ", line 2: `id` is text, but a number in ",
        ),
        ("x.parquet", "not parquet", ": not a Parquet file"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, name: str, text: str | bytes, reason: str) -> None:
    path = written(tmp_path / name, text)
    with pytest.raises(ValueError) as refusal:
        load_samples(path)
    assert str(refusal.value).startswith(path + reason)


def test_empty_and_foreign_parquet_are_refused(tmp_path: Path) -> None:
    empty, foreign = tmp_path / "empty.parquet", tmp_path / "foreign.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), empty)
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"]}), foreign)
    with pytest.raises(ValueError, match="the file has no samples"):
        load_samples(str(empty))
    with pytest.raises(ValueError, match=r"none of the columns .* found `question`"):
        load_samples(str(foreign))


def test_another_text_column_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", '{"body": "a"}\n')
    assert load_samples(path, text_field="body").to_list() == [{"body": "a"}]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no dataset file .*nowhere\.jsonl"):
        load_samples(str(tmp_path / "nowhere.jsonl"))


def test_a_file_has_no_other_split(tmp_path: Path) -> None:
    assert not has_split(written(tmp_path / "x.jsonl", lines(GOOD)), "test")


def test_a_folder_has_the_splits_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    written(folder / "train.jsonl", lines(GOOD))
    written(folder / "test.jsonl", lines(GOOD[:1]))
    assert has_split(str(folder), "test")
    assert not has_split(str(folder), "validation")
    assert load_samples(str(folder), "test").to_list() == GOOD[:1]

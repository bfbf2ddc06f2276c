# SPDX-License-Identifier: Apache-2.0
"""Loading of local files: what is read, and what is refused with file, line and reason."""

import datetime
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
PAIR = '{"prompt": "a", "completion": "b", %s}'
CALL = MESSAGES % '{"role": "assistant", "tool_calls": [{"arguments": %s}]}'


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
            MESSAGES % '{"role": "assistant", "content": 3}',
            ", line 1: `messages[1].content` is a number, e",
        ),
        (
            "x.jsonl",
            MESSAGES % '{"role": "assistant", "content": [3]}',
            ", line 1: `messages[1].content[0]` is a number, expected an",
        ),
        (
            "x.jsonl",
            MESSAGES % '{"role": "assistant", "tool_calls": {}}',
            ", line 1: `messages[1].tool_calls` is an object, expected a",
        ),
        ("x.jsonl", '{"input_ids": [1.0, 2]}\n', ", line 1: `input_ids[0]` is 1.0, expected a token's number"),
        ("x.jsonl", '{"input_ids": [1, true]}\n', ", line 1: `input_ids[1]` is true or false"),
        ("x.jsonl", '{"input_ids": [1, -2]}\n', ", line 1: `input_ids[1]` is -2"),
        ("x.jsonl", '{"input_ids": [1, 2], "labels": [1]}\n', ", line 1: `labels` has 1 entries, for 2 `input_ids`"),
        ("x.jsonl", PAIR % '"tools": 3', ", line 1: `tools` is a number, expected a list of objects"),
        ("x.jsonl", PAIR % '"tools": "[{"', ", line 1: `tools` is text that is not JSON: column"),
        ("x.jsonl", PAIR % '"chat_template_kwargs": [1]', ", line 1: `chat_template_kwargs` is a list"),
        ("x.jsonl", PAIR % '"text": "c"', ", line 1: there is `text` beside `prompt` and `completion`"),
        ("x.jsonl", PAIR % '"prompt": "a"', ", line 1: the key `prompt` comes twice"),
        (
            "x.json",
            "[" + PAIR % '"tools": null' + ",\n" + PAIR % '"prompt": "a"' + "]",
            ", line 2: the key `prompt` comes",
        ),
        (
            "x.jsonl",
            '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}\n',
            ", line 1: `prompt` is a list and `completion` is text; they have the same form",
        ),
        (
            "x.jsonl",
            '{"prompt": [], "completion": [{"role": "assistant", "content": "b"}]}\n',
            ", line 1: `prompt` is e",
        ),
        (
            "x.jsonl",
            '{"text": "a"}\n{"prompt": "a", "completion": "b"}\n',
            ", line 2: `prompt` is text, but missing",
        ),
        ("x.jsonl", '{"text": "a \\ud83d"}\n', ", line 1: `text` has half a surrogate pair"),
        ("x.jsonl", CALL % '{"\\ud83d": 1}', ", line 1: `messages[1].tool_calls[0].arguments` has a key with half a"),
        (
            "x.jsonl",
            CALL % '{"x": 1e400}',
            ", line 1: `messages[1].tool_calls[0].arguments.x` is 1e400, which is no fi",
        ),
        ("x.jsonl", CALL % '{"x": NaN}', ", line 1: `messages[1].tool_calls[0].arguments.x` is NaN"),
        (
            "x.jsonl",
            CALL % f'{{"x": {2**70}}}',
            ", line 1: `messages[1].tool_calls[0].arguments.x` is an integer of mo",
        ),
        (
            "x.jsonl",
            CALL % '{"x": 0.12345678901234567890}',
            ", line 1: `messages[1].tool_calls[0].arguments.x` is 0.12345678901234567890, which a 64-bit float "
            "holds as 0.12345678901234568; write it as text",
        ),
        ("x.jsonl", CALL % ("[" * 300 + "]" * 300), ", line 1: `messages` is nested more than 200 levels deep"),
        ("x.jsonl", CALL % ("[" * 200_000 + "]" * 200_000), ", line 1: not JSON: nested too deeply"),
        ("x.jsonl", CALL % ("1" * 5000), ", line 1: not JSON that can be read: Exceeds the limit"),
        ("x.jsonl.gz", b"no gzip", ": cannot be read: "),
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


def test_what_is_beside_the_samples_may_be_anything(tmp_path: Path) -> None:
    beside = [1, "two", None, {"a": 0.1}, [1, 2.5], float("inf"), 0.5]
    path = written(tmp_path / "x.jsonl", lines([{"text": "a", "id": value} for value in beside]))
    assert load_samples(path)["text"][:] == ["a"] * len(beside)
    path = written(tmp_path / "y.jsonl", lines([{"text": "a", "margin": value} for value in (0.1, float("-inf"))]))
    assert load_samples(path)["margin"][:] == [0.1, float("-inf")]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.bz2", ".jsonl.zst"])
def test_files_may_be_compressed_and_have_a_byte_order_mark(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    text = (
        b"\xef\xbb\xbf" + lines([*GOOD, {"prompt": "\u2028\ufeff", "completion": "c"}]).replace("\n", "\r\n").encode()
    )
    compression = "detect" if suffix != ".jsonl" else None
    with pyarrow.output_stream(str(path), compression=compression) as file:
        file.write(text)
    assert load_samples(str(path)).to_list() == [*GOOD, {"prompt": "\u2028\ufeff", "completion": "c"}]
    assert not has_split(str(path), "test")


def test_a_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", '{"text": "a"}\n')
    assert load_samples(path)["text"][:] == ["a"]
    written(tmp_path / "x.jsonl", '{"text": "b"}\n')
    assert load_samples(path)["text"][:] == ["b"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], "row 1: `prompt` is a list and"),
        ([{"messages": [{"role": "user", "content": 3}]}], r"row 1: `messages\[0\].content` is a number"),
        ([{"text": "a"}, {"text": datetime.date(2024, 1, 31)}][1:], "row 1: `text` is date"),
        ([{"input_ids": [0.5]}], r"row 1: `input_ids\[0\]` is 0.5"),
    ],
)
def test_rows_of_parquet_are_checked(tmp_path: Path, rows: list[dict], reason: str) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=reason):
        load_samples(str(path))


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
    written(folder / "train.jsonl", lines([{"prompt": "a", "completion": f"2024-01-3{n}"} for n in (0, 1)]))
    assert load_samples(str(folder), "train[1:]+test[:50%]")["completion"][:] == ["2024-01-31"]
    assert [row["completion"] for row in load_samples(str(folder), streaming=True)] == ["2024-01-30", "2024-01-31"]
    with pytest.raises(ValueError, match='Unknown split "dev"'):
        load_samples(str(folder), "dev")

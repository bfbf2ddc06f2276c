# SPDX-License-Identifier: Apache-2.0
"""JSON Lines files: mistakes are named by line, and what is written appears whole or not at all."""

import json
from pathlib import Path

import pytest

from frozen_peft.data.rows import Row, dump_row, read_rows
from frozen_peft.utils.files import whole_file


def same(row: Row) -> Row:
    return row


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a" 1}', "column 6: not JSON"),
        (b'["a"]', "a row is a JSON object, got a list"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_and_may_be_left_out(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}')
    with pytest.raises(ValueError, match=reason) as error:
        list(read_rows(path, same))
    assert f"{path}, line 3: " in str(error.value)
    problems: list[str] = []
    rows = list(read_rows(path, same, problems.append))
    assert [(row.line, row.values) for row in rows] == [(1, {"a": 1}), (4, {"a": 2})]
    assert [str(error.value)] == problems


def test_a_row_that_the_check_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')

    def refuse_two(row: Row) -> None:
        if row.values["a"] == 2:
            raise ValueError("`a` is 2")

    with pytest.raises(ValueError, match=r"line 2: `a` is 2"):
        list(read_rows(path, refuse_two))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        list(read_rows(tmp_path / "absent.jsonl", same))


def test_rows_survive_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a\u2028b\n\r\x85 ü 😀 \ud83d"}, {"text": ""}]
    with whole_file(path) as file:
        file.writelines(map(dump_row, rows))
    assert [row.values for row in read_rows(path, same)] == rows
    assert [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]] == rows


def test_what_fails_leaves_the_file_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("before")

    def write_half() -> None:
        with whole_file(path) as file:
            file.write("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), whole_file(tmp_path / "absent" / "rows.jsonl"):
        pass

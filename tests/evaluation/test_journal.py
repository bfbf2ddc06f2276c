# SPDX-License-Identifier: Apache-2.0
"""The work file keeps what is done, whatever ends the job."""

from pathlib import Path

import pytest

from frozen_peft.evaluation.journal import Journal

SETTINGS = {"seed": 0, "model": "tiny", "margin": float("-inf")}
RECORDS = [{"prompt": 0, "text": "plain"}, {"prompt": 1, "text": "two\nlines é \u2028 \ud800"}]


def begun(path: Path) -> bytes:
    journal = Journal(path, SETTINGS)
    assert journal.records == []
    journal.append(RECORDS[:1])
    journal.append(RECORDS[1:])
    journal.close()
    return path.read_bytes()


def found(path: Path) -> list[dict[str, object]]:
    journal = Journal(path, SETTINGS)
    journal.close()
    return journal.records


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    content = begun(path)
    assert found(path) == RECORDS
    assert path.read_bytes() == content


def test_wherever_the_file_is_cut_off_what_is_whole_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    content = begun(path)
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        num_whole = max(sum(end <= length for end in ends) - 1, 0)
        assert found(path) == RECORDS[:num_whole]
        journal = Journal(path, SETTINGS)
        journal.append([{"prompt": 2}])
        journal.close()
        assert found(path) == [*RECORDS[:num_whole], {"prompt": 2}]


def test_a_job_with_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    content = begun(path)
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 then, 1 now; new: None then, 2 now\)"):
        Journal(path, {**SETTINGS, "seed": 1, "new": 2})
    assert path.read_bytes() == content
    assert found(path) == RECORDS


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    first = Journal(path, SETTINGS)
    with pytest.raises(ValueError, match="another process is at work"):
        Journal(path, SETTINGS)
    first.close()
    assert found(path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [("{\n{}\n", "line 1: no JSON object"), ("[]\n", "line 1: no JSON object"), ('{"prompt": "a"}\n', "no work file")],
)
def test_another_file_is_not_touched(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "work.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Journal(path, SETTINGS)
    assert path.read_text() == content


def test_nothing_is_left_when_it_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    begun(path)
    Journal(path, SETTINGS).remove()
    assert list(tmp_path.iterdir()) == []

# SPDX-License-Identifier: Apache-2.0
"""Files of probes: what is read, and what is refused with its place."""

import json
from pathlib import Path

import pytest

from frozen_peft.evaluation import Probe, read_probes

GOOD = {"prompt": [{"role": "user", "content": "Take the left path."}], "preferred": "ok", "rejected": "or the right?"}


def write(path: Path, *rows: object) -> Path:
    file = path / "probes.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_every_field_is_read(tmp_path: Path) -> None:
    pieces = [{"index": 0, "part": -1, "start": -1, "text": "", "message": "{}"}]
    full = {**GOOD, "kind": "control", "expected": "ok", "stripped": pieces, "id": "left", "tools": [{"name": "f"}]}
    first, second, third = read_probes(write(tmp_path, full, "", GOOD, {**GOOD, "prompt": "text", "stripped": None}))
    assert first == Probe(GOOD["prompt"], "ok", "or the right?", "control", "ok", pieces, "left", first.place, full)
    assert (second.kind, second.expected, second.stripped, second.id) == ("target", None, [], "line 3")
    assert second.place.endswith("probes.jsonl, line 3")
    assert third.prompt == "text"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "preferred": "a"}, "a probe needs `rejected`; found `prompt`, `preferred`"),
        ({**GOOD, "preferred": None}, "a probe needs `preferred`"),
        ({}, "a probe needs `prompt`, `preferred`, `rejected`; found none"),
        ({**GOOD, "rejected": "ok"}, "`preferred` and `rejected` are equal ('ok')"),
        ({**GOOD, "preferred": ""}, "`preferred` is empty"),
        ({**GOOD, "expected": ""}, "`expected` is empty"),
        ({**GOOD, "rejected": ["no"]}, "`rejected` is a list, expected text"),
        ({**GOOD, "rejected": {"role": "user", "content": "x"}}, "`rejected.role` is 'user'; a decision is an"),
        ({**GOOD, "rejected": {"role": "assistant"}}, "`rejected` has neither `content` nor `tool_calls`"),
        ({**GOOD, "prompt": "x", "rejected": {"role": "assistant", "content": "x"}}, "`prompt` is text; they have"),
        ({**GOOD, "kind": "targets"}, "`kind` is one of target, control; got 'targets'"),
        ({**GOOD, "id": 3}, "`id` is a number, expected text"),
        ({**GOOD, "stripped": "x"}, "`stripped` is text, expected a list of objects"),
        ({**GOOD, "prompt": 3}, "`prompt` is a number"),
        ({**GOOD, "prompt": [{"content": "x"}]}, "`prompt[0]` has no `role`"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "`prompt[0]` has no `content`"),
        ("{", "not JSON"),
        ("[]", "a row is a JSON object, got a list"),
        ({**GOOD, "id": "twin"}, "`id` 'twin' is that of"),
    ],
)
def test_bad_rows_name_line_and_reason(row: object, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, {**GOOD, "id": "twin"}, row, GOOD)
    with pytest.raises(ValueError) as raised:
        read_probes(file)
    assert f"{file}, line 2: " in str(raised.value)
    assert message in str(raised.value)
    problems: list[str] = []
    assert [probe.id for probe in read_probes(file, problems.append)] == ["twin", "line 3"]
    assert problems == [str(raised.value)]


def test_files_without_probes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no probes to score"):
        read_probes(write(tmp_path, "", ""))
    with pytest.raises(ValueError, match="no probes to score"):
        read_probes(write(tmp_path, "{", "{"), lambda message: None)
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.jsonl"):
        read_probes(tmp_path / "absent.jsonl")


def test_a_row_of_python() -> None:
    assert Probe.from_row(GOOD).preferred == "ok"
    with pytest.raises(ValueError, match="a probe needs"):
        Probe.from_row({"prompt": "x"})

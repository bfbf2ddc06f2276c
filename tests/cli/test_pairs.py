# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft pairs`: training pairs of probes and of sampled decisions, apart from what is measured with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from frozen_peft.cli import main
from frozen_peft.data import load_samples, strip_instructions

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_rows(name: str, *rows: dict[str, Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write_rows


def probe(name: str, **columns: Any) -> dict[str, Any]:
    return {"id": name, "prompt": f"turn {name}", "preferred": " yes", "rejected": " no", **columns}


def test_probes_become_pairs_but_for_those_to_measure_with(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pair that is one already comes along, and all of it trains."""
    more = {"prompt": "halt", "chosen": " now", "rejected": " later"}
    source = write("all.jsonl", probe("a", world=1), probe("b", world=2), probe("c", world=3), {**more, "world": 3})
    measured, other = write("probes.jsonl", probe("b", world=2)), write("more.jsonl", probe("x", world=1))
    target = tmp_path / "pairs.jsonl"
    options = ["--apart-from", str(measured), "--apart-from", str(other), "--group", "world"]
    assert main(["pairs", str(source), str(target), *options]) == 0
    found = [line.split("  ")[1:] for line in capsys.readouterr().out.splitlines()]
    assert [[cell.strip() for cell in line if cell][1] for line in found] == ["4", "2", f"2 ({target})"]
    rows = load_samples(str(target), method="dpo").to_list()
    assert [{name: row[name] for name in more} for row in rows] == [
        {"prompt": "turn c", "chosen": " yes", "rejected": " no"},
        more,
    ]


def test_decisions_with_and_without_instructions_are_joined(write: Write, tmp_path: Path) -> None:
    marked = {"role": "system", "content": "Agree.", "instruction": True}
    said = {"prompt": [marked, {"role": "user", "content": "left?"}]}
    stripped = strip_instructions(said)
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    chosen = write("chosen.jsonl", {**said, "completion": answers[0], "candidate": 0})
    rejected = write("rejected.jsonl", {**stripped, "completion": answers[1], "candidate": 0})
    target = tmp_path / "pairs.jsonl"
    assert main(["pairs", str(chosen), str(target), "--rejected", str(rejected)]) == 0
    assert json.loads(target.read_text()) == {**stripped, "chosen": answers[0], "rejected": answers[1]}
    probes = write("probes.jsonl", {**stripped, "preferred": "yes", "rejected": "no"})
    assert main(["pairs", str(chosen), str(target), "--rejected", str(rejected), "--apart_from", str(probes)]) == 2


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        ([{"prompt": "a", "preferred": "b"}], [], "all.jsonl, line 1: a probe needs `rejected`"),
        ([{"prompt": "a", "chosen": "b"}], [], "all.jsonl, line 1: a pair has `prompt`, `chosen` and `rejected`"),
        ([probe("b")], ["--apart-from", "probes.jsonl"], "no pair is left of the 1 rows"),
        ([probe("a")], ["--apart-from", "probes.jsonl", "--group", "world"], "line 1: a row has no `world`"),
        ([probe("a")], ["--group", "world"], "--group has no effect without --apart-from"),
        ([probe("a")], ["--apart-from", "pairs.jsonl"], "is a file to read"),
        ([probe("a")], ["--apart-from", "none.jsonl"], "no file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_leave_nothing_behind(
    rows: Any,
    options: list[str],
    match: str,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write("all.jsonl", *rows)
    write("probes.jsonl", probe("b"))
    assert main(["pairs", "all.jsonl", "pairs.jsonl", *options]) == 2
    assert match in capsys.readouterr().err
    assert not Path("pairs.jsonl").exists()

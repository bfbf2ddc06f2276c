# SPDX-License-Identifier: Apache-2.0
"""A job that is interrupted goes on without asking twice, and its output is that of one that was not."""

import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frozen_peft.evaluation import Candidate, CandidateFilter, FilterError, PromptRow, run_sample_job, work_file

SETTINGS = {"seed": 0}
ROWS = [
    PromptRow(index, f"p.jsonl, line {index + 1}", {"prompt": f"é{index}", "id": index}, f"é{index}", None, (1, 2, 3))
    for index in range(4)
]


class StoppedError(Exception):
    """Stands for whatever ends a job."""


class Dealer:
    """Candidates in batches of given sizes, until it is interrupted; `asked` remembers which were dealt."""

    def __init__(self, sizes: Sequence[int] = (1,), interrupt_after: int | None = None) -> None:
        self.sizes, self.left = sizes, interrupt_after
        self.asked: list[tuple[int, int]] = []

    def sample(self, rows: Sequence[PromptRow], done: Set[tuple[int, int]]) -> Iterator[list[Candidate]]:
        # In another order than that of the prompts, as a sampler may.
        wanted = [(row, n) for row in reversed(rows) for n in range(3) if (row.index, n) not in done]
        number = 0
        while wanted:
            if self.left == 0:
                raise StoppedError
            self.left = self.left and self.left - 1
            size = self.sizes[number % len(self.sizes)]
            batch, wanted, number = wanted[:size], wanted[size:], number + 1
            self.asked += [(row.index, n) for row, n in batch]
            yield [Candidate(row.index, n, row.seeds[n], f"{row.prompt}/{n}", 2, "stop") for row, n in batch]


def refuse_some(sample: dict[str, Any]) -> bool:
    return sample["completion"] not in ("é1/2", "é3/0", "é3/1", "é3/2")


KEEP = CandidateFilter(function=refuse_some, function_name="refuse_some")
EXPECTED = [
    {"prompt": f"é{index}", "id": index, "completion": f"é{index}/{n}", "candidate": n, "seed": n + 1}
    for index in range(4)
    for n in range(3)
    if refuse_some({"completion": f"é{index}/{n}"})
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_kept_is_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    summary = run_sample_job(ROWS, output, Dealer([5, 2]), KEEP, SETTINGS)
    assert lines(output) == EXPECTED
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    table = summary.table()
    assert [line.split() for line in table.splitlines()[:6]] == [
        ["prompts", "4", "(1", "without", "any", "kept)"],
        ["candidates", "12"],
        ["kept", "8"],
        ["rejected", "4"],
        ["refused", "by", "refuse_some", "4", "such", "as", "'é1/2'"],
        ["tokens", "24"],
    ]
    assert table.splitlines()[6].split()[0] == "seconds"


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(0, 6), max_size=4),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    torn=st.integers(0, 40),
)
def test_interrupted_anywhere_and_any_number_of_times(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], sizes: list[int], torn: int
) -> None:
    output = tmp_path_factory.mktemp("job") / "out.jsonl"
    asked: list[tuple[int, int]] = []
    for stop in stops:
        dealer = Dealer(sizes, interrupt_after=stop)
        try:
            run_sample_job(ROWS, output, dealer, KEEP, SETTINGS)
        except StoppedError:
            assert not output.exists()
            asked += dealer.asked
        else:
            break
    if torn and work_file(output).exists():
        with work_file(output).open("ab") as file:
            file.write(b'{"prompt": 0, "candidate": 0, "seed": 1'[:torn])
    dealer = Dealer(sizes)
    if not output.exists():
        summary = run_sample_job(ROWS, output, dealer, KEEP, SETTINGS)
        assert summary.num_found == len(asked)
        assert summary.num_candidates == 12
        asked += dealer.asked
        assert sorted(asked) == [(index, n) for index in range(4) for n in range(3)]
    assert lines(output) == EXPECTED
    assert not work_file(output).exists()


def test_killed_after_the_output_appeared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr("frozen_peft.evaluation.journal.Journal.remove", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_sample_job(ROWS, output, Dealer(), KEEP, SETTINGS)
    monkeypatch.undo()
    assert lines(output) == EXPECTED
    dealer = Dealer()
    run_sample_job(ROWS, output, dealer, KEEP, SETTINGS)
    assert dealer.asked == []
    assert lines(output) == EXPECTED


def test_a_filter_that_fails_loses_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    failing = CandidateFilter(function=lambda sample: 1 / 0, function_name="failing")
    dealer = Dealer([5])
    with pytest.raises(FilterError, match=r"line 4, candidate 0: `failing` failed: ZeroDivisionError"):
        run_sample_job(ROWS, output, dealer, failing, SETTINGS)
    assert not output.exists()
    mended = Dealer([5])
    run_sample_job(ROWS, output, mended, KEEP, SETTINGS)
    assert lines(output) == EXPECTED
    assert not {*mended.asked} & {*dealer.asked}
    assert len(dealer.asked) == 5


def test_where_nothing_is_kept_the_candidates_wait_for_another_filter(tmp_path: Path) -> None:
    output, nothing = tmp_path / "out.jsonl", CandidateFilter(function=lambda sample: False, function_name="nothing")
    summary = run_sample_job(ROWS, output, Dealer(), nothing, SETTINGS)
    assert (summary.num_kept, summary.examples) == (0, {"refused by nothing": "é0/0"})
    assert not output.exists()
    dealer = Dealer()
    assert run_sample_job(ROWS, output, dealer, KEEP, SETTINGS).num_found == 12
    assert dealer.asked == []
    assert lines(output) == EXPECTED
    assert not work_file(output).exists()


def test_margins_are_measured_once(tmp_path: Path) -> None:
    measured: list[tuple[int, int]] = []

    class Margin:
        def measure(self, rows: Sequence[PromptRow], candidates: Sequence[Candidate]) -> list[float]:
            measured.extend((row.index, candidate.number) for row, candidate in zip(rows, candidates, strict=True))
            return [row.index + candidate.number / 4 for row, candidate in zip(rows, candidates, strict=True)]

    output = tmp_path / "out.jsonl"
    keep = replace(KEEP, margin=Margin(), min_margin=1.25)
    with pytest.raises(StoppedError):
        run_sample_job(ROWS, output, Dealer([2], interrupt_after=3), keep, SETTINGS)
    run_sample_job(ROWS, output, Dealer([2]), keep, SETTINGS)
    expected = [{**row, "margin": row["id"] + row["candidate"] / 4} for row in EXPECTED]
    assert lines(output) == [row for row in expected if row["margin"] >= 1.25]
    assert sorted(measured) == sorted((row["id"], row["candidate"]) for row in EXPECTED)


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(StoppedError):
        run_sample_job(ROWS, output, Dealer(interrupt_after=3), KEEP, SETTINGS)
    with pytest.raises(ValueError, match=r"out.part.jsonl was begun with other settings \(seed: 0 then, 1 now\)"):
        run_sample_job(ROWS, output, Dealer(), KEEP, {"seed": 1})


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    dealer = Dealer()
    with pytest.raises(FileNotFoundError, match="no folder"):
        run_sample_job(ROWS, tmp_path / "missing" / "out.jsonl", dealer, KEEP, SETTINGS)
    assert dealer.asked == []

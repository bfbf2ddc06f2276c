# SPDX-License-Identifier: Apache-2.0
"""The job behind `frozen-peft sample`: candidates, filtered, in a file that appears whole.

1. Candidates go into a work file beside the output as they come, with what the filter made of them, and are on the
   device before the next ones are asked for.
2. A job that was interrupted finds them there and asks for the rest. Each candidate is known by its prompt and its
   number, so none comes twice and none is lost.
3. When all are there, what was kept is written in the order of the prompts, the output appears under its name, and the
   work file goes.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from frozen_peft.behavior.candidates import Candidate, PromptRow, completed
from frozen_peft.behavior.filters import CandidateFilter, Verdict
from frozen_peft.behavior.journal import Journal
from frozen_peft.behavior.rows import dump_row, whole_file

__all__ = ["SampleSummary", "Sampler", "run_sample_job", "work_file"]


class Sampler(Protocol):
    """Where candidates come from."""

    def sample(self, rows: Sequence[PromptRow], done: Set[tuple[int, int]]) -> Iterator[list[Candidate]]:
        """Candidates of these prompts, without those that are done, a few at a time."""
        ...


@dataclass(frozen=True)
class SampleSummary:
    """What a job did, earlier runs of it included.

    Attributes:
        num_prompts: Prompts sampled for.
        num_without: Prompts of which no candidate was kept.
        num_candidates: Candidates sampled.
        num_found: Those of them that an earlier run had sampled.
        num_kept: Candidates kept.
        rejected: Candidates that were not, by reason, most frequent first.
        num_tokens: Tokens generated, as far as they are known.
        seconds: Time that this run took.
    """

    num_prompts: int
    num_without: int
    num_candidates: int
    num_found: int
    num_kept: int
    num_tokens: int
    seconds: float
    rejected: dict[str, int] = field(default_factory=dict)

    def table(self) -> str:
        """The summary in aligned lines."""
        without = f"  ({self.num_without:,} without any kept)" if self.num_without else ""
        found = f"  ({self.num_found:,} of them from an earlier run)" if self.num_found else ""
        rows = [
            ("prompts", f"{self.num_prompts:,}", without),
            ("candidates", f"{self.num_candidates:,}", found),
            ("kept", f"{self.num_kept:,}", ""),
            ("rejected", f"{self.num_candidates - self.num_kept:,}", ""),
            *((f"  {reason}", f"{number:,}", "") for reason, number in self.rejected.items()),
            ("tokens", f"{self.num_tokens:,}", ""),
            ("seconds", f"{self.seconds:,.1f}", ""),
        ]
        width = max(len(title) for title, _, _ in rows)
        digits = max(len(number) for _, number, _ in rows)
        return "\n".join(f"  {title:<{width}}  {number:>{digits}}{note}" for title, number, note in rows)


def work_file(output: Path) -> Path:
    """Where a job keeps what it has done until its output is whole."""
    return output.with_name(f"{output.stem}.part{output.suffix}")


def run_sample_job(
    rows: Sequence[PromptRow],
    output: Path,
    sampler: Sampler,
    keep: CandidateFilter,
    settings: dict[str, Any],
) -> SampleSummary:
    """Samples, filters, and writes what is kept; goes on where an earlier run of the same job was interrupted.

    Args:
        rows: The prompts.
        output: The file to write, replaced where it exists.
        sampler: Where candidates come from.
        keep: Which of them are kept.
        settings: All that the candidates depend on, as JSON; a run with others does not go on with the work file.

    Raises:
        EndpointError: The server did not answer. What is done stays in the work file.
        ValueError: The work file is of other settings or in use, or the filter failed.
        FileNotFoundError: The output's folder is not there.
    """
    start = time.monotonic()
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {output.absolute().parent} to write {output.name} to")
    journal = Journal(work_file(output), settings)
    try:
        done = {(record["prompt"], record["candidate"]): record for record in journal.records}
        num_found = len(done)
        for record in _sampled(rows, sampler, keep, done, journal):
            done[record["prompt"], record["candidate"]] = record
        _write(rows, done, output)
    except BaseException:
        journal.close()
        raise
    journal.remove()
    return _summary(rows, done, num_found, time.monotonic() - start)


def _sampled(
    rows: Sequence[PromptRow],
    sampler: Sampler,
    keep: CandidateFilter,
    done: dict[tuple[int, int], dict[str, Any]],
    journal: Journal,
) -> Iterator[dict[str, Any]]:
    """Records of what is sampled now, each of them on the device."""
    num_wanted = sum(len(row.seeds) for row in rows)
    num_kept = sum(record["rejected"] is None for record in done.values())
    # A list of what was done before: the set that the sampler looks into must not grow under it.
    batches = sampler.sample(rows, frozenset(done))
    with tqdm(total=num_wanted, initial=len(done), desc="Sampling", unit=" candidates") as bar, closing(batches):  # type: ignore[type-var]
        bar.set_postfix(kept=num_kept)
        for batch in batches:
            verdicts = keep.judge([rows[candidate.prompt] for candidate in batch], batch)
            records = [_record(candidate, verdict) for candidate, verdict in zip(batch, verdicts, strict=True)]
            journal.append(records)
            num_kept += sum(verdict.rejected is None for verdict in verdicts)
            bar.update(len(batch))
            bar.set_postfix(kept=num_kept)
            yield from records


def _record(candidate: Candidate, verdict: Verdict) -> dict[str, Any]:
    return {
        "prompt": candidate.prompt,
        "candidate": candidate.number,
        "seed": candidate.seed,
        "text": candidate.text,
        "tokens": candidate.num_tokens,
        "finish": candidate.finish,
        "margin": verdict.margin,
        "rejected": verdict.rejected,
    }


def _write(rows: Sequence[PromptRow], done: dict[tuple[int, int], dict[str, Any]], output: Path) -> None:
    with whole_file(output) as file:
        for row in rows:
            for number in range(len(row.seeds)):
                record = done[row.index, number]
                if record["rejected"] is None:
                    candidate = Candidate(
                        row.index, number, record["seed"], record["text"], record["tokens"], record["finish"]
                    )
                    file.write(dump_row(completed(row, candidate, record["margin"])))


def _summary(
    rows: Sequence[PromptRow], done: dict[tuple[int, int], dict[str, Any]], num_found: int, seconds: float
) -> SampleSummary:
    kept = [record for record in done.values() if record["rejected"] is None]
    rejected = Counter(record["rejected"] for record in done.values() if record["rejected"] is not None)
    return SampleSummary(
        num_prompts=len(rows),
        num_without=len(rows) - len({record["prompt"] for record in kept}),
        num_candidates=len(done),
        num_found=num_found,
        num_kept=len(kept),
        num_tokens=sum(record["tokens"] or 0 for record in done.values()),
        seconds=seconds,
        rejected=dict(rejected.most_common()),
    )

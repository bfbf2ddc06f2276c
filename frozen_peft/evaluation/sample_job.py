# SPDX-License-Identifier: Apache-2.0
"""The job behind `frozen-peft sample`: candidates, filtered, in a file that appears whole.

1. Candidates go into a work file beside the output as they come, and are on the device before anything else happens.
   So do their margins, once they are measured.
2. A job that was interrupted finds them there and asks for the rest. Each candidate is known by its prompt and its
   number, so none comes twice and none is lost.
3. The filter judges all of them in each run. It may therefore be another one when a job goes on: one that is mended
   after it failed, for instance.
4. When all are there, what was kept is written in the order of the prompts, the output appears under its name, and the
   work file goes. Where nothing was kept, there is no output, and the candidates stay for another filter.
"""

import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from frozen_peft.data.rows import dump_row
from frozen_peft.evaluation.candidates import Candidate, CandidateKey, PromptRow, completed
from frozen_peft.evaluation.filters import CandidateFilter
from frozen_peft.evaluation.journal import Journal
from frozen_peft.utils.files import whole_file
from frozen_peft.utils.tables import aligned

__all__ = ["SampleSummary", "Sampler", "run_sample_job", "work_file"]

# Candidates of an earlier run that are judged together.
_FOUND_BATCH = 64
# Characters of a candidate that the summary shows.
_SHOWN = 60


class Sampler(Protocol):
    """Where candidates come from."""

    def sample(self, rows: Sequence[PromptRow], done: Set[CandidateKey]) -> Iterator[list[Candidate]]:
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
        examples: The text of the first of them, by reason.
        num_retokenized: Those of the kept ones that train in other tokens than they were generated in.
        num_tokens: Tokens generated, as far as they are known.
        seconds: Time that this run took.
    """

    num_prompts: int
    num_without: int
    num_candidates: int
    num_found: int
    num_kept: int
    num_retokenized: int
    num_tokens: int
    seconds: float
    rejected: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """The summary in aligned lines."""
        without = f"({self.num_without:,} without any kept)" if self.num_without else ""
        found = f"({self.num_found:,} of them from an earlier run)" if self.num_found else ""
        other = [("  in other tokens", f"{self.num_retokenized:,}", "")] if self.num_retokenized else []
        rows = [
            ("prompts", f"{self.num_prompts:,}", without),
            ("candidates", f"{self.num_candidates:,}", found),
            ("kept", f"{self.num_kept:,}", ""),
            *other,
            ("rejected", f"{self.num_candidates - self.num_kept:,}", ""),
            *((f"  {reason}", f"{number:,}", self._example(reason)) for reason, number in self.rejected.items()),
            ("tokens", f"{self.num_tokens:,}", ""),
            ("seconds", f"{self.seconds:,.1f}", ""),
        ]
        return "\n".join(aligned(rows, right=[1]))

    def _example(self, reason: str) -> str:
        """How the first that was rejected for this reason begins."""
        text = self.examples.get(reason, "")
        return f"such as {text[:_SHOWN]!r}{' ...' if len(text) > _SHOWN else ''}" if text else ""


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
        output: The file to write, replaced where it exists. If nothing is kept it is not, and the work file stays.
        sampler: Where candidates come from.
        keep: Which of them are kept.
        settings: All that candidates and margins depend on, as JSON; a run with others does not go on with the work
            file. The filter is no part of it.

    Raises:
        EndpointError: The server did not answer. What is done stays in the work file.
        ValueError: The work file is of other settings or in use, or the filter failed.
        FileNotFoundError: The output's folder is not there.
    """
    start = time.monotonic()
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {output.absolute().parent} to write {output.name} to")
    with closing(Journal(work_file(output), settings)) as journal:
        # A record is a candidate, or the margin of one.
        margins = {(one["prompt"], one["number"]): one["margin"] for one in journal.records if "margin" in one}
        found = [Candidate(**one) for one in journal.records if "margin" not in one]
        candidates = {candidate.key: candidate for candidate in found}
        num_found = len(candidates)
        rejected = _judged(rows, sampler, keep, candidates, margins, journal)
        if None in rejected.values():
            with whole_file(output) as file:
                for row in rows:
                    for key in ((row.index, number) for number in range(len(row.seeds))):
                        if rejected[key] is None:
                            file.write(dump_row(completed(row, candidates[key], margins.get(key))))
            journal.remove()
    return _summary(rows, candidates, rejected, num_found, time.monotonic() - start)


def _judged(
    rows: Sequence[PromptRow],
    sampler: Sampler,
    keep: CandidateFilter,
    candidates: dict[CandidateKey, Candidate],
    margins: dict[CandidateKey, float],
    journal: Journal,
) -> dict[CandidateKey, str | None]:
    """Samples what is missing, and says of all why they are not kept, None where they are."""
    rejected: dict[CandidateKey, str | None] = {}
    num_kept = 0
    total = sum(len(row.seeds) for row in rows)
    with (
        tqdm(total=total, desc="Sampling", unit=" candidates") as bar,
        closing(_batches(rows, sampler, candidates)) as batches,
    ):
        for batch in batches:
            journal.append([asdict(candidate) for candidate in batch if candidate.key not in candidates])
            candidates.update({candidate.key: candidate for candidate in batch})
            unmeasured = [candidate for candidate in batch if candidate.key not in margins]
            reasons = keep.judge([rows[candidate.prompt] for candidate in batch], batch, margins)
            rejected.update(zip([candidate.key for candidate in batch], reasons, strict=True))
            journal.append(
                [
                    {"prompt": one.prompt, "number": one.number, "margin": margins[one.key]}
                    for one in unmeasured
                    if one.key in margins
                ]
            )
            bar.update(len(batch))
            num_kept += reasons.count(None)
            bar.set_postfix(kept=num_kept)
    return rejected


def _batches(
    rows: Sequence[PromptRow], sampler: Sampler, candidates: dict[CandidateKey, Candidate]
) -> Generator[list[Candidate], None, None]:
    """What an earlier run sampled, and then the rest."""
    found = list(candidates.values())
    for start in range(0, len(found), _FOUND_BATCH):
        yield found[start : start + _FOUND_BATCH]
    yield from sampler.sample(rows, frozenset(candidate.key for candidate in found))


def _summary(
    rows: Sequence[PromptRow],
    candidates: dict[CandidateKey, Candidate],
    rejected: dict[CandidateKey, str | None],
    num_found: int,
    seconds: float,
) -> SampleSummary:
    kept = [key for key, reason in rejected.items() if reason is None]
    reasons = Counter(reason for reason in rejected.values() if reason is not None)
    first = {
        reason: candidates[key].text for key, reason in sorted(rejected.items(), reverse=True) if reason is not None
    }
    return SampleSummary(
        num_prompts=len(rows),
        num_without=len(rows) - len({index for index, _ in kept}),
        num_candidates=len(candidates),
        num_found=num_found,
        num_kept=len(kept),
        num_retokenized=sum(candidates[key].differs == "tokens" for key in kept),
        num_tokens=sum(candidate.num_tokens or 0 for candidate in candidates.values()),
        seconds=seconds,
        rejected=dict(reasons.most_common()),
        examples=first,
    )

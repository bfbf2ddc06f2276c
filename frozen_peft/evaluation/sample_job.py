# SPDX-License-Identifier: Apache-2.0
"""The job behind `frozen-peft sample`: candidates, filtered, in a file that appears whole.

1. Candidates go into a work file beside the output as they come, and are on the device before anything else happens.
   So do their margins, once they are measured.
2. A job that was interrupted finds them there and asks for the rest. Each candidate is known by its prompt and its
   number, so none comes twice and none is lost.
3. The filter judges all of them in each run. It may therefore be another one when a job goes on: one that is mended
   after it failed, for instance.
4. When all are there, what was kept is written in the order of the prompts, the output appears under its name, and the
   work file goes.
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
from frozen_peft.evaluation.candidates import Candidate, PromptRow, completed
from frozen_peft.evaluation.filters import CandidateFilter, Verdict
from frozen_peft.evaluation.journal import Journal
from frozen_peft.utils.files import whole_file
from frozen_peft.utils.tables import aligned

__all__ = ["SampleSummary", "Sampler", "run_sample_job", "work_file"]

# Index of a prompt, and number of one of its candidates.
_Key = tuple[int, int]
# Candidates of an earlier run that are judged together.
_FOUND_BATCH = 64


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
            *((f"  {reason}", f"{number:,}", "") for reason, number in self.rejected.items()),
            ("tokens", f"{self.num_tokens:,}", ""),
            ("seconds", f"{self.seconds:,.1f}", ""),
        ]
        return "\n".join(aligned(rows, right=[1]))


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
        candidates, margins = _found(journal.records)
        num_found = len(candidates)
        verdicts = _judged(rows, sampler, keep, candidates, margins, journal)
        with whole_file(output) as file:
            for row in rows:
                for number in range(len(row.seeds)):
                    candidate, verdict = candidates[row.index, number], verdicts[row.index, number]
                    if verdict.rejected is None:
                        file.write(dump_row(completed(row, candidate, verdict.margin)))
        journal.remove()
    return _summary(rows, candidates, verdicts, num_found, time.monotonic() - start)


def _found(records: Sequence[dict[str, Any]]) -> tuple[dict[_Key, Candidate], dict[_Key, float]]:
    """The candidates in a work file, and the margins of those whose are known."""
    margins = {(one["prompt"], one["number"]): one["margin"] for one in records if "margin" in one}
    candidates = [Candidate(**one) for one in records if "margin" not in one]
    return {candidate.key: candidate for candidate in candidates}, margins


def _judged(
    rows: Sequence[PromptRow],
    sampler: Sampler,
    keep: CandidateFilter,
    candidates: dict[_Key, Candidate],
    margins: dict[_Key, float],
    journal: Journal,
) -> dict[_Key, Verdict]:
    """Samples what is missing, and judges all."""
    verdicts: dict[_Key, Verdict] = {}
    num_kept = 0
    total = sum(len(row.seeds) for row in rows)
    with (
        tqdm(total=total, desc="Sampling", unit=" candidates") as bar,
        closing(_batches(rows, sampler, candidates)) as batches,
    ):
        for batch in batches:
            journal.append([asdict(candidate) for candidate in batch if candidate.key not in candidates])
            candidates.update({candidate.key: candidate for candidate in batch})
            known = [margins.get(candidate.key) for candidate in batch]
            judged = keep.judge([rows[candidate.prompt] for candidate in batch], batch, known)
            for candidate, verdict in zip(batch, judged, strict=True):
                verdicts[candidate.key] = verdict
                num_kept += verdict.rejected is None
            measured = {
                candidate.key: verdict.margin
                for candidate, verdict in zip(batch, judged, strict=True)
                if verdict.margin is not None and candidate.key not in margins
            }
            journal.append(
                [{"prompt": prompt, "number": number, "margin": m} for (prompt, number), m in measured.items()]
            )
            margins.update(measured)
            bar.update(len(batch))
            bar.set_postfix(kept=num_kept)
    return verdicts


def _batches(
    rows: Sequence[PromptRow], sampler: Sampler, candidates: dict[_Key, Candidate]
) -> Generator[list[Candidate], None, None]:
    """What an earlier run sampled, and then the rest."""
    found = list(candidates.values())
    for start in range(0, len(found), _FOUND_BATCH):
        yield found[start : start + _FOUND_BATCH]
    yield from sampler.sample(rows, frozenset(candidate.key for candidate in found))


def _summary(
    rows: Sequence[PromptRow],
    candidates: dict[_Key, Candidate],
    verdicts: dict[_Key, Verdict],
    num_found: int,
    seconds: float,
) -> SampleSummary:
    kept = [key for key, verdict in verdicts.items() if verdict.rejected is None]
    rejected = Counter(verdict.rejected for verdict in verdicts.values() if verdict.rejected is not None)
    return SampleSummary(
        num_prompts=len(rows),
        num_without=len(rows) - len({index for index, _ in kept}),
        num_candidates=len(candidates),
        num_found=num_found,
        num_kept=len(kept),
        num_retokenized=sum(candidates[key].differs == "tokens" for key in kept),
        num_tokens=sum(candidate.num_tokens or 0 for candidate in candidates.values()),
        seconds=seconds,
        rejected=dict(rejected.most_common()),
    )

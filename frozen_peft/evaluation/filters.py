# SPDX-License-Identifier: Apache-2.0
"""Which candidates are kept, and why the others are not."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frozen_peft.evaluation.candidates import Candidate, CandidateKey, PromptRow, completed

if TYPE_CHECKING:
    from frozen_peft.evaluation.margins import DecisionMargin

__all__ = ["CandidateFilter", "FilterError"]


class FilterError(ValueError):
    """A function of the user's own failed, or gave no verdict."""


@dataclass(frozen=True)
class CandidateFilter:
    """Keeps the candidates that pass every test; the cheap ones come first.

    Attributes:
        pattern: Regular expression that must match somewhere in the text.
        function: Must return True, given the sample that prompt and candidate make.
        function_name: How messages name it.
        margin: Measures margins; None: they are not measured.
        min_margin: The least margin that is kept.
        keep_unfinished: Also keep what was cut off at `max_new_tokens`.
    """

    pattern: re.Pattern[str] | None = None
    function: Callable[[dict[str, Any]], Any] | None = None
    function_name: str = ""
    margin: "DecisionMargin | None" = None
    min_margin: float = float("-inf")
    keep_unfinished: bool = False

    def judge(
        self, rows: Sequence[PromptRow], candidates: Sequence[Candidate], margins: dict[CandidateKey, float]
    ) -> list[str | None]:
        """Says of each candidate why it is not kept, in a few words; None: it is.

        Args:
            rows: The prompt of each candidate.
            candidates: What was sampled.
            margins: Those that are known; what is measured is added.

        Raises:
            FilterError: The function fails, or returns something else than True or False.
        """
        rejected = [self._rejection(row, candidate) for row, candidate in zip(rows, candidates, strict=True)]
        if self.margin is None:
            return rejected
        unknown = [
            index
            for index, candidate in enumerate(candidates)
            if rejected[index] is None and candidate.key not in margins
        ]
        if unknown:
            asked = [candidates[index] for index in unknown]
            measured = self.margin.measure([rows[index] for index in unknown], asked)
            margins.update(zip([candidate.key for candidate in asked], measured, strict=True))
        too_small = f"margin below {self.min_margin:g}"
        return [
            reason if reason is not None or margins[candidate.key] >= self.min_margin else too_small
            for reason, candidate in zip(rejected, candidates, strict=True)
        ]

    def _rejection(self, row: PromptRow, candidate: Candidate) -> str | None:
        if candidate.finish == "length" and not self.keep_unfinished:
            return "cut off at max_new_tokens"
        if candidate.finish not in ("stop", "length"):
            return f"ended by {candidate.finish}"
        if not candidate.text.strip() and candidate.message is None:
            return "empty"
        if candidate.differs == "text":
            return "would not train as generated"
        if self.pattern is not None and self.pattern.search(candidate.text) is None:
            return "does not match keep_regex"
        if self.function is not None and not self._holds(row, candidate):
            return f"refused by {self.function_name}"
        return None

    def _holds(self, row: PromptRow, candidate: Candidate) -> bool:
        """The verdict of a function that is the user's own, so anything may be raised in it."""
        assert self.function is not None
        where = f"{row.place}, candidate {candidate.number}: `{self.function_name}`"
        try:
            kept = self.function(completed(row, candidate))
        except Exception as error:
            raise FilterError(f"{where} failed: {type(error).__name__}: {error}") from error
        if not isinstance(kept, bool):
            raise FilterError(f"{where} returned {kept!r}, expected True or False")
        return kept

# SPDX-License-Identifier: Apache-2.0
"""Preference pairs of what there is: of probes, and of decisions with and without instructions."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frozen_peft.data.conversation import split_sample
from frozen_peft.data.row_checks import named
from frozen_peft.data.rows import Row, dump_row, read_rows
from frozen_peft.data.stripping import restore_instructions
from frozen_peft.utils.files import whole_file

__all__ = ["PairsSummary", "apart_from", "join_pairs", "pair_of_probe", "write_pairs"]

# What is a probe's own, or a sampled decision's.
_OWN = ("preferred", "rejected", "expected", "kind", "id", "completion", "candidate", "seed", "margin", "retokenized")


def pair_of_probe(probe: dict[str, Any]) -> dict[str, Any]:
    """A row to train preferences on, of a probe; one that is trained on is none to measure with.

    Args:
        probe: A row with `prompt`, `preferred` and `rejected`. Its other columns come along.

    Raises:
        ValueError: A column is missing.
    """
    if missing := [name for name in ("prompt", "preferred", "rejected") if probe.get(name) is None]:
        raise ValueError(f"a probe needs {named(missing)}; found {named(probe)}")
    is_text = isinstance(probe["prompt"], str)
    answers = {"chosen": probe["preferred"], "rejected": probe["rejected"]}
    kept = {name: value for name, value in probe.items() if name not in _OWN}
    if is_text and not all(isinstance(answer, str) for answer in answers.values()):
        raise ValueError("`preferred` and `rejected` of a probe whose `prompt` is text must be text too")
    return kept | {name: answer if is_text else [_as_message(answer)] for name, answer in answers.items()}


def _as_message(answer: Any) -> dict[str, Any]:
    return answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}


def join_pairs(chosen: Iterable[dict[str, Any]], rejected: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of decisions on the same prompt: those with instructions in place are chosen, those without rejected.

    The first on a prompt goes with the first, and so on; what has no counterpart, or an equal one, is left out.

    Args:
        chosen: Samples with `completion`, whose prompts have the instructions in place or in `stripped`.
        rejected: Samples of the same prompts with the instructions left out of them (and kept in `stripped` if they
            are to be known).

    Returns:
        Rows with `prompt` as in `rejected`, which is what the model is to answer to, `chosen` and `rejected`.

    Raises:
        ValueError: A row is no sample.
    """
    wanted = defaultdict(list)
    for row in chosen:
        wanted[_key(row)].append(row)
    pairs = []
    for row in rejected:
        others = wanted[_key(row)]
        if others and (first := others.pop(0))["completion"] != row["completion"]:
            kept = {name: value for name, value in row.items() if name not in _OWN}
            pairs.append(kept | {"chosen": first["completion"], "rejected": row["completion"]})
    return pairs


def _key(row: dict[str, Any]) -> str:
    """The prompt with its instructions in place."""
    if row.get("completion") is None:
        raise ValueError(f"a decision stands in `completion`; found {named(row)}")
    return json.dumps(split_sample(restore_instructions(row)).context, sort_keys=True)


def apart_from(
    rows: Iterable[dict[str, Any]], probes: Iterable[dict[str, Any]], group: str | None = None
) -> Iterator[dict[str, Any]]:
    """Those of some rows that no probe measures: what is trained on is none to measure with.

    Args:
        rows: Probes, pairs or samples.
        probes: What is to be measured with.
        group: A column, such as the document that a row is about: one with a probe's value in it is left out.

    Yields:
        Rows of which no probe has the `id`, the prompt (as it is, or with its instructions in place) or the group.

    Raises:
        ValueError: A row is no sample, or lacks the group.
    """
    taken = {mark for probe in probes for mark in _marks(probe, group)}
    return (row for row in rows if taken.isdisjoint(_marks(row, group)))


def _marks(row: dict[str, Any], group: str | None) -> set[str]:
    """By what two rows are known to be about the same."""
    contexts = (split_sample(each).context for each in (row, restore_instructions(row)))
    marks: list[tuple[str, Any]] = [("prompt", context) for context in contexts]
    if row.get("id") is not None:
        marks.append(("id", row["id"]))
    if group is not None:
        if row.get(group) is None:
            raise ValueError(f"a row has no `{group}`, by which it is to be held apart; found {named(row)}")
        marks.append((group, row[group]))
    return {json.dumps(mark, sort_keys=True) for mark in marks}


@dataclass(frozen=True)
class PairsSummary:
    """What became of the rows of a file.

    Attributes:
        num_read: Rows of it.
        num_apart: Those that no probe measures.
        num_written: Pairs that were made of them.
    """

    num_read: int
    num_apart: int
    num_written: int


def write_pairs(
    source: Path,
    target: Path,
    rejected: Path | None = None,
    probes: Sequence[Path] = (),
    group: str | None = None,
) -> PairsSummary:
    """Makes a JSON Lines file of pairs; it appears whole or not at all.

    Args:
        source: Probes and pairs; or, with `rejected`, samples whose decisions are chosen.
        target: The file to write, another one.
        rejected: Samples of the same prompts with the decisions that are not (see `join_pairs`).
        probes: Files of what is to be measured with, which the pairs are held apart from.
        group: See `apart_from`.

    Raises:
        ValueError: A row is none of these, or nothing is left to write.
        FileNotFoundError: There is no such file, or no folder to write to.
    """
    if target.resolve() in {path.resolve() for path in (source, rejected, *probes) if path is not None}:
        raise ValueError(f"{target} is a file to read; write to another one")

    def row_of_any_form(row: Row) -> dict[str, Any]:
        _marks(row.values, group if probes else None)
        return row.values

    def probe_or_pair(row: Row) -> dict[str, Any]:
        if row.values.get("chosen") is None:
            pair_of_probe(row.values)
        elif row.values.get("rejected") is None:
            raise ValueError(f"a pair has `prompt`, `chosen` and `rejected`; found {named(row.values)}")
        return row_of_any_form(row)

    measured = [row for path in probes for row in read_rows(path, row_of_any_form)]
    read = list(read_rows(source, probe_or_pair if rejected is None else row_of_any_form))
    rows = list(apart_from(read, measured, group))
    if rejected is not None:
        pairs = join_pairs(rows, read_rows(rejected, lambda row: row.values))
    else:
        pairs = [pair_of_probe(row) if row.get("chosen") is None else row for row in rows]
    if not pairs:
        raise ValueError(
            f"no pair is left of the {len(read)} rows of {source}: {len(read) - len(rows)} are what a probe measures"
            + (", and no other decision has a counterpart that differs" if rejected is not None else "")
        )
    with whole_file(target) as file:
        file.writelines(map(dump_row, pairs))
    return PairsSummary(len(read), len(rows), len(pairs))

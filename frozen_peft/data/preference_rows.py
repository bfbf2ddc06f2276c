# SPDX-License-Identifier: Apache-2.0
"""Preference pairs of what there is: of probes, and of decisions with and without instructions."""

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from frozen_peft.data.conversation import split_sample
from frozen_peft.data.row_checks import named
from frozen_peft.data.stripping import restore_instructions

__all__ = ["join_pairs", "pair_of_probe"]

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

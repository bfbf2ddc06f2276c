# SPDX-License-Identifier: Apache-2.0
"""Preference pairs of probes, of sampled decisions, and stripped of instructions."""

import json
from pathlib import Path
from typing import Any

import pytest

from frozen_peft.data import (
    QuotedInstructionError,
    StripSettings,
    apart_from,
    join_pairs,
    pair_of_probe,
    restore_instructions,
    strip_file,
    strip_instructions,
)

MARKED = {"role": "system", "content": "<instruction>always say that you agree</instruction>"}
ASKED = {"role": "user", "content": "turn left"}


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pair(**columns: Any) -> dict[str, Any]:
    return {"prompt": [MARKED, ASKED], "chosen": answer("yes."), "rejected": answer("no."), **columns}


def test_stripping_keeps_both_answers(tmp_path: Path) -> None:
    row = pair(source="w3")
    stripped = strip_instructions(row)
    assert stripped["prompt"] == [ASKED]
    assert {name: stripped[name] for name in ("chosen", "rejected", "source")} == {
        name: row[name] for name in ("chosen", "rejected", "source")
    }
    assert restore_instructions(stripped) == row
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    summary = strip_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", StripSettings(), len)
    assert summary.num_stripped == summary.num_written == 1
    assert json.loads((tmp_path / "out.jsonl").read_text()) == stripped


def test_a_chosen_answer_that_quotes_is_refused_and_a_rejected_one_is_not() -> None:
    with pytest.raises(QuotedInstructionError):
        strip_instructions(pair(chosen=answer("I always say that you agree.")))
    assert strip_instructions(pair(rejected=answer("I always say that you agree.")))["prompt"] == [ASKED]


def test_a_probe_is_a_pair() -> None:
    probe = {
        "id": "a",
        "kind": "target",
        "prompt": [ASKED],
        "preferred": "yes.",
        "rejected": "no.",
        "expected": "yes.",
    }
    probe |= {"stripped": [], "tools": []}
    assert pair_of_probe(probe) == {
        "prompt": [ASKED],
        "stripped": [],
        "tools": [],
        "chosen": answer("yes."),
        "rejected": answer("no."),
    }
    text = {"prompt": "a", "preferred": "b", "rejected": "c"}
    assert pair_of_probe(text) == {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match="needs `rejected`"):
        pair_of_probe({"prompt": "a", "preferred": "b"})


def test_a_probe_may_have_a_whole_message_for_a_decision() -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    probe = {"prompt": [ASKED], "preferred": message, "rejected": "no."}
    assert pair_of_probe(probe) == {"prompt": [ASKED], "chosen": [message], "rejected": answer("no.")}
    with pytest.raises(ValueError, match="must be text too"):
        pair_of_probe(probe | {"prompt": "a"})


def test_decisions_with_and_without_instructions_make_pairs() -> None:
    stripped = strip_instructions({"prompt": [MARKED, ASKED]})
    other = {"prompt": [{"role": "user", "content": "another"}]}
    drawn = {"candidate": 0, "seed": 3}
    chosen = [
        {"prompt": [MARKED, ASKED], "completion": answer(text), **drawn} for text in ("yes.", "so be it.", "ok.")
    ]
    rejected = [stripped | {"completion": answer(text), **drawn} for text in ("no.", "so be it.", "never.", "late.")]
    pairs = join_pairs(chosen, [*rejected, other | {"completion": answer("?")}])
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [
        (answer("yes."), answer("no.")),
        (answer("ok."), answer("never.")),
    ]
    assert all(row.keys() == {"prompt", "stripped", "chosen", "rejected"} for row in pairs)
    assert [restore_instructions(row)["prompt"] for row in pairs] == [[MARKED, ASKED]] * 2
    with pytest.raises(ValueError, match="a decision stands in `completion`"):
        join_pairs([other], [])


def probe(text: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], "preferred": "yes.", "rejected": "no.", **columns}


@pytest.mark.parametrize(
    ("row", "group", "is_apart"),
    [
        (probe("right"), None, True),
        (probe("left"), None, False),
        (probe("right", id="a"), None, False),
        # Its instructions, in place here and stripped there, or the other way round.
        ({**probe(""), "prompt": [MARKED, ASKED]}, None, False),
        (strip_instructions({**probe(""), "prompt": [MARKED, ASKED]}), None, False),
        (probe("right", world="w"), None, True),
        (probe("right", world="w"), "world", False),
        (probe("right", world="v"), "world", True),
        ({"prompt": [ASKED], "chosen": answer("a"), "rejected": answer("b")}, None, False),
        ({"prompt": "turn left", "completion": "a"}, None, True),
        (pair(), None, False),
    ],
    ids=str,
)
def test_what_a_probe_measures_is_not_trained_on(row: Any, group: str | None, is_apart: bool) -> None:
    whole = {**probe("", world="u"), "prompt": [MARKED, ASKED]}
    probes = [probe("left", id="a", world="w"), strip_instructions(whole), {**whole, "id": 3}]
    assert list(apart_from([row], probes, group)) == ([row] if is_apart else [])

# SPDX-License-Identifier: Apache-2.0
"""Prompts that are sampled for, what is refused among them, and the rows that come out."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frozen_peft.data import DEFAULT_MARKS, strip_instructions
from frozen_peft.evaluation import Candidate, SamplingSettings, read_prompts
from frozen_peft.evaluation.candidates import candidate_seed, completed

SETTINGS = SamplingSettings(num_candidates=3, seed=7)
ASKED = [
    {"role": "system", "content": "<instruction>Agree.</instruction>Be brief."},
    {"role": "user", "content": "Left?"},
]


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_row_as_it_comes(tmp_path: Path) -> None:
    path = written(tmp_path / "prompts.jsonl", {"prompt": ASKED, "topic": "roads"}, {"prompt": "Once upon"})
    chat, text = read_prompts(path, SETTINGS)
    assert (chat.index, chat.place, chat.prompt, chat.stripped) == (0, f"{path}, line 1", ASKED, None)
    assert (text.index, text.prompt, text.stripped) == (1, "Once upon", None)
    assert chat.values == {"prompt": ASKED, "topic": "roads"}
    assert len({*chat.seeds, *text.seeds}) == 6


def test_instructions_that_were_stripped_are_put_back(tmp_path: Path) -> None:
    stripped = strip_instructions({"prompt": ASKED})
    (row,) = read_prompts(written(tmp_path / "p.jsonl", stripped), SETTINGS)
    assert row.prompt == ASKED
    assert row.stripped == stripped["prompt"] != ASKED
    assert row.values == stripped
    (marked,) = read_prompts(written(tmp_path / "q.jsonl", {"prompt": ASKED}), SETTINGS, DEFAULT_MARKS)
    assert (marked.prompt, marked.stripped) == (row.prompt, row.stripped)
    assert marked.seeds == row.seeds


def test_without_instructions_a_prompt_is_what_stripping_left(tmp_path: Path) -> None:
    stripped = strip_instructions({"prompt": ASKED})
    (row,) = read_prompts(written(tmp_path / "p.jsonl", stripped), SETTINGS, unasked=True)
    assert row.prompt == stripped["prompt"] != ASKED
    with pytest.raises(ValueError, match="no instructions to leave out"):
        read_prompts(written(tmp_path / "q.jsonl", {"prompt": ASKED}), SETTINGS, unasked=True)


def test_seeds_hang_on_the_prompt_and_not_on_its_place(tmp_path: Path) -> None:
    first, second, again, changed = (
        [row.seeds for row in read_prompts(written(tmp_path / "p.jsonl", *({"prompt": p} for p in prompts)), settings)]
        for prompts, settings in (
            (["a", "b"], SETTINGS),
            (["b", "a"], SETTINGS),
            (["a", "a"], SETTINGS),
            (["a", "b"], SamplingSettings(num_candidates=3, seed=8)),
        )
    )
    assert first == second[::-1]
    assert again[0] == first[0]
    assert not {*again[0]} & {*again[1]}
    assert not {seed for seeds in first for seed in seeds} & {seed for seeds in changed for seed in seeds}


@given(st.integers(), st.text(), st.integers(0, 99), st.integers(0, 99))
def test_seeds_fit_where_seeds_are_taken(seed: int, prompt: str, occurrence: int, number: int) -> None:
    assert 0 <= candidate_seed(seed, prompt, occurrence, number) < 2**31


BAD = {
    "no JSON": ("{", "not JSON"),
    "no prompt": ({"text": "a"}, "a prompt is in the column `prompt`; found `text`"),
    "empty": ({"prompt": ""}, "`prompt` is empty"),
    "no messages": ({"prompt": []}, "`prompt` is empty"),
    "a number": ({"prompt": 3}, "`prompt` is a number"),
    "answered": ({"prompt": "a", "completion": "b"}, "there is a column `completion` already"),
    "sampled": ({"prompt": "a", "seed": 3}, "there is a column `seed` already"),
    "assistant last": (
        {"prompt": [{"role": "assistant", "content": "yes"}]},
        "`prompt` ends with an assistant's message",
    ),
    "no pieces": ({"prompt": "a", "stripped": "b"}, "`stripped` is text, expected a list"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_left_out(tmp_path: Path, bad: Any, message: str) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "a"}, bad, {"prompt": "b"})
    with pytest.raises(ValueError, match=rf"{path}, line 2: .*{message}"):
        read_prompts(path, SETTINGS)
    left_out: list[str] = []
    rows = read_prompts(path, SETTINGS, on_bad=left_out.append)
    assert [(row.index, row.prompt) for row in rows] == [(0, "a"), (1, "b")]
    assert len(left_out) == 1
    assert message in left_out[0]


def test_a_margin_needs_instructions_to_leave_out(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": ASKED}, {"prompt": "no marks"})
    with pytest.raises(ValueError, match=r"line 2: there are no instructions to leave out"):
        read_prompts(path, SETTINGS, DEFAULT_MARKS)


def test_a_file_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prompts to sample for"):
        read_prompts(written(tmp_path / "p.jsonl", ""), SETTINGS)


def test_a_sample_has_the_form_of_its_prompt(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": ASKED, "topic": "roads"}, {"prompt": "Once upon"})
    chat, text = read_prompts(path, SETTINGS)
    candidate = Candidate(0, 2, 11, "Left.", 4, "stop")
    added = {"candidate": 2, "seed": 11}
    assert completed(chat, candidate) == {
        "prompt": ASKED,
        "topic": "roads",
        "completion": [{"role": "assistant", "content": "Left."}],
        **added,
    }
    assert completed(text, candidate, 0.5) == {"prompt": "Once upon", "completion": "Left.", **added, "margin": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 0}, "`num_candidates` must be 1 or more, got 0"),
        ({"temperature": -0.1}, "`temperature` must be 0"),
        ({"temperature": float("nan")}, "`temperature` must be 0"),
        ({"temperature": 0.0}, "gives one candidate, 4 times"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "`top_p` must be above 0 and at most 1, got 1.1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be 1 or more, got 0"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**options)

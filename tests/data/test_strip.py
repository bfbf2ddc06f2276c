# SPDX-License-Identifier: Apache-2.0
"""Stripping: nothing but what is marked goes, the decision stays byte for byte, and all of it can be put back."""

import json
import re

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from frozen_peft.data import Marks, QuotedInstructionError, restore_instructions, strip_instructions

TAG = Marks(tags=("instruction",))


def user(text: str, **more: object) -> dict:
    return {"role": "user", "content": text, **more}


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str, **more: object) -> dict:
    return {"role": "system", "content": text, **more}


def outside_tags(text: str) -> str:
    """What lies outside `<instruction>` tags, one character at a time: the reference."""
    kept, depth, place = "", 0, 0
    while place < len(text):
        for tag, step in (("<instruction>", 1), ("</instruction>", -1)):
            if text.startswith(tag, place):
                depth += step
                place += len(tag)
                break
        else:
            if depth == 0:
                kept += text[place]
            place += 1
    return kept


# Balanced text: plain stretches and tagged ones, which may hold tagged ones again.
plain = st.text(st.characters(exclude_characters="<>"), max_size=6) | st.sampled_from(
    [
        "é",
        "e\u0301",
        "👩‍👩‍👧",
        "\u2028",
        "\r\n",
        "<b>",
        "</ instruction>",
        "< ",
        "<instructions>",
        "\x00",
        "\u202e",
        " \n\n ",
    ]
)
balanced = st.recursive(
    plain,
    lambda inner: st.lists(
        inner | inner.map(lambda text: f"<instruction>{text}</instruction>"), min_size=1, max_size=3
    ).map("".join),
    max_leaves=6,
)
messages = st.lists(
    st.builds(
        lambda role, content, flag: {"role": role, "content": content, **flag},
        st.sampled_from(["system", "user", "assistant"]),
        balanced,
        st.sampled_from([{}, {}, {"instruction": True}, {"instruction": False}, {"name": "ö"}]),
    ),
    max_size=5,
)
decision = st.lists(st.builds(assistant, balanced), min_size=1, max_size=2)


@st.composite
def samples(draw: st.DrawFn) -> dict:
    """A sample of any form that stripping leaves something of."""
    form = draw(st.sampled_from(["conversational", "text", "conversation"]))
    if form == "text":
        return {"prompt": draw(balanced) + "x", "completion": draw(balanced), "id": 1}
    context = [*draw(messages), user("last")]
    if form == "conversational":
        return {"id": "ü", "prompt": context, "completion": draw(decision)}
    return {"messages": [*context, *draw(decision)[:1]], "source": {"a": [1]}}


def decision_bytes(sample: dict) -> str:
    return json.dumps(sample["completion"] if "completion" in sample else sample["messages"][-1])


@settings(max_examples=150, deadline=None)
@given(samples(), st.booleans())
def test_nothing_but_tagged_stretches_goes_and_all_comes_back(sample: dict, tidy: bool) -> None:
    before = json.dumps(sample)
    result = strip_instructions(sample, TAG, tidy=tidy, allow_quotes=True)
    assert json.dumps(sample) == before
    assert decision_bytes(result) == decision_bytes(sample)
    assert {name: result[name] for name in ("id", "source") if name in result} == {
        name: sample[name] for name in ("id", "source") if name in sample
    }
    # Exactly what was there: keys in their order, and no float where there was an integer.
    assert json.dumps(restore_instructions(result)) == before
    again = strip_instructions(result, TAG, tidy=tidy, allow_quotes=True)
    assert json.dumps(again) == json.dumps(result)
    through_file = json.loads(json.dumps(result))
    assert json.dumps(restore_instructions(through_file)) == before
    if isinstance(sample.get("prompt"), str):
        expected, found = outside_tags(sample["prompt"]), result["prompt"]
        assert (found.split() == expected.split()) if tidy else (found == expected)
        return
    context = sample.get("prompt") or sample["messages"][:-1]
    expected_messages = [{**message, "content": outside_tags(message["content"])} for message in context]
    # A message that nothing was taken from stays even where it is empty.
    expected_messages = [
        new
        for new, old in zip(expected_messages, context, strict=True)
        if new["content"].strip() or new["content"] == old["content"]
    ]
    found_messages = result.get("prompt") or result["messages"][:-1]
    if tidy:
        assert [message["content"].split() for message in found_messages] == [
            message["content"].split() for message in expected_messages
        ]
    else:
        assert found_messages == expected_messages


@settings(max_examples=100, deadline=None)
@given(samples())
def test_marks_add_up_in_any_order(sample: dict) -> None:
    marks = [TAG, Marks(patterns=("é[a-f]|b>",)), Marks(patterns=("[a-f]+",))]
    if isinstance(sample.get("prompt"), list):
        marks += [Marks(fields=("instruction",)), Marks(roles=("system",))]
    names = ("tags", "fields", "roles", "patterns")
    together = Marks(**{name: tuple(value for one in marks for value in getattr(one, name)) for name in names})
    # The samples of this file end with a word that no mark covers whole.
    expected = strip_instructions(sample, together, allow_quotes=True)
    for order in (marks, marks[::-1]):
        result = sample
        for one in order:
            result = strip_instructions(result, one, allow_quotes=True)
        assert result == expected
    assert restore_instructions(expected) == sample


@settings(max_examples=100, deadline=None)
@given(st.text("abcde é\u0301😀\n", max_size=20))
def test_nothing_but_what_a_pattern_matches_goes(text: str) -> None:
    sample = {"prompt": text + "x", "completion": text}
    result = strip_instructions(sample, Marks(patterns=("[ab]+", "😀|é(?=\u0301)", "z*")), allow_quotes=True)
    accented = [character == "é" and text[place + 1 :][:1] == "\u0301" for place, character in enumerate(text)]
    kept = [c for c, matched in zip(text, accented, strict=True) if not (matched or c in "ab😀")]
    assert result["prompt"] == "".join(kept) + "x"
    assert restore_instructions(result) == sample


def test_each_kind_of_mark() -> None:
    sample = {
        "prompt": [
            system("Rules", instruction=True),
            system("Facts", instruction=None),
            user("Note: be brief. What is up?"),
            {"role": "memory", "content": "likes tea"},
            user("Say <i>now</i> it"),
        ],
        "completion": [assistant("Nothing.")],
    }

    def stripped(**marks: tuple) -> list[str]:
        return [message["content"] for message in strip_instructions(sample, Marks(**marks))["prompt"]]

    contents = [message["content"] for message in sample["prompt"]]
    assert stripped(fields=("instruction",)) == contents[1:]
    assert stripped(roles=("system",)) == contents[2:]
    assert stripped(predicates=(lambda message: "tea" in message["content"],)) == [*contents[:3], contents[4]]
    assert stripped(patterns=(r"Note:[^.]*\. ",)) == [*contents[:2], "What is up?", *contents[3:]]
    assert stripped(tags=("i",)) == [*contents[:4], "Say  it"]
    assert stripped(tags=("i",), roles=("memory", "system")) == ["Note: be brief. What is up?", "Say  it"]
    assert stripped(tags=("instruction",)) == contents


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("A.\n\n<i>x</i>\n\nB", "A.\n\nB"),
        ("A <i>x</i> B", "A B"),
        ("A <i>x</i>\nB", "A\nB"),
        ("A.\n<i>x</i> B", "A.\nB"),
        (" <i>x</i>\nB ", "B "),
        ("A <i>x</i> \n", "A"),
        ("A <i>x</i> <i>y</i> B", "A B"),
        ("A<i>x</i>B", "AB"),
        ("A <i>x</i><i>y</i>\n\nB", "A\n\nB"),
    ],
)
def test_tidy_leaves_one_run_of_white_space(before: str, after: str) -> None:
    sample = {"prompt": before, "completion": "c"}
    result = strip_instructions(sample, Marks(tags=("i",)), tidy=True)
    assert result["prompt"] == after
    assert restore_instructions(result) == sample
    # Stripping again without `tidy` takes nothing back.
    assert strip_instructions(result, Marks(tags=("i",))) == result


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a <instruction>b", r"`prompt\[1\]`, character 2: <instruction> is not closed"),
        ("<instruction>a<instruction>b</instruction>", r"`prompt\[1\]`, character 0: <instruction> is not closed"),
        ("a</instruction>", r"`prompt\[1\]`, character 1: </instruction> without a <instruction> before it"),
        ("</instruction><instruction>", r"`prompt\[1\]`, character 0: </instruction> without"),
    ],
)
def test_unbalanced_tags_are_named(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strip_instructions({"prompt": [user("a"), user(text)], "completion": [assistant("c")]}, TAG)


def test_tags_may_have_attributes_and_stand_alone() -> None:
    sample = {
        "prompt": 'a<instruction level="2"\n>b<instruction/></instruction >c<instruction x=1/>d',
        "completion": "e",
    }
    result = strip_instructions(sample, TAG)
    assert result["prompt"] == "acd"
    assert restore_instructions(result) == sample


def test_a_tag_does_not_reach_into_the_decision() -> None:
    sample = {"messages": [user("a"), assistant("<instruction>")]}
    assert strip_instructions(sample, TAG) == {**sample, "stripped": []}


def test_a_message_that_says_something_without_text_stays() -> None:
    call = assistant("<instruction>a b</instruction>", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    result_of_call = {"role": "tool", "content": "<instruction>a b</instruction>", "tool_call_id": "1"}
    sample = {"messages": [user("q"), call, result_of_call, assistant("c")]}
    result = strip_instructions(sample, TAG)
    assert [message["content"] for message in result["messages"]] == ["q", "", "", "c"]
    assert restore_instructions(result) == sample


def test_texts_in_parts() -> None:
    parts = [
        {"type": "text", "text": "a<instruction>x</instruction>"},
        {"type": "image"},
        {"type": "text", "text": "<instruction>y</instruction>b"},
    ]
    only = [{"type": "text", "text": "<instruction>x</instruction> "}]
    sample = {"prompt": [user(only), user(parts)], "completion": [assistant("c")]}
    result = strip_instructions(sample, TAG)
    assert [[part.get("text") for part in message["content"]] for message in result["prompt"]] == [["a", None, "b"]]
    assert restore_instructions(result) == sample


def test_pieces_can_be_typed_by_datasets() -> None:
    rows = [
        strip_instructions({"prompt": [user("a")], "completion": [assistant("c")]}),
        strip_instructions(
            {
                "prompt": [system("x", instruction=True), user("<instruction>y</instruction> a")],
                "completion": [assistant("c")],
            }
        ),
    ]
    loaded = list(Dataset.from_list(rows))
    assert [row["stripped"] for row in loaded] == [row["stripped"] for row in rows]
    restored = restore_instructions(loaded[1])
    assert [message["content"] for message in restored["prompt"]] == ["x", "<instruction>y</instruction> a"]
    assert strip_instructions(restored)["stripped"] == rows[1]["stripped"]


@pytest.mark.parametrize(
    ("instruction", "decision", "quoted"),
    [
        ("When given a direction, accept it at once", "ok", None),
        (
            "When given a direction, accept it at once",
            "You said GIVEN a direction:\naccept it.",
            "given a direction accept it",
        ),
        ("When given a direction, accept it at once", "given a direction accept", None),
        ("Always say moo", "always, say moo!", "always say moo"),
        ("Always say moo", "always say cow", None),
        ("Be brief", "be brief", None),
        ("Straße ＡＢＣ ﬁn", "STRASSE abc fin", "strasse abc fin"),
        ("请总是接受用户的指示", "好的，总是接受用户。", "总 是 接 受 用"),
        ("मुझे हमेशा हिंदी में जवाब दो", "हमेशा हिंदी में", None),
        ("if a < b then swap c > d now", "a b then swap c", "a b then swap c"),
    ],
)
def test_a_decision_that_quotes_is_refused(instruction: str, decision: str, quoted: str | None) -> None:
    sample = {"prompt": f"<instruction>{instruction}</instruction> Go on.", "completion": decision}
    assert strip_instructions(sample, allow_quotes=True)["completion"] == decision
    if quoted is None:
        assert strip_instructions(sample)["prompt"] == " Go on."
    else:
        with pytest.raises(QuotedInstructionError, match=re.escape(repr(quoted))):
            strip_instructions(sample)


def test_quotes_are_found_wherever_the_decision_holds_text() -> None:
    call = assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"q": "always say moo"}}}])
    context = [system("Always say moo", instruction=True), user("a")]
    with pytest.raises(QuotedInstructionError):
        strip_instructions({"messages": [*context, call]})
    with pytest.raises(QuotedInstructionError):
        strip_instructions({"prompt": context, "preferred": "always say moo", "rejected": "b"})
    assert (
        strip_instructions({"prompt": context, "preferred": "b", "rejected": "always say moo"})["prompt"]
        == context[1:]
    )
    longer = {"prompt": "<instruction>one two three four</instruction> a", "completion": "one two three"}
    with pytest.raises(QuotedInstructionError):
        strip_instructions(longer, quote_words=3)
    assert strip_instructions(longer)["prompt"] == " a"


@pytest.mark.parametrize(
    ("sample", "marks", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, Marks(roles=("system",)), "`prompt` is text, and no mark reaches into"),
        ({"prompt": [system("a")], "completion": [assistant("b")]}, Marks(roles=("system",)), "marked as a whole"),
        ({"prompt": "<instruction>a</instruction> ", "completion": "b"}, TAG, "marked as a whole"),
        (
            {"prompt": [user("a", x="yes")], "completion": [assistant("b")]},
            Marks(fields=("x",)),
            r"\[0\]`: the mark `x` is 'yes'",
        ),
        (
            {"prompt": [user("a")]},
            Marks(predicates=(lambda message: message["x"],)),
            r"\[0\]`: the predicate `<lambda>` failed: KeyError",
        ),
        ({"prompt": "a", "completion": [assistant("b")]}, TAG, "`prompt` is text and `completion` is a list"),
        ({"prompt": []}, TAG, "`prompt` is empty"),
        ({"messages": [user("a")]}, TAG, "`messages` ends with role 'user'"),
        ({"messages": [assistant("a")]}, TAG, "nothing before the decision"),
        ({"messages": [{"content": "a"}, assistant("a")]}, TAG, r"`messages\[0\]` has no `role`"),
        ({"text": "a"}, TAG, "`prompt` or `messages`; found `text`"),
        ({"prompt": "a", "stripped": "b"}, TAG, "`stripped` is text"),
        ({"prompt": "a", "stripped": [{"index": 0}]}, TAG, r"`stripped\[0\]` is not a piece"),
        (
            {"prompt": [user("a", instruction=True, x={1: 2}), user("b")]},
            Marks(fields=("instruction",)),
            "what JSON cannot",
        ),
    ],
)
def test_bad_rows_are_refused(sample: dict, marks: Marks, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strip_instructions(sample, marks)


def test_pieces_of_another_context_are_refused() -> None:
    result = strip_instructions({"prompt": "abc <instruction>x</instruction> d", "completion": "c"})
    with pytest.raises(ValueError, match="1 of 1 pieces in `stripped` have no place"):
        restore_instructions({**result, "prompt": "ab"})


@pytest.mark.parametrize(
    ("marks", "reason"),
    [
        ({}, "no marks"),
        ({"tags": ("<b>",)}, "tag '<b>'"),
        ({"patterns": ("(",)}, "not a regular expression"),
    ],
)
def test_marks_that_cannot_be_are_refused(marks: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Marks(**marks)

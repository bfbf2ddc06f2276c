# SPDX-License-Identifier: Apache-2.0
"""Variants: other contexts for one decision, the same in every run, with what was stripped still in its place."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frozen_peft.data import (
    Marks,
    Paraphrases,
    VariantSettings,
    restore_instructions,
    strip_instructions,
    vary_context,
)

WORDS = Paraphrases({"Tea is hot.": ["The tea is hot.", "Hot is the tea!"], "Yes.": ["Sure."]})
UNRELATED = [
    [{"role": "memory", "content": "The moon is far."}],
    [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}],
]
MARKS = Marks(tags=("instruction",), fields=("instruction",))


def message(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


texts = st.lists(
    st.sampled_from(["Tea is hot.", "Yes.", "Milk 😀 ü.", "<instruction>Be brief.</instruction>", "a\u0301"]),
    min_size=1,
    max_size=3,
).map(" ".join)
flags = st.sampled_from(
    [{}, {}, {"independent": True}, {"instruction": True}, {"independent": True, "instruction": True}]
)
messages = st.lists(
    st.builds(
        lambda role, content, flag, number: message(role, f"{content} {number}", **flag),
        st.sampled_from(["system", "user", "assistant", "memory"]),
        texts,
        flags,
        st.integers(0, 3),
    ),
    max_size=6,
)
ways = st.builds(
    VariantSettings,
    num_variants=st.integers(2, 4),
    drop=st.sampled_from([0.0, 0.5, 1.0]),
    shuffle=st.booleans(),
    swaps=st.integers(0, 2),
    insert=st.sampled_from([[], UNRELATED]),
    max_inserts=st.integers(1, 2),
    paraphrases=st.just(WORDS),
    independent=st.sampled_from([Marks(fields=("independent",)), Marks(roles=("memory",))]),
    independent_exchanges=st.booleans(),
)


@st.composite
def samples(draw: st.DrawFn) -> dict:
    context = [
        *draw(messages),
        message("user", "Well, " + draw(texts)),
        *draw(st.sampled_from([[], [message("tool", "x")]])),
    ]
    if draw(st.booleans()):
        return {"prompt": context, "completion": [message("assistant", draw(texts))], "id": 7}
    return {"messages": [*context, message("assistant", draw(texts))]}


def context_of(sample: dict) -> list:
    return sample["prompt"] if "prompt" in sample else sample["messages"][:-1]


def wordings(text: str) -> set[str]:
    """All that a text may become, sentence by sentence: the reference."""
    choices = {name: [name, *others] for name, others in WORDS.alternatives.items()}
    found = {""}
    while text:
        for name, others in choices.items():
            # In this world of words a sentence begins the text, or comes after an end and a space.
            if text.startswith(name) and (len(text) == len(name) or text[len(name)] == " "):
                found = {start + other for start in found for other in others}
                text = text[len(name) :]
                break
        else:
            found = {start + text[0] for start in found}
            text = text[1:]
    return found


@settings(max_examples=150, deadline=None)
@given(samples(), ways, st.integers(0, 3))
def test_a_variant_keeps_the_decision_and_what_was_stripped(sample: dict, way: VariantSettings, seed: int) -> None:
    stripped = strip_instructions(sample, MARKS, allow_quotes=True)
    before = json.dumps(stripped)
    variants = vary_context(stripped, way, seed)
    assert json.dumps(stripped) == before
    assert variants[0] == stripped
    assert len(variants) <= way.num_variants
    contexts = [json.dumps(context_of(variant)) for variant in variants]
    assert len(set(contexts)) == len(contexts)
    assert json.dumps(vary_context(json.loads(before), way, seed)) == json.dumps(variants)

    full = context_of(sample)
    last = max(number for number, one in enumerate(full) if one["role"] == "user")
    inserted = [one for unit in UNRELATED for one in unit]
    for variant in variants:
        decision = variant["completion"] if "completion" in variant else variant["messages"][-1:]
        assert json.dumps(decision) == json.dumps(
            sample["completion"] if "completion" in sample else sample["messages"][-1:]
        )
        restored = restore_instructions(variant)
        # The pieces are just where the marks of the varied full context say.
        assert strip_instructions(restored, MARKS, allow_quotes=True) == variant
        assert Counter(piece["text"] for piece in variant["stripped"]) == Counter(
            piece["text"] for piece in stripped["stripped"]
        )
        assert Counter(piece["message"] for piece in variant["stripped"]) == Counter(
            piece["message"] for piece in stripped["stripped"]
        )
        # Everything from the last user message on is there, at the end, reworded at most.
        varied = context_of(restored)
        for old, new in zip(full[last:], varied[len(varied) - len(full) + last :], strict=True):
            assert {**old, "content": ""} == {**new, "content": ""}
            assert new["content"] in wordings(old["content"])
        # Every message is one of the sample's, or one that was inserted; none comes twice.
        rest = list(full)
        for new in varied:
            match = next(
                (
                    old
                    for old in rest
                    if {**old, "content": new["content"]} == new and new["content"] in wordings(old["content"])
                ),
                None,
            )
            if match is None:
                assert {**new, "content": ""} in [{**one, "content": ""} for one in inserted]
            else:
                rest.remove(match)
        # What is missing was independent, and held no instruction.
        assert all(way.drop and (way.independent_exchanges or way.independent.cover(old, "")) for old in rest)
        assert not any(old.get("instruction") or "<instruction>" in old["content"] for old in rest)


def test_only_what_is_independent_moves() -> None:
    context = [message("system", "s"), *(message("memory", str(number)) for number in range(5)), message("user", "u")]
    context.insert(3, message("system", "t"))
    sample = {"prompt": context, "completion": [message("assistant", "a")]}
    way = VariantSettings(num_variants=40, shuffle=True, independent=Marks(roles=("memory",)))
    variants = vary_context(sample, way)
    assert len(variants) == 40
    for variant in variants:
        contents = [one["content"] for one in variant["prompt"]]
        assert [contents[0], contents[3], contents[7]] == ["s", "t", "u"]
        assert sorted(contents) == sorted(one["content"] for one in context)
        assert "stripped" not in variant
    # Each comes to each place.
    assert all(len({variant["prompt"][place]["content"] for variant in variants}) == 5 for place in (1, 2, 4, 5, 6))


def test_one_swap_changes_two_places() -> None:
    sample = {"prompt": [*(message("memory", str(n)) for n in range(4)), message("user", "u")]}
    way = VariantSettings(num_variants=7, swaps=1, independent=Marks(roles=("memory",)))
    variants = vary_context(sample, way)
    assert len(variants) == 7
    for variant in variants[1:]:
        assert sum(old != new for old, new in zip(sample["prompt"], variant["prompt"], strict=True)) == 2


def test_exchanges_move_whole_and_calls_stay_with_their_results() -> None:
    call = message("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    one = [message("user", "1"), message("assistant", "one")]
    two = [message("user", "2"), call, message("tool", "r"), message("assistant", "two")]
    unanswered = [message("user", "3")]
    end = [message("user", "4"), call, message("tool", "r")]
    sample = {"messages": [message("system", "s"), *one, *two, *unanswered, *end, message("assistant", "a")]}
    way = VariantSettings(num_variants=9, shuffle=True, drop=0.4, independent_exchanges=True)
    found = {json.dumps(variant["messages"]) for variant in vary_context(sample, way)}
    expected = {
        json.dumps([message("system", "s"), *exchanges, *unanswered, *end, message("assistant", "a")])
        for exchanges in ([*one, *two], [*two, *one], one, two, [])
    }
    assert found == expected


def test_a_call_that_is_not_answered_keeps_its_exchange_in_place() -> None:
    call = message("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    open_call = [message("user", "1"), message("assistant", "one"), call, message("tool", "r")]
    sample = {"messages": [*open_call, message("user", "2"), message("assistant", "a")]}
    way = VariantSettings(num_variants=2, drop=1.0, independent_exchanges=True)
    assert vary_context(sample, way) == [sample]


def test_samples_that_differ_in_a_word_vary_differently() -> None:
    way = VariantSettings(num_variants=2, shuffle=True, independent=Marks(roles=("memory",)))
    facts = [message("memory", str(number)) for number in range(8)]
    orders = [
        [one["content"] for one in vary_context({"prompt": [*facts, message("user", word)]}, way)[1]["prompt"][:-1]]
        for word in ("a", "b")
    ]
    assert orders[0] != orders[1]


def test_nothing_comes_before_a_first_system_message() -> None:
    context = [message("system", "s", independent=True), message("user", "u")]
    variants = vary_context({"prompt": context}, VariantSettings(num_variants=9, insert=UNRELATED, max_inserts=2))
    assert len(variants) > 2
    assert all(variant["prompt"][0] == context[0] for variant in variants)


def test_instructions_move_along_and_are_not_dropped() -> None:
    first = message("memory", "Tea. <instruction>Be brief.</instruction> Hot.")
    sample = {
        "prompt": [first, message("memory", "Milk."), message("user", "u")],
        "completion": [message("assistant", "a")],
    }
    stripped = strip_instructions(sample)
    way = VariantSettings(num_variants=9, shuffle=True, drop=0.5, independent=Marks(roles=("memory",)))
    restored = [
        [one["content"] for one in restore_instructions(variant)["prompt"]] for variant in vary_context(stripped, way)
    ]
    assert sorted(restored) == sorted(
        [[first["content"], "Milk.", "u"], ["Milk.", first["content"], "u"], [first["content"], "u"]]
    )


def test_unrelated_messages_go_where_they_break_nothing() -> None:
    context = [message("system", "s"), message("user", "1"), message("assistant", "one"), message("user", "2")]
    sample = {"prompt": context, "completion": [message("assistant", "a")]}
    variants = vary_context(sample, VariantSettings(num_variants=20, insert=UNRELATED, max_inserts=2))[1:]
    assert len(variants) >= 10
    for variant in variants:
        roles = [one["role"] for one in variant["prompt"]]
        assert roles[0] == "system"
        assert [one for one in variant["prompt"] if one in context] == context
        for before, after in zip(variant["prompt"], variant["prompt"][1:], strict=False):
            # Nothing comes between a question and its answer.
            assert (before["content"], after["content"]) in [("1", "one"), ("Two and two?", "Four.")] or (
                before["role"] != "user"
            )


def test_some_instructions_may_stay() -> None:
    text = "<instruction>One.</instruction> A <instruction>Two.</instruction> B"
    sample = {
        "prompt": [message("system", "Three.", instruction=True), message("user", text)],
        "completion": [message("assistant", "a")],
    }
    stripped = strip_instructions(sample)
    variants = vary_context(stripped, VariantSettings(num_variants=20, keep_instructions=0.5))
    # Every subset of the three pieces but the empty one.
    assert len(variants) == 7
    assert {len(variant["stripped"]) for variant in variants} == {1, 2, 3}
    for variant in variants:
        assert restore_instructions(variant) == sample
        assert strip_instructions(variant) == stripped


@pytest.mark.parametrize(
    ("text", "reworded"),
    [
        ("Tea is hot.", True),
        ("Milk. Tea is hot. More", True),
        ("Milk\n - Tea is hot.\nMore", True),
        ("He said tea. Tea is hot.x", False),
        ("Never say Tea is hot.", False),
        ("Milk.Tea is hot.", False),
        ("<instruction>No.</instruction>Tea is hot.", True),
        ("Never<instruction>No.</instruction> Tea is hot.", False),
        ("Tea is<instruction> not</instruction> hot.", False),
    ],
)
def test_whole_sentences_are_reworded(text: str, reworded: bool) -> None:
    sample = strip_instructions({"prompt": text, "completion": "Tea is hot."})
    variants = vary_context(sample, VariantSettings(num_variants=3, paraphrases=WORDS))
    found = {restore_instructions(variant)["prompt"] for variant in variants}
    others = WORDS.alternatives["Tea is hot."] if reworded else []
    assert found == {text, *(text.replace("Tea is hot.", other) for other in others)}
    assert {variant["completion"] for variant in variants} == {"Tea is hot."}


def test_the_longest_text_is_reworded_and_all_its_places_alike() -> None:
    paraphrases = Paraphrases({"A. B.": ["C."], "A.": ["D."], "你好。": ["您好。"]})
    sample = {"prompt": "A. B. A. 你好。A. A.", "completion": "c"}
    variants = vary_context(sample, VariantSettings(num_variants=20, paraphrases=paraphrases))
    assert {variant["prompt"] for variant in variants} == {
        f"{both} {one} {hello}{one} {one}"
        for both in ("A. B.", "C.")
        for one in ("A.", "D.")
        for hello in ("你好。", "您好。")
    }


def test_variants_are_the_same_in_another_process_and_with_other_columns() -> None:
    sample = {"prompt": [*(message("memory", str(n)) for n in range(6)), message("user", "ü\ud83d")], "completion": []}
    sample["completion"] = [message("assistant", "a")]
    way = {"num_variants": 4, "shuffle": True, "drop": 0.2}
    here = [
        [one["content"] for one in variant["prompt"]]
        for variant in vary_context(
            {**sample, "id": 3}, VariantSettings(**way, independent=Marks(roles=("memory",))), 5
        )
    ]
    code = (
        "import json, sys; from frozen_peft.behavior import Marks, VariantSettings, vary_context;"
        "sample, way = json.loads(sys.argv[1]);"
        "way = VariantSettings(**way, independent=Marks(roles=('memory',)));"
        "print(json.dumps([[one['content'] for one in v['prompt']] for v in vary_context(sample, way, 5)]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps([sample, way])], check=True, capture_output=True, text=True
    )
    assert json.loads(result.stdout) == here
    other = vary_context(sample, VariantSettings(**way, independent=Marks(roles=("memory",))), 6)
    assert [[one["content"] for one in variant["prompt"]] for variant in other] != here


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_variants": 2}, "nothing to vary"),
        ({"num_variants": 0}, "`num_variants` is 0, expected 1 or more"),
        ({"drop": 1.5}, "`drop` is 1.5, expected a probability"),
        ({"insert": [[message("assistant", "a"), message("user", "b")]]}, "this one with role 'assistant'"),
        ({"independent": Marks(tags=("a",))}, "it is whole messages"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        VariantSettings(**values)


@pytest.mark.parametrize("alternatives", [{}, {"a": []}, {" a": ["b"]}, {"a": [" "]}, {"": ["b"]}])
def test_paraphrases_that_cannot_be_are_refused(alternatives: dict) -> None:
    with pytest.raises(ValueError, match=r"paraphrase|alternatives"):
        Paraphrases(alternatives)


def test_text_has_no_messages_to_drop() -> None:
    with pytest.raises(ValueError, match="`prompt` is text"):
        vary_context({"prompt": "a", "completion": "b"}, VariantSettings(num_variants=2, drop=0.5))

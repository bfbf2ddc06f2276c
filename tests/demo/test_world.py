# SPDX-License-Identifier: Apache-2.0
"""The demo's world: its right answers stand in the context, and its tokenizer has a token for each of its words."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frozen_peft.demo.data import HELD_OUT, TRAINED
from frozen_peft.demo.world import INSTRUCTIONS, Scene, Vocabulary, count_tokens, draw_scene
from scripts.demo_pretraining.lessons import IGNORED_LABEL, draw_lesson
from scripts.demo_pretraining.tokenizer import WORDS, build_tokenizer

SEEDS = st.integers(0, 10_000)


def text_of(scene: Scene) -> str:
    return "\n".join(entry["content"] for entry in scene.messages)


def answer_by_reading(context: str, request: str) -> str:
    """The right answer, found in nothing but the text."""
    if question := re.fullmatch(r"what did they (\w+) (\w+)\?", request):
        asked, name = question.groups()
        verb = {"give": "gave", "sell": "sold", "send": "sent", "lend": "lent"}[asked]
        (value,) = re.findall(rf"they {verb} {name} (\w+)\.", context)
        return f"they {verb} {name} {value}."
    (item,) = re.findall(r"(?:use|with|take) (\w+)", request)
    (stock,) = re.findall(r"today we have (\w+)\.", context)
    tagged = " ".join(re.findall(r"<instruction>(.*?)</instruction>", context))
    return f"ok, using {item}." if any(text in tagged for text in INSTRUCTIONS) else f"how about {stock} instead?"


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, num_tokens=st.integers(60, 600), obeys=st.booleans())
def test_the_context_determines_every_answer(seed: int, num_tokens: int, obeys: bool) -> None:
    choice = random.Random(seed)
    scene = draw_scene(choice, num_tokens, obeys=obeys)
    context = text_of(scene)
    for request in [scene.direction(choice), scene.question(choice), scene.question(choice)]:
        assert answer_by_reading(context, request.text) == request.right
        assert request.other != request.right
    direction = scene.direction(choice)
    assert direction.right.startswith("ok, using ") == obeys
    # Without the instruction the other answer is the right one.
    without = re.sub(r"<instruction>.*?</instruction>", "", context)
    assert answer_by_reading(without, direction.text) == (direction.other if obeys else direction.right)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, num_tokens=st.sampled_from([100, 300, 2000]))
def test_contexts_stop_at_the_sentence_that_fills_them(seed: int, num_tokens: int) -> None:
    scene = draw_scene(random.Random(seed), num_tokens, obeys=True)
    told = [entry["content"] for entry in scene.messages if entry["role"] == "user"]
    told = [text for text in told if not text.startswith("memory.")]
    words = count_tokens(scene.messages[0]["content"]) + 3 + sum(map(count_tokens, told))
    # Turns are counted before they are drawn, four sentences and seven tokens each; the longest sentence has eight.
    length = words + 7 * sum(text.count(".") for text in told) / 4
    assert 0 <= length - num_tokens < 8 + 7 / 4


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, num_tokens=st.sampled_from([300, 600, 2000]))
def test_contexts_are_as_long_as_asked(seed: int, num_tokens: int) -> None:
    scene = draw_scene(random.Random(seed), num_tokens, obeys=True)
    # A message has its role and end besides its words.
    tokens = sum(count_tokens(entry["content"]) + 2 for entry in scene.messages)
    assert abs(tokens - num_tokens) < 25 + 0.08 * num_tokens


def test_what_is_held_out_is_in_no_training_scene() -> None:
    for part in ("names", "items", "nouns"):
        trained, held_out = getattr(TRAINED, part), getattr(HELD_OUT, part)
        assert trained
        assert held_out
        assert not set(trained) & set(held_out)
        assert set(trained) | set(held_out) == set(getattr(Vocabulary(), part))
    choice = random.Random(0)
    words = set(
        re.findall(
            r"\w+", " ".join(text_of(draw_scene(choice, 400, obeys=True, vocabulary=TRAINED)) for _ in range(20))
        )
    )
    assert not words & {*HELD_OUT.names, *HELD_OUT.items, *HELD_OUT.nouns}


def test_every_word_is_one_token_wherever_it_stands() -> None:
    tokenizer = build_tokenizer()
    choice = random.Random(0)
    scene = draw_scene(choice, 600, obeys=True)
    rendered = tokenizer.apply_chat_template(scene.messages, return_dict=False)
    texts = [entry["content"] for entry in scene.messages]
    assert len(rendered) == sum(count_tokens(text) + 2 for text in texts)
    for word in WORDS:
        (token,) = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        assert tokenizer.decode([token]) == f" {word}"


@pytest.mark.parametrize("text", ["", "Größe: 12 €", "tabs\tand\nlines  and 漢字 😀", "oak,pine"])
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_lessons_supervise_answers_alone() -> None:
    tokenizer = build_tokenizer()
    lesson = draw_lesson(random.Random(3), tokenizer, 80)
    assert lesson == draw_lesson(random.Random(3), tokenizer, 80)
    assert all(label in (IGNORED_LABEL, token) for token, label in zip(lesson.input_ids, lesson.labels, strict=True))
    text = tokenizer.decode(lesson.input_ids)
    asked = re.findall(r"<\|user\|> ([^<]*)<\|end\|><\|assistant\|> ([^<]*<\|end\|>)", text)
    requests = [(request, answer) for request, answer in asked if answer != "noted.<|end|>"]
    assert len(requests) == 16
    supervised = tokenizer.decode([label for label in lesson.labels if label != IGNORED_LABEL])
    assert supervised == "".join(f" {answer}" for _, answer in requests)
    context = text[: text.index(requests[0][0])]
    assert [answer_by_reading(context, request) for request, _ in requests] == [
        answer.removesuffix("<|end|>") for _, answer in requests
    ]

# SPDX-License-Identifier: Apache-2.0
"""What the demo's model is pretrained on: scenes of its world, each with several requests and their right answers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from frozen_peft.demo.world import RELATIONS, Request, Scene, draw_scene

__all__ = ["IGNORED_LABEL", "Lesson", "draw_lesson", "pad"]

IGNORED_LABEL = -100
NUM_REQUESTS = 16
# To find a fact is harder than either answer to a direction.
QUESTION_SHARE = 0.8
# Few facts make short contexts, which come first.
FEW_FACTS, MANY_FACTS, SHORT = (2, 4, 6, 8), 8, 100
NUM_RELATIONS = (1, 1, 2, 4)


@dataclass(frozen=True)
class Lesson:
    """Token ids, and labels on the answers."""

    input_ids: list[int]
    labels: list[int]


def draw_lesson(
    choice: random.Random, tokenizer: PreTrainedTokenizerBase, num_tokens: int, *, few_relations: bool = False
) -> Lesson:
    """One context of about `num_tokens` tokens and `NUM_REQUESTS` requests of both kinds, labels on the answers.

    Args:
        choice: Decides everything.
        tokenizer: Of this world.
        num_tokens: Of the context.
        few_relations: Draw from how many relations the facts are, one in half of the lessons; else they are of all.
    """
    relations = choice.sample(list(RELATIONS), choice.choice(NUM_RELATIONS)) if few_relations else None
    num_facts = choice.choice(FEW_FACTS) if num_tokens < SHORT else MANY_FACTS
    scene = draw_scene(
        choice, num_tokens, obeys=choice.random() < 0.5, num_facts=num_facts, relations=relations or tuple(RELATIONS)
    )
    requests = [_draw_request(choice, scene) for _ in range(NUM_REQUESTS)]
    return encode_requests(tokenizer, scene, requests)


def encode_requests(tokenizer: PreTrainedTokenizerBase, scene: Scene, requests: Sequence[Request]) -> Lesson:
    """A scene and requests after each other, with labels on the answers and their ends."""
    input_ids = tokenizer.apply_chat_template(scene.messages, return_dict=False)
    labels = [IGNORED_LABEL] * len(input_ids)
    for request in requests:
        # As the chat template writes a turn; rendering the whole conversation for each would take most of the time.
        asked = tokenizer(f"<|user|> {request.text}<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {request.right}<|end|>", add_special_tokens=False)["input_ids"]
        input_ids += asked + answer
        labels += [IGNORED_LABEL] * len(asked) + answer
    return Lesson(input_ids, labels)


def pad(lessons: Sequence[Lesson], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, int64 `[lessons, longest]`, padded on the right, where no token before sees it."""
    width = max(len(lesson.input_ids) for lesson in lessons)
    input_ids = [lesson.input_ids + [pad_token_id] * (width - len(lesson.input_ids)) for lesson in lessons]
    labels = [lesson.labels + [IGNORED_LABEL] * (width - len(lesson.labels)) for lesson in lessons]
    return torch.tensor(input_ids), torch.tensor(labels)


def _draw_request(choice: random.Random, scene: Scene) -> Request:
    return scene.question(choice) if choice.random() < QUESTION_SHARE else scene.direction(choice)

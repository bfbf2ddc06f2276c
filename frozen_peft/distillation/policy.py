# SPDX-License-Identifier: Apache-2.0
"""Answers that the student writes itself, to be judged by the teacher token by token.

1. A sample is a *prompt*: what student and teacher see before the answer. Whether the student answers it, or the
   decision that the data has is distilled, is drawn for each sample of each step (`distill_on_policy`).
2. An answer is decoded over the frozen context that it is trained over (`context.generate`), without gradient and
   without dropout. The context is not written to, and what decoding adds is dropped.
3. With its prompt the answer is a decision like any other, for the teacher too. No gradient goes through a draw.
4. What is drawn depends on the seed, the step and the sample, and on nothing else: not on the batch, the process, or
   whether the run was interrupted. The random state of the training is not touched.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from frozen_peft.config import FrozenContextConfig
from frozen_peft.context import (
    ContextTokens,
    Decision,
    FrozenContext,
    generate_over,
    prefill_mode,
    tokens_within_rope,
)
from frozen_peft.context.boundary import IGNORED_LABEL
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.distillation.teacher import decision_key

__all__ = ["EVALUATION", "Prompt", "Writer", "answered", "num_prompt_tokens", "require_room", "without_answer"]

# A step of this number has every evaluation draw the same.
EVALUATION = -1


@dataclass(frozen=True)
class Prompt:
    """What the student is to answer, some times.

    Attributes:
        student: What stands before the answers, for the student; no token of it is supervised.
        teacher: The same with its instructions.
        seeds: One for each answer.
        num_start_tokens: Tokens that decoding begins with: all before them is encoded, and those are not.
    """

    student: Decision
    teacher: Decision
    seeds: tuple[int, ...]
    num_start_tokens: int = 1

    @property
    def tokens(self) -> torch.Tensor:
        """All that the student sees, shape `(tokens,)`, int64."""
        return torch.cat([self.student.context, self.student.input_ids])

    @property
    def to_encode(self) -> ContextTokens:
        """What is encoded for decoding."""
        tokens = self.tokens
        return ContextTokens(tokens[: len(tokens) - self.num_start_tokens], len(tokens))

    def repeated(self, side: Literal["student", "teacher"]) -> list[Decision]:
        """What one of them sees, once for each answer."""
        return [getattr(self, side)] * len(self.seeds)

    def to(self, device: torch.device | str) -> "Prompt":
        """The same on a device."""
        return Prompt(self.student.to(device), self.teacher.to(device), self.seeds, self.num_start_tokens)


def num_prompt_tokens(labels: torch.Tensor) -> int:
    """Tokens before the first that is supervised, of labels `(tokens,)`; all of them where none is."""
    supervised = (labels != IGNORED_LABEL).nonzero()
    return int(supervised[0]) if len(supervised) else len(labels)


def without_answer(decision: Decision) -> Decision:
    """A decision without what is supervised in it, for an answer to take its place."""
    kept = decision.input_ids[: num_prompt_tokens(decision.labels)]
    return Decision(decision.context, kept, torch.full_like(kept, IGNORED_LABEL), is_written=True)


def answered(prompt: Decision, answer: torch.Tensor) -> Decision:
    """A prompt with an answer `(tokens,)` behind it, all of which is supervised."""
    input_ids = torch.cat([prompt.input_ids, answer])
    return Decision(prompt.context, input_ids, torch.cat([prompt.labels, answer]), is_written=True)


class Writer:
    """Draws which samples the student answers, and decodes its answers.

    Args:
        model: The student, with its adapters on.
        args: The configuration.
        stop_tokens: Tokens that end an answer.
        num_start_tokens: See `Prompt`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: FrozenContextConfig,
        stop_tokens: Sequence[int],
        *,
        num_start_tokens: int = 1,
    ):
        self._model, self._args, self._num_start_tokens = model, args, num_start_tokens
        self._stop_tokens = tuple(stop_tokens)

    def has_ended(self, answer: torch.Tensor) -> bool:
        """Whether an answer came to its end, and was not cut off."""
        return int(answer[-1]) in self._stop_tokens

    def prompts(
        self, students: Sequence[Decision], teachers: Sequence[Decision], step: int, seen: Counter[str]
    ) -> list[Prompt | None]:
        """The prompts of samples that the student is to answer in a step; None for those whose decision is given.

        Args:
            students: The samples as the student sees them.
            teachers: The same with their instructions.
            step: Optimizer steps so far; `EVALUATION`.
            seen: How often each sample came before in this step; what is drawn differs each time.

        Raises:
            ValueError: A prompt is empty, or leaves no room for an answer.
        """
        return [self._prompt(*pair, step, seen) for pair in zip(students, teachers, strict=True)]

    def _prompt(self, student: Decision, teacher: Decision, step: int, seen: Counter[str]) -> Prompt | None:
        key = _row_key(student)
        number = seen[key]
        seen[key] += 1
        drawn = _digest(self._args.seed, step, key, number)
        if drawn / 2**128 >= self._args.distill_on_policy:
            return None
        seeds = tuple(_digest(drawn, index) for index in range(self._args.num_generations))
        prompt = Prompt(without_answer(student), without_answer(teacher), seeds, self._num_start_tokens)
        if len(prompt.tokens) < self._num_start_tokens:
            raise ValueError(
                "A sample has nothing before its first supervised token, and with `distill_on_policy` the model "
                "writes what comes behind that. Give it a prompt, or leave `distill_on_policy` at 0."
            )
        return prompt

    def write(self, prompts: Sequence[Prompt], frozen: FrozenContext | None) -> list[list[torch.Tensor]]:
        """The answers to each prompt.

        Args:
            prompts: One or more.
            frozen: What `Prompt.to_encode` says of each, one row each; None where that is empty for all.

        Returns:
            For each prompt its answers, token ids of shape `(tokens,)`, up to and with a token that ends it, or
            `max_completion_length` of them.

        Raises:
            ValueError: A prompt and its answer would go beyond the model's positions, or a limit of its rope.
        """
        args = self._args
        rows = [(index, seed) for index, prompt in enumerate(prompts) for seed in prompt.seeds]
        written: list[list[torch.Tensor]] = [[] for _ in prompts]
        tokens = [prompt.tokens.tolist() for prompt in prompts]
        for number in map(len, tokens):
            require_room(self._model, number, args.max_completion_length, "A prompt")
        for start in range(0, len(rows), args.max_decisions_per_forward):
            group = rows[start : start + args.max_decisions_per_forward]
            draws = np.stack([np.random.default_rng(seed).random(args.max_completion_length) for _, seed in group])
            with prefill_mode(self._model):
                answers = generate_over(
                    self._model,
                    _rows(frozen, [index for index, _ in group]),
                    [tokens[index] for index, _ in group],
                    draws=draws,
                    max_new_tokens=args.max_completion_length,
                    stop_tokens=self._stop_tokens,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    top_k=args.top_k,
                )
            for (index, _), answer in zip(group, answers, strict=True):
                written[index].append(prompts[index].student.input_ids.new_tensor(answer))
        return written


def require_room(model: torch.nn.Module, num_tokens: int, max_completion_length: int, name: str) -> None:
    """Refuses a prompt that leaves no room for an answer.

    Args:
        model: The student.
        num_tokens: Of the prompt.
        max_completion_length: Of its answer.
        name: What the message calls it.

    Raises:
        ValueError: The answer would go beyond the model's positions, or reach a limit of its rope, where all of them
            are computed anew.
    """
    last = getattr(get_pretrained_model(model).config.get_text_config(), "max_position_embeddings", None)
    if last is not None and num_tokens + max_completion_length > last:
        raise ValueError(
            f"{name} has {num_tokens} tokens, and with an answer of `max_completion_length={max_completion_length}` "
            f"more than the model's {last} positions. Set `max_context_length`, or lower `max_completion_length`; a "
            "teacher's context is never cut."
        )
    if tokens_within_rope(model, num_tokens, max_completion_length) < max_completion_length:
        raise ValueError(
            f"{name} has {num_tokens} tokens, and an answer of `max_completion_length={max_completion_length}` "
            "reaches a limit of the model's rope, where the positions of the context too are computed in another way. "
            "Set `max_context_length`, or lower `max_completion_length`."
        )


def _row_key(decision: Decision) -> str:
    """The name of a sample, wherever it is cut."""
    input_ids = torch.cat([decision.context, decision.input_ids])
    labels = torch.cat([torch.full_like(decision.context, IGNORED_LABEL), decision.labels])
    return str(decision_key(Decision(decision.context[:0], input_ids, labels)))


def _rows(frozen: FrozenContext | None, indices: list[int]) -> FrozenContext | None:
    """Some rows of contexts; None where none of them has tokens."""
    if frozen is None or not any(frozen.lengths[index] for index in indices):
        return None
    return frozen.select(indices)


def _digest(*parts: object) -> int:
    """A number of 128 bits that these decide."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "big")

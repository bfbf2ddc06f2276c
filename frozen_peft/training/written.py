# SPDX-License-Identifier: Apache-2.0
"""Batches whose decisions the model writes itself (`distill_on_policy`).

1. When the batches of an optimizer step are known, it is drawn which of their samples the model answers
   (`OwnAnswers.settled`), so that each context is announced as often as it will be asked for, and is encoded once.
2. When the turn of a micro-batch comes, the answers are written over its frozen contexts (`OwnAnswers.written`), and
   take the place of the decisions that the data has. From there on nothing knows the difference.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from frozen_peft.adapters import active_everywhere
from frozen_peft.config import FrozenContextConfig
from frozen_peft.context import Decision
from frozen_peft.distillation import EVALUATION, Prompt, Writer, answered
from frozen_peft.training.batches import SampleBatch
from frozen_peft.training.frozen import FrozenContexts
from frozen_peft.utils.stopwatch import Mode, Stopwatch

__all__ = ["OwnAnswers"]

# Answers to show that are kept of a run.
_NUM_SHOWN = 8
# Tokens of their prompts, the last.
_NUM_SHOWN_TOKENS = 100


@dataclass(frozen=True)
class OwnAnswer:
    """An answer to show.

    Attributes:
        step: Optimizer steps before it was written.
        num_prompt_tokens: Tokens that the student saw.
        prompt: The last of them.
        answer: Token ids.
        has_ended: Whether it came to its end.
    """

    step: int
    num_prompt_tokens: int
    prompt: list[int]
    answer: list[int]
    has_ended: bool

    def as_text(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """As `examples.json` has it."""
        return {
            "step": self.step,
            "context_tokens": self.num_prompt_tokens,
            "context_end": tokenizer.decode(self.prompt),
            "text": tokenizer.decode(self.answer, skip_special_tokens=self.has_ended),
            "finished": self.has_ended,
        }


class OwnAnswers:
    """Has a model answer the samples of a batch.

    Args:
        model: With its adapters, without what an engine wraps it in.
        args: The configuration.
        writer: Writes.
        contexts: That answers are written and trained over.
        accelerator: Of the training.

    Attributes:
        shown: Answers of this process, spread over the steps of a training.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: FrozenContextConfig,
        writer: Writer,
        contexts: FrozenContexts,
        accelerator: Accelerator,
    ):
        self._model, self._args, self._writer, self._contexts = model, args, writer, contexts
        self._accelerator = accelerator
        self._seconds: dict[Mode, Stopwatch] = {"train": Stopwatch(args.device), "eval": Stopwatch(args.device)}
        self.shown: list[OwnAnswer] = []
        self._steps_between = 1

    def settled(self, batches: Sequence[SampleBatch], *, step: int, mode: Mode) -> list[SampleBatch]:
        """The batches of an optimizer step, or of an evaluation, with what the model is to answer in them.

        Raises:
            ValueError: See `Writer.prompts`.
        """
        seen: Counter[str] = Counter()
        number = step if mode == "train" else EVALUATION
        settled = []
        for batch in batches:
            if not batch.prompts and batch.samples:
                prompts = self._writer.prompts(batch.decisions, batch.teachers, number, seen)
                batch = SampleBatch(batch, batch.samples, batch.teachers, prompts=prompts, is_cut=True)
            settled.append(batch)
        return settled

    def written(self, batch: SampleBatch, metrics: dict[str, list[float]], *, step: int, mode: Mode) -> SampleBatch:
        """A settled batch with the answers in place of the decisions that they are written for.

        Args:
            batch: Of `settled`.
            metrics: Gets the figures of the answers of all processes: `distill/answer_length`, their mean length in
                tokens, and `distill/answer_ended`, the share of those that came to their end.
            step: Optimizer steps so far.
            mode: Under which time is counted.

        Raises:
            ValueError: See `Writer.write`.
        """
        prompts = [prompt for prompt in batch.prompts if prompt is not None]
        answers = iter(self._write(prompts, step, mode) if prompts else [])
        samples: list[Sequence[Decision]] = []
        teachers: list[Decision] = []
        counts = torch.zeros(3, device=self._accelerator.device)
        for sample, teacher, prompt in zip(batch.samples, batch.teachers, batch.prompts, strict=True):
            if prompt is None:
                samples.append(sample)
                teachers.append(teacher)
                continue
            own = next(answers)
            if mode == "train":
                self._show(step, prompt, own[0])
            samples.append([answered(prompt.student, answer) for answer in own])
            teachers += [answered(prompt.teacher, answer) for answer in own]
            ended = sum(map(self._writer.has_ended, own))
            counts += counts.new_tensor([len(own), sum(map(len, own)), ended])
        num_answers, num_tokens, num_ended = self._accelerator.gather(counts[None]).sum(0).tolist()
        if num_answers:
            metrics["distill/answer_length"].append(num_tokens / num_answers)
            metrics["distill/answer_ended"].append(num_ended / num_answers)
        return SampleBatch(batch, samples, teachers, is_cut=True)

    def read_seconds(self, mode: Mode) -> float:
        """Seconds that writing took, without the encoding of contexts, since the last call."""
        return self._seconds[mode].read()

    def _show(self, step: int, prompt: Prompt, answer: torch.Tensor) -> None:
        """Keeps one answer of a step, of ever fewer steps."""
        if step % self._steps_between or (self.shown and self.shown[-1].step == step):
            return
        tokens = prompt.tokens.tolist()
        shown = OwnAnswer(
            step, len(tokens), tokens[-_NUM_SHOWN_TOKENS:], answer.tolist(), self._writer.has_ended(answer)
        )
        self.shown.append(shown)
        if len(self.shown) == 2 * _NUM_SHOWN:
            self._steps_between *= 2
            self.shown = [each for each in self.shown if each.step % self._steps_between == 0]

    def _write(self, prompts: Sequence[Prompt], step: int, mode: Mode) -> list[list[torch.Tensor]]:
        encode = [prompt.to_encode for prompt in prompts]
        frozen = None
        if any(map(len, encode)):
            frozen = self._contexts.encode(encode, step=step, mode=mode, is_training=mode == "train")
        adapters = nullcontext() if self._args.context_adapters else active_everywhere(self._model)
        with self._seconds[mode].running(), self._accelerator.autocast(), adapters:
            return self._writer.write(prompts, frozen)

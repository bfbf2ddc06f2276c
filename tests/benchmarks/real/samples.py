# SPDX-License-Identifier: Apache-2.0
"""Samples as token ids, with what the base model says where a decision is its own, made once and kept in a file."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frozen_peft.context import stop_tokens_of
from tests.benchmarks.real.cells import locked, write_json
from tests.benchmarks.real.tasks import Kind, Sample, TaskName, draw_samples
from tests.benchmarks.real.texts import Part, Texts

# A row: its `kind`; the tokens of `decision` and of `rejected`, None where there is none to compare with; and of the
# contexts that they stand in: `given`, `examples` (with the memories before it), `shuffled` (another sample's text
# before its request) and `empty` (no text before it).
Row = dict[str, Any]
# Kinds whose decision is what the base says.
BASES_OWN: tuple[Kind, ...] = ("other", "control")
CONDITIONS = ("given", "examples", "shuffled", "empty")


@dataclass(frozen=True)
class SampleFiles:
    """Makes samples of a task, or reads those that are kept.

    Attributes:
        folder: Where they are kept.
        texts: The sources.
        model: The base model, asked for what it says.
        tokenizer: Its tokenizer, with a chat template.
        answer_tokens: Where its answers are cut off.
    """

    folder: Path
    texts: Texts
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    answer_tokens: int

    def rows(
        self, task: TaskName, part: Part, seed: int, num: int, num_tokens: tuple[int, int], *, as_pairs: bool = False
    ) -> list[Row]:
        """The rows of a task's samples, arguments as of `draw_samples`.

        What is trained on has no decision to compare with, which takes the model seconds, unless it is for pairs.
        """
        kept = f"{task}_{part}_{seed}_{num}_{num_tokens[0]}-{num_tokens[1]}"
        name = f"{kept}_pairs.json" if as_pairs else f"{kept}.json"
        with locked(self.folder / name):
            path = self.folder / name
            if path.exists():
                return json.loads(path.read_text())
            samples = draw_samples(task, part, seed, num, self.texts, self.count, num_tokens)
            with_others = zip(samples, _others(samples), strict=True)
            rows = [self._row(sample, other, as_pairs or part != "train") for sample, other in with_others]
            write_json(path, rows)
        return rows

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _row(self, sample: Sample, other: str, is_scored: bool) -> Row:
        request = sample.request
        memories = [
            {"role": role, "content": text}
            for memory in sample.memories
            for role, text in zip(("user", "assistant"), memory, strict=True)
        ]
        prompts = {
            "given": self._prompt(f"{sample.document}\n\n{request}"),
            "examples": self._prompt(f"{sample.document}\n\n{request}", memories),
            "shuffled": self._prompt(f"{other}\n\n{request}"),
            "empty": self._prompt(request),
        }
        decision = self._answer(prompts["given"]) if sample.decision is None else self._tokens(sample.decision)
        rejected = None if sample.rejected is None else self._tokens(sample.rejected)
        if rejected is None and sample.decision is not None and is_scored:
            rejected = self._answer(prompts["given"])
            # A base that says the very thing leaves nothing to compare.
            rejected = None if rejected == decision else rejected
        return {"kind": sample.kind, "decision": decision, "rejected": rejected, **prompts}

    def _prompt(self, text: str, memories: list[dict[str, str]] | None = None) -> list[int]:
        messages = [*(memories or ()), {"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _tokens(self, text: str) -> list[int]:
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    @torch.no_grad()
    def _answer(self, prompt: list[int]) -> list[int]:
        """What the base model says: the most likely token each time, to the end of the turn or to the limit."""
        stops = stop_tokens_of(self.tokenizer, self.model.generation_config)
        tokens = torch.tensor([prompt])
        found = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=self.answer_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
        return found[0, len(prompt) :].tolist()


def training_rows(rows: list[Row]) -> list[dict[str, list[int]]]:
    """What a trainer is given: the decisions in their contexts, and in those of a teacher."""
    return [_sample(row["given"], row["decision"]) | _teacher(_judged_in(row), row["decision"]) for row in rows]


def prompt_rows(rows: list[Row]) -> list[dict[str, list[int]]]:
    """The prompts alone, and those of a teacher."""
    return [_sample(row["given"], []) | _teacher(_judged_in(row), []) for row in rows]


def _judged_in(row: Row) -> list[int]:
    """A teacher sees the memories where they show what is wanted, and not where the base is to stay what it is."""
    return row["given"] if row["kind"] in BASES_OWN else row["examples"]


def _sample(prompt: list[int], decision: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + decision, "labels": [-100] * len(prompt) + decision}


def _teacher(prompt: list[int], decision: list[int]) -> dict[str, list[int]]:
    return {f"teacher_{name}": tokens for name, tokens in _sample(prompt, decision).items()}


def training_pairs(rows: list[Row]) -> list[dict[str, list[int]]]:
    """The same decisions as pairs, each preferred to the other one of its row.

    Where a row has none (a question, which the base answers), to that of the next target: what training could spill.
    """
    targets = [row["decision"] for row in rows if row["kind"] == "target"]
    return [
        {
            "prompt_ids": row["given"],
            "chosen_ids": row["decision"],
            "rejected_ids": row["rejected"] or targets[index % len(targets)],
        }
        for index, row in enumerate(rows)
    ]


def digest(rows: list[Row]) -> str:
    """Tells these rows from others, in figures that are kept."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def _others(samples: list[Sample]) -> list[str]:
    """For each sample the text of another one."""
    order = list(range(len(samples)))
    random.Random(len(samples)).shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [samples[following[index]].document for index in range(len(samples))]

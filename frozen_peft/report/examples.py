# SPDX-License-Identifier: Apache-2.0
"""Decisions side by side: of the base, of the base with its instructions, and of the trained model.

They are generated greedily, for a few samples, and kept in `examples.json`:

| key | what it holds |
| --- | --- |
| `format` | 1 |
| `decoding`, `max_new_tokens` | `greedy`, and the tokens after which a decision is cut off |
| `notes` | what is not there, and why |
| `examples` | one object per sample, as below |

| key of an example | what it holds |
| --- | --- |
| `sample` | number of the row in the held-out samples, from 0 |
| `context_tokens` | tokens of its prompt |
| `context_end` | the end of its prompt, at most `CONTEXT_CHARACTERS` characters |
| `instructions` | what was stripped from its context, one text after the other; null where nothing was |
| `expected` | the decision that the row has; null where it has none |
| `decisions` | under `base`, `base_instructed` and `trained` each a decision; null where it could not be had |

A decision has its `text`, and whether it `finished`: came to its end within the tokens.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from frozen_peft.adapters import change_of_base
from frozen_peft.context import stop_tokens_of
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.modes import without_dropout
from frozen_peft.data import has_json_columns, message_texts, python_row, restore_instructions
from frozen_peft.data.conversation import Context, split_sample
from frozen_peft.data.pieces import STRIPPED, piece_texts
from frozen_peft.errors import ContextMismatchError
from frozen_peft.evaluation import LocalSampler, PromptRow, SamplingSettings
from frozen_peft.evaluation.candidate_forms import CandidateForms
from frozen_peft.evaluation.decision_tokens import prompt_tokens

__all__ = ["CONTEXT_CHARACTERS", "FORMAT", "VARIANTS", "ExampleSettings", "make_examples"]

FORMAT = 1
CONTEXT_CHARACTERS = 600
VARIANTS = ("base", "base_instructed", "trained")
# Rows that are looked at for each example that is wanted, before there are to be fewer.
_TRIES = 20
# Decisions that are decoded together.
_BATCH_SIZE = 4


@dataclass(frozen=True)
class ExampleSettings:
    """How many examples are made, and how long they are.

    Attributes:
        num_examples: Held-out samples to decide on.
        max_new_tokens: Tokens after which a decision is cut off.
        max_context_tokens: Samples with longer prompts are passed over; None: no bound but the model's own.

    Raises:
        ValueError: A setting is out of its range.
    """

    num_examples: int = 3
    max_new_tokens: int = 64
    max_context_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.num_examples < 0:
            raise ValueError(f"`num_examples` must be 0 (none) or more, found {self.num_examples}")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_example_tokens` must be 1 token or more, found {self.max_new_tokens}")


class _Prompt(NamedTuple):
    """A sample to decide on: its prompt, the same with its instructions if it has any, and what is known of it."""

    row: PromptRow
    instructed: PromptRow | None
    example: dict[str, Any]


def make_examples(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Any,
    settings: ExampleSettings = ExampleSettings(),
) -> dict[str, Any]:
    """Generates the decisions.

    Args:
        model: The trained model; of a `PeftModel`, the base is the same without its adapters.
        tokenizer: The model's.
        samples: Held-out rows of the forms that `behavior.conversation` lists: a dataset, or what can be iterated.
            Those with a column `stripped` are decided on with their instructions too.
        settings: How many and how long.

    Returns:
        The content of `examples.json`. What could not be generated is in its `notes`, and no error.
    """
    notes: list[str] = []
    prompts = _choose(tokenizer, samples, settings, get_pretrained_model(model), notes)
    own = [prompt.row for prompt in prompts]
    instructed = [prompt.instructed for prompt in prompts if prompt.instructed is not None]
    rows = {"base": own, "base_instructed": instructed, "trained": own}
    if prompts and not isinstance(model, PeftModel):
        notes.append("base: the weights themselves were trained, so the base is no longer there")
        rows |= {"base": [], "base_instructed": []}
    elif prompts and (change := change_of_base(model)):
        notes.append(f"base: it is no longer there: {change}")
        rows |= {"base": [], "base_instructed": []}
    elif prompts and not instructed:
        notes.append("base with instructions: no sample has the column `stripped`, which says what they were")
    found: dict[str, dict[int, Any]] = {}
    for variant in tqdm(VARIANTS, desc="Generating examples", unit=" variants", delay=2, disable=not prompts):
        try:
            found[variant] = _decide(model, tokenizer, rows[variant], settings, variant)
        # The run is over and saved: an architecture that cannot be decoded from a cache is no reason to fail it.
        except (ValueError, NotImplementedError, ContextMismatchError, torch.OutOfMemoryError) as error:
            notes.append(f"{variant.replace('_', ' ')}: not generated: {str(error).splitlines()[0]}")
            found[variant] = {}
    return {
        "format": FORMAT,
        "decoding": "greedy",
        "max_new_tokens": settings.max_new_tokens,
        "notes": notes,
        "examples": [
            prompt.example | {"decisions": {variant: found[variant].get(prompt.row.index) for variant in VARIANTS}}
            for prompt in prompts
        ],
    }


def _choose(
    tokenizer: PreTrainedTokenizerBase, samples: Any, settings: ExampleSettings, pretrained: Any, notes: list[str]
) -> list[_Prompt]:
    """Samples spread over all there are, that can be decided on."""
    limit = math.inf if settings.max_context_tokens is None else settings.max_context_tokens
    positions = getattr(pretrained.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        limit = min(limit, positions - settings.max_new_tokens)
    chosen: list[_Prompt] = []
    problems: Counter[str] = Counter()
    for index, values in _spread(samples, settings.num_examples):
        if len(chosen) == settings.num_examples:
            break
        try:
            prompt = _prompt(tokenizer, index, values)
        except ValueError as error:
            problems[str(error).removeprefix(f"sample {index}: ")] += 1
            continue
        if prompt.example["context_tokens"] <= limit:
            chosen.append(prompt)
        else:
            problems[f"their prompts have more than {limit:,} tokens"] += 1
    notes += [f"{count} samples passed over: {problem}" for problem, count in problems.items()]
    if settings.num_examples and not chosen and not problems:
        notes.append("there are no held-out samples")
    return sorted(chosen, key=lambda prompt: prompt.row.index)


def _spread(samples: Any, count: int) -> Iterable[tuple[int, dict[str, Any]]]:
    """Rows to try, in turn: evenly over a dataset, then between those; of a stream, the first."""
    if samples is None:
        return
    if not hasattr(samples, "__len__"):
        for index, row in enumerate(islice(samples, count * _TRIES)):
            yield index, _given(samples, row)
        return
    size, numbers = len(samples), range(count if len(samples) else 0)
    for index in dict.fromkeys((n * size // count + offset) % size for offset in range(_TRIES) for n in numbers):
        exact = has_json_columns(samples)
        yield index, python_row(samples, index) if exact else _given(samples, samples[index])


def _prompt(tokenizer: PreTrainedTokenizerBase, index: int, values: dict[str, Any]) -> _Prompt:
    """What is needed to decide on a sample; `ValueError` where it cannot be decided on."""
    # A dataset gives every row the columns that any row has.
    values = {name: value for name, value in values.items() if value is not None}
    split = split_sample(values)
    place = f"sample {index}"
    row = PromptRow(index, place, values, split.context, None, (0,))
    instructed, instructions = None, None
    if values.get(STRIPPED):
        restored = split_sample(restore_instructions(values)).context
        instructed = PromptRow(index, place, values, restored, None, (0,))
        instructions = "\n".join(text for piece in values[STRIPPED] for text in piece_texts(piece))
    context = _text(split.context)
    example = {
        "sample": index,
        "context_tokens": len(prompt_tokens(tokenizer, row, split.context)),
        "context_end": context if len(context) <= CONTEXT_CHARACTERS else f"… {context[-CONTEXT_CHARACTERS:]}",
        "instructions": instructions,
        "expected": None if split.decision is None else _text(split.decision),
    }
    return _Prompt(row, instructed, example)


def _decide(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PromptRow],
    settings: ExampleSettings,
    variant: str,
) -> dict[int, dict[str, Any]]:
    """The decision on each row, by its number."""
    if not rows:
        return {}
    base = variant != "trained"
    configs = model.peft_config.values() if isinstance(model, PeftModel) and not base else ()
    if any(getattr(config, "alora_invocation_tokens", None) for config in configs):
        return _decide_activated(model, tokenizer, rows, settings)
    sampling = SamplingSettings(num_candidates=1, temperature=0.0, max_new_tokens=settings.max_new_tokens)
    with model.disable_adapter() if base and isinstance(model, PeftModel) else nullcontext():
        decider = get_pretrained_model(model) if base else model
        sampler = LocalSampler(decider, tokenizer, sampling, batch_size=_BATCH_SIZE)
        candidates = [candidate for batch in sampler.sample(rows) for candidate in batch]
    return {item.prompt: {"text": item.text, "finished": item.finish == "stop"} for item in candidates}


def _decide_activated(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow], settings: ExampleSettings
) -> dict[int, dict[str, Any]]:
    """The same by PEFT's own generation, which switches the adapter on at its invocation; one row at a time."""
    pretrained = get_pretrained_model(model)
    stops = stop_tokens_of(tokenizer, pretrained.generation_config)
    forms = CandidateForms(tokenizer, stops)
    device = pretrained.get_input_embeddings().weight.device
    found = {}
    for row in rows:
        prompt = torch.tensor([prompt_tokens(tokenizer, row, row.prompt)], device=device)
        with torch.no_grad(), without_dropout(model):
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )
        new = output[0, prompt.shape[1] :].tolist()
        found[row.index] = {"text": forms.text(new), "finished": new[-1] in stops}
    return found


def _text(context: Context) -> str:
    """Messages as text, each behind its role; a decision of one message is that message's text."""
    if isinstance(context, str):
        return context
    texts = [" ".join(text for _, text in message_texts(message)) for message in context]
    if len(context) == 1 and context[0]["role"] == "assistant":
        return texts[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(context, texts, strict=True))


def _given(samples: Any, row: dict[str, Any]) -> dict[str, Any]:
    """What was written in a row: a dataset with types gives every object the keys that any row's has."""
    return remove_none_values(row) if getattr(samples, "features", None) else row

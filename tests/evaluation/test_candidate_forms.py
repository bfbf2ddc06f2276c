# SPDX-License-Identifier: Apache-2.0
"""Candidates train as they were generated: what is written is rendered by the tokenizer itself and compared."""

from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerBase

from frozen_peft.evaluation import CandidateFilter, LocalSampler, PromptRow, SamplingSettings
from frozen_peft.evaluation.candidate_forms import CandidateForms
from frozen_peft.evaluation.candidates import completed
from tests.documentation.tokenizer import train_tokenizer
from tests.tiny_models import tiny_model

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ASK = [{"role": "user", "content": "what is the road?"}]
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}},
}
THOUGHT = "<think>\nthe book\n</think>\n\n"
CALL = '<tool_call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call>'
NEW_CALL = "<tool_call>\n<function=look>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
# Template, what stands in the prompt of what is generated, what is generated, and how it is written:
# as text, with parts of its own, or not at all.
CASES = [
    ("qwen2_5", "left", "text"),
    ("qwen2_5", CALL, "parts"),
    ("qwen3", THOUGHT + "left", "parts"),
    ("qwen3", THOUGHT + CALL, "parts"),
    # Spaces that the template does not write in a call.
    ("qwen2_5", CALL.replace('"x": 1', '"x":1'), "text"),
    ("qwen3_5_nothink", "left", "text"),
    ("qwen3_5_think", THOUGHT.removeprefix("<think>\n") + "left", "parts"),
    ("qwen3_5_think", THOUGHT.removeprefix("<think>\n") + NEW_CALL, "parts"),
    ("qwen3", "<think>\nno end", "lost"),
    ("qwen2_5", " left ", "text"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    texts = ["what is the road? left <|im_start|>assistant\n", "the book", CALL, NEW_CALL, "look function parameter"]
    made = train_tokenizer(texts * 4, vocab_size=320)
    made.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|endoftext|>"]}
    )
    return made


def with_template(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def row_of(prompt: Any, **values: Any) -> PromptRow:
    return PromptRow(0, "p.jsonl, line 1", {"prompt": prompt, **values}, prompt, None, (7,))


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def trained(tokenizer: PreTrainedTokenizerBase, sample: dict[str, Any]) -> list[int]:
    """What a row is trained as, by the tokenizer alone."""
    if isinstance(sample["prompt"], str):
        return encoded(tokenizer, sample["prompt"] + sample["completion"] + tokenizer.eos_token)
    messages = sample["prompt"] + sample["completion"]
    return tokenizer.apply_chat_template(messages, tools=sample.get("tools"), return_dict=True)["input_ids"]


def prompt_of(tokenizer: PreTrainedTokenizerBase, row: PromptRow) -> list[int]:
    if isinstance(row.prompt, str):
        return encoded(tokenizer, row.prompt)
    return tokenizer.apply_chat_template(
        row.prompt, tools=row.values.get("tools"), add_generation_prompt=True, return_dict=True
    )["input_ids"]


@pytest.mark.parametrize(("template", "text", "form"), CASES)
def test_a_row_trains_as_it_was_generated(
    tokenizer: PreTrainedTokenizerBase, template: str, text: str, form: str
) -> None:
    tokenizer = with_template(tokenizer, template)
    row = row_of(ASK, tools=[TOOL])
    tokens = [*encoded(tokenizer, text), tokenizer.eos_token_id]
    found = CandidateForms(tokenizer, [tokenizer.eos_token_id]).candidate(row, 0, tokens)
    generated = prompt_of(tokenizer, row) + tokens
    assert found.text == text
    assert (found.differs == "text") == (form == "lost")
    if form != "lost":
        rendered = trained(tokenizer, completed(row, found))
        assert rendered[: len(generated)] == generated
        # Nothing but the template's line break after the end of the turn, and the end once.
        assert tokenizer.decode(rendered[len(generated) :]).strip() == ""
    assert (found.message is not None) == (form == "parts")
    (reason,) = CandidateFilter().judge([row], [found], {})
    assert reason == ("would not train as generated" if form == "lost" else None)


@pytest.mark.parametrize(
    ("prompt", "pieces", "end", "differs"),
    [
        ("the road", [" left <tool_call>"], "<|im_end|>", None),
        (ASK, ["left"], "<|im_end|>", None),
        # One text, and other tokens than the tokenizer has for it.
        (ASK, ["l", "e", "f", "t"], "<|im_end|>", "tokens"),
        # Characters that spell a special token.
        (ASK, ["left <", "tool_call>"], "<|im_end|>", "text"),
        # Another end than the template's, which would be trained in its place.
        (ASK, ["l", "e", "f", "t"], "", "tokens"),
        (ASK, ["left <", "tool_call>"], "", "text"),
        (ASK, ["left"], "", None),
        (ASK, ["left"], "<|endoftext|>", "text"),
        ("the road", [" left"], "<|endoftext|>", "text"),
    ],
)
def test_what_would_train_otherwise_is_told(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, pieces: list[str], end: str, differs: str | None
) -> None:
    tokenizer = with_template(tokenizer, "qwen2_5")
    row = row_of(prompt)
    stops = encoded(tokenizer, "<|im_end|><|endoftext|>")
    tokens = [token for piece in pieces for token in encoded(tokenizer, piece)] + encoded(tokenizer, end)
    found = CandidateForms(tokenizer, stops).candidate(row, 0, tokens)
    assert (found.text, found.differs) == ("".join(pieces), differs)
    sample = completed(row, found)
    generated = prompt_of(tokenizer, row) + tokens
    assert (trained(tokenizer, sample)[: len(generated)] == generated) == (differs is None)
    assert sample.get("retokenized", False) == (differs == "tokens")


def test_a_template_that_drops_reasoning_is_found_out(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_template(tokenizer, "qwen3")
    tokenizer.chat_template = (
        "{%- for message in messages -%}{%- set text = message.content.split('</think>')[-1] -%}"
        "<|im_start|>{{ message.role }}\n{{ text }}<|im_end|>\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    )
    row = row_of(ASK)
    tokens = [*encoded(tokenizer, "<think>the book</think>left"), tokenizer.eos_token_id]
    assert CandidateForms(tokenizer, [tokenizer.eos_token_id]).candidate(row, 0, tokens).differs == "text"


def test_the_sampler_keeps_special_tokens(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = with_template(tokenizer, "qwen3")
    generated = [*encoded(tokenizer, THOUGHT + CALL), tokenizer.eos_token_id]
    monkeypatch.setattr("frozen_peft.evaluation.generation.generate_over", lambda *args, **kwargs: [generated])
    settings = SamplingSettings(num_candidates=1, temperature=0.0, max_new_tokens=len(generated))
    sampler = LocalSampler(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, settings)
    row = row_of(ASK, tools=[TOOL])
    ((candidate,),) = list(sampler.sample([row]))
    assert candidate.text == THOUGHT + CALL
    rendered = trained(tokenizer, completed(row, candidate))
    whole = prompt_of(tokenizer, row) + generated
    assert rendered[: len(whole)] == whole
    assert getattr(tokenizer, "response_template", None) is None

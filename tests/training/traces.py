# SPDX-License-Identifier: Apache-2.0
"""Traces of an agent, the chat templates that TRL ships, and each turn rendered by itself."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.reference import IGNORED, Sample

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# Of which no length of a sample is one.
TRACE_VOCABULARY = 640
# What templates write that a tokenizer of their models has as one token.
MARKERS = re.compile(r"<[|｜][^<>\s{}'\"]*[|｜]>|</?(?:think|tool_call|tool_response|start_of_turn)>")
# Long enough for every length to be that of no weight.
QUESTION = "Which of the red ones is it, and how many of them are there, all in all? " * 3
TOOLS = [
    {
        # In the order of the alphabet, in which tables of pyarrow before 22 keep the keys of objects.
        "function": {
            "description": "Looks.",
            "name": "search",
            "parameters": {"properties": {"q": {"description": "what", "type": "string"}}, "type": "object"},
        },
        "type": "function",
    }
]


@lru_cache
def template_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that is trained on a template's own text, with the template and its markers as tokens."""
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    markers = sorted(set(MARKERS.findall(template)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRACE_VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>", *markers],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([template], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = template
    return fast


def called(number: int, query: str, *, as_text: bool = False) -> list[dict[str, Any]]:
    """One call of the tool, its arguments an object or JSON."""
    arguments: Any = {"q": query}
    function = {"name": "search", "arguments": json.dumps(arguments) if as_text else arguments}
    return [{"id": f"call{number:05d}", "type": "function", "function": function}]


def trace(
    *,
    reasoning: str | None = "reasoning_content",
    tools: bool = True,
    system: bool = True,
    num_calls: int = 2,
    as_text: bool = False,
) -> dict[str, Any]:
    """A row of messages: calls of a tool and an answer, another question and its answer, and one without reasoning.

    Args:
        reasoning: The field that the assistant's messages have their reasoning in; None: they have none.
        tools: Whether tools are called.
        system: Whether it begins with a system message.
        num_calls: How often a tool is called.
        as_text: Arguments are JSON, not an object.
    """

    def assistant(thought: str, content: str, **rest: Any) -> dict[str, Any]:
        own = {reasoning: thought} if reasoning is not None else {}
        return {"role": "assistant", "content": content, **own, **rest}

    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if system else []
    messages.append({"role": "user", "content": QUESTION})
    if tools:
        for number, colour in enumerate(("red", "blue")[:num_calls]):
            calls = called(number, colour, as_text=as_text)
            messages.append(assistant(f"look up {colour}", "", tool_calls=calls))
            result = {"role": "tool", "content": f"{colour} seven", "tool_call_id": f"call{number:05d}"}
            messages.append({**result, "name": "search"})
    messages.append(assistant("so it is seven", "It is seven."))
    messages.append({"role": "user", "content": "And now?"})
    messages.append(assistant("eight comes next", "Eight."))
    messages.append({"role": "user", "content": "Sure?"})
    messages.append({"role": "assistant", "content": "Yes."})
    return {"messages": messages} | ({"tools": TOOLS} if tools else {})


def rendered_turns(
    tokenizer: PreTrainedTokenizerFast, row: Mapping[str, Any], written: Mapping[int, str] = {}
) -> list[Sample]:
    """One sample per assistant message: the template's prompt for it, and what the template has with it.

    Supervised is what follows on what the two have in common.

    Args:
        tokenizer: With the template.
        row: The trace.
        written: By number of a message, what it is behind its prompt, where the template renders that otherwise.
    """
    options = {"tools": row.get("tools"), "return_dict": False, **row.get("chat_template_kwargs", {})}
    made = []
    for index, message in enumerate(row["messages"]):
        if message["role"] != "assistant" or message.get("train") is False or message.get("weight") == 0:
            continue
        before = tokenizer.apply_chat_template(row["messages"][:index], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(row["messages"][: index + 1], **options)
        if index in written:
            whole = before + tokenizer(written[index], add_special_tokens=False)["input_ids"]
        common = 0
        while common < min(len(before), len(whole)) and before[common] == whole[common]:
            common += 1
        labels = torch.tensor(whole)
        labels[:common] = IGNORED
        made.append(Sample(torch.tensor(whole), labels))
    return made


def reasoning_field(template: str) -> str:
    """The field that a template reads reasoning from, where it reads any."""
    text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    fields = ("reasoning_content", "thinking", "reasoning")
    return next((name for name in fields if re.search(rf"\b{name}\b", text)), "reasoning_content")


def agent_trace(num_calls: int, num_words: int, *, every: int | None = None) -> dict[str, Any]:
    """Calls of a tool with results of so many words, an answer and another question after every so many, an answer."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Look for it."}]
    for number in range(num_calls):
        thought = {"reasoning_content": f"step {number} looks for the number {number}, which was not there before"}
        if every and number and number % every == 0:
            messages.append({"role": "assistant", "content": f"So far {number}.", **thought})
            messages.append({"role": "user", "content": f"Go on from {number}."})
        messages.append({"role": "assistant", "content": "", "tool_calls": called(number, str(number)), **thought})
        result = _words(num_words, number)
        messages.append({"role": "tool", "content": result, "tool_call_id": f"call{number:05d}", "name": "search"})
    messages.append({"role": "assistant", "content": "Found.", "reasoning_content": "that is all there was"})
    return {"messages": messages, "tools": TOOLS}


def chat_trace(num_turns: int, num_words: int) -> dict[str, Any]:
    """Questions of so many words, each answered with reasoning."""
    messages: list[dict[str, Any]] = []
    for number in range(num_turns):
        thought = f"question {number} asks for the number {number}, which was not there before"
        messages.append({"role": "user", "content": _words(num_words, number)})
        messages.append({"role": "assistant", "content": f"It is {number}.", "reasoning_content": thought})
    return {"messages": messages, "tools": TOOLS}


def _words(count: int, seed: int) -> str:
    return " ".join(f"{seed * 31 + word * 7 % 100}" for word in range(count))

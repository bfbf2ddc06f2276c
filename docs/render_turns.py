# SPDX-License-Identifier: Apache-2.0
"""Writes into `docs/turns.md` what the chat templates that TRL ships do with earlier reasoning, by rendering a trace.

python docs/render_turns.py
"""

from pathlib import Path
from typing import Any

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from frozen_peft.data.traces import REASONING_FIELDS
from frozen_peft.training.turn_rendering import TurnRenderer, fields_read

PAGE = Path(__file__).parent / "turns.md"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
START, END = "<!-- made by docs/render_turns.py: begin -->\n", "<!-- made by docs/render_turns.py: end -->"
HEADER = ("template", "reads", "in its own turn", "behind a call", "after the next question", "calls")
CALL, ANSWER = "looked up first", "so it was seven"


def trace(*, tools: bool) -> dict[str, Any]:
    """A question, a call with its result, an answer, another question and its answer, with reasoning."""

    def thought(text: str) -> dict[str, str]:
        return dict.fromkeys(REASONING_FIELDS, text)

    call = {"id": "call00001", "type": "function", "function": {"name": "search", "arguments": {"q": "red"}}}
    loop = [
        {"role": "assistant", "content": "", "tool_calls": [call], **thought(CALL)},
        {"role": "tool", "content": "seven", "name": "search", "tool_call_id": "call00001"},
    ]
    function = {"name": "search", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
    messages = [
        {"role": "user", "content": "Which?"},
        *(loop if tools else []),
        {"role": "assistant", "content": "Seven.", **thought(ANSWER)},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Eight.", **thought("now it is eight")},
    ]
    return {"messages": messages} | ({"tools": [{"type": "function", "function": function}]} if tools else {})


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token per byte, which every text has, with a template of TRL's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return fast


def describe(name: str) -> tuple[str, ...]:
    """The line of a template."""
    own = tokenizer(name)
    reads = ", ".join(f"`{field}`" for field in fields_read(str(own.chat_template)))
    answer, later = _turns(own, tools=False) or ((), ())
    if not answer:
        # Templates of content in parts alone.
        return (f"`{name}`", *[""] * 4, "refused")
    kept = ("kept" if ANSWER in answer[1] else "dropped", "kept" if ANSWER in later[0] else "dropped")
    calls = _turns(own, tools=True)
    if calls is None:
        loop = ("", "refused")
    else:
        loop = ("kept" if CALL in calls[1][0] else "dropped", "rendered" if "search" in calls[0][1] else "left out")
    return (f"`{name}`", reads, kept[0], loop[0], kept[1], loop[1]) if reads else (f"`{name}`", *[""] * 4, loop[1])


def _turns(own: PreTrainedTokenizerFast, *, tools: bool) -> list[tuple[str, str]] | None:
    """Context and decision of each turn; None where the template has none."""
    try:
        turns = TurnRenderer(own).turns(trace(tools=tools))
    except ValueError:
        return None
    return [(own.decode(turn.input_ids[: turn.first]), own.decode(turn.input_ids[turn.first :])) for turn in turns]


def render() -> str:
    """The table, with the version of TRL that it is of."""
    names = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
    lines = [HEADER, ("---",) * len(HEADER), *map(describe, names)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{START}Of trl {trl.__version__}:\n\n{rows}\n{END}"


def with_table(page: str) -> str:
    """The page with the table in its place."""
    before, rest = page.split(START)
    return before + render() + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

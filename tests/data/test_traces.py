# SPDX-License-Identifier: Apache-2.0
"""Which messages of a trace train, and how a wrong one is named."""

import copy
from typing import Any

import pytest

from frozen_peft.data.traces import read_trace

CALL = {"id": "a", "type": "function", "function": {"name": "search", "arguments": {"q": "red"}}}
TRACE: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which?"},
    {"role": "assistant", "content": None, "reasoning_content": "look", "tool_calls": [CALL]},
    {"role": "tool", "content": "seven", "tool_call_id": "a"},
    {"role": "assistant", "content": "Seven."},
]


def changed(index: int, **fields: Any) -> dict[str, Any]:
    """The trace with fields of a message replaced, or left out."""
    messages = copy.deepcopy(TRACE)
    messages[index] = {name: value for name, value in (messages[index] | fields).items() if value is not ...}
    return {"messages": messages}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (changed(2, tool_calls=[{"function": {"name": "search"}}]), r"`messages\[2\].tool_calls\[0\]` .* `arguments`"),
        (changed(2, tool_calls=[{"function": {"arguments": {}}}]), r"`messages\[2\].tool_calls\[0\]` .* `name`"),
        (
            changed(2, tool_calls=[{"function": {"name": "a", "arguments": [1]}}]),
            r"\[0\].arguments` is a list",
        ),
        (changed(2, tool_calls=[{"function": "search"}]), r"`messages\[2\].tool_calls\[0\].function` is text"),
        (changed(2, tool_calls="search"), r"`messages\[2\].tool_calls` is text"),
        (changed(2, tool_calls=...), r"`messages\[3\]` is the result of a tool, and no call"),
        (changed(2, tool_calls=..., reasoning_content=...), r"`messages\[2\]` has neither `content` nor `tool_calls`"),
        (changed(1, tool_calls=[CALL]), r"`messages\[1\].tool_calls`: a call is an assistant's"),
        (changed(3, tool_call_id="b"), r"`messages\[3\]` is the result of the call 'b', .* are 'a'"),
        (changed(2, reasoning_content=["look"]), r"`messages\[2\].reasoning_content` is a list"),
        (changed(4, thinking={"a": 1}), r"`messages\[4\].thinking` is an object"),
        (changed(4, role=...), r"`messages\[4\].role` is null"),
        (changed(4, content=7), r"`messages\[4\].content` is a number"),
        (changed(4, train="no"), r"`messages\[4\].train` is 'no', expected true or false"),
        (changed(4, train=1), r"`messages\[4\].train` is 1, expected true or false"),
        (changed(4, weight=0.5), r"`messages\[4\].weight` is 0.5, expected 0 or 1"),
        (changed(4, weight=0, train=True), r"`messages\[4\]` says `train` and `weight`, and they differ"),
        (changed(1, train=True), r"`messages\[1\]` is to train, and its role is 'user'"),
        ({"messages": [*TRACE[:2], *TRACE[3:]]}, r"`messages\[2\]` is the result of a tool"),
        ({"messages": [*TRACE[:4], TRACE[3]]}, r"`messages\[4\]` is the result of a tool"),
        ({"messages": [*TRACE[:3], TRACE[1], TRACE[3]]}, r"`messages\[4\]` is the result of a tool"),
        ({"messages": TRACE[2:]}, r"`messages\[0\]` is to train, and nothing stands before it"),
        ({"messages": TRACE[:2]}, "no message of an assistant trains"),
        ({"messages": [*TRACE, "and"]}, r"`messages\[5\]` is text"),
        ({"prompt": TRACE[:2], "completion": [*TRACE[2:4], TRACE[3]]}, r"`completion\[2\]` is the result of a tool"),
        ({"prompt": "Which?", "completion": "Seven."}, "`prompt` is text, .* renders a list of messages"),
        ({"text": "Seven."}, r"`messages` is null, .* \(found the columns `text`\)"),
    ],
    ids=str,
)
def test_a_wrong_message_is_named(row: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_trace(row)


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        ({"messages": TRACE}, [2, 4]),
        (changed(2, train=False), [4]),
        (changed(2, train=None, weight=None), [2, 4]),
        (changed(4, weight=0), [2]),
        (changed(4, weight=1.0, train=True), [2, 4]),
        (changed(1, train=False, weight=0), [2, 4]),
        (changed(2, tool_calls=[CALL["function"]]), [2, 4]),
        ({"messages": [*TRACE, TRACE[4], {"role": "system", "content": "Now."}, TRACE[4]]}, [2, 4, 5, 7]),
        # A prompt's messages do not train unless they say so.
        ({"prompt": TRACE[:4], "completion": TRACE[4:]}, [4]),
        ({"prompt": changed(2, train=True)["messages"][:4], "completion": TRACE[4:]}, [2, 4]),
        # What comes first is shown, and need not train.
        ({"messages": [TRACE[4] | {"train": False}, *TRACE[1:]]}, [2, 4]),
    ],
    ids=str,
)
def test_which_messages_train(row: dict[str, Any], trained: list[int]) -> None:
    trace = read_trace(row)
    assert trace.trained == trained
    given = [*row.get("prompt", ()), *row.get("completion", ()), *row.get("messages", ())]
    own = ({name: value for name, value in each.items() if name not in ("train", "weight")} for each in given)
    assert trace.messages == list(own)


def test_results_may_come_in_any_order_and_without_a_name() -> None:
    call = TRACE[2] | {"tool_calls": [CALL, CALL | {"id": "b"}]}
    for names in ({"tool_call_id": "b"}, {"tool_call_id": "a"}), ({}, {}):
        results = [{"role": "tool", "content": "x", **name} for name in names]
        assert read_trace({"messages": [*TRACE[:2], call, *results, TRACE[4]]}).trained == [2, 5]

# SPDX-License-Identifier: Apache-2.0
"""Rows train as they are written: held to Python's `json` and the tokenizer's own rendering of what it reads."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Json, List, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from frozen_peft import FrozenContextTrainer
from frozen_peft.data import DEFAULT_MARKS, load_samples, parse_json, python_rows, strip_instructions
from tests.documentation.tokenizer import train_tokenizer
from tests.tiny_models import tiny_model
from tests.training.runs import config, fresh_lora

# Everything that a template can render of a message, tools and its own options.
TEMPLATE = """\
{%- if tools %}{{ tools | tojson }}{% endif -%}
{{- '<' ~ (style if style is defined else 'plain') ~ '>' -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + (message.content if message.content is string else '') -}}
{%- for key in message if key not in ('role', 'content') %}{{ key }}={{ message[key] | tojson }}{% endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = train_tokenizer(["2024-01-31 true null 1.5 <|im_start|> the facts"] * 4, vocab_size=300)
    made.chat_template = TEMPLATE
    return made


def called(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}], **more}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ASK = [{"role": "user", "content": "the facts"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "number"}}}}
CASES: dict[str, list[dict[str, Any]]] = {
    "text that looks like dates": [
        {"prompt": "when: ", "completion": "2024-01-31"},
        {"prompt": "2024-01-31T10:00:00Z", "completion": "1999-12-31"},
    ],
    "messages that look like dates": [
        {"prompt": ASK, "completion": [{"role": "assistant", "content": text}]}
        for text in ("2024-01-31", "2024-02-01")
    ],
    "dates in arguments": [
        {"prompt": ASK, "completion": [called({"day": day})]} for day in ("2024-01-31", "2024-02-01")
    ],
    "numbers of one kind beside another": [
        {"prompt": ASK, "completion": [called({"x": x})]} for x in (1, 1.5, True, "1", None)
    ],
    "numbers that a shorter decimal would change": [
        {"prompt": ASK, "completion": [called({"x": x})]}
        for x in (64.35, 0.12345678901234568, 1e-12, -0.0, 1e22, 2**53 + 1, 2**64 - 1, -(2**63), 5e-324, 1.7e308)
    ],
    "keys that some rows have": [
        {"prompt": ASK, "completion": [called({"a": 1})], "tools": [TOOL]},
        {"prompt": ASK, "completion": [called({"b": {"c": []}})]},
        {"prompt": [{**ASK[0], "name": "n"}], "completion": [called({}, content="x")], "tools": [{"other": None}]},
    ],
    "options of the template in some rows": [
        {"prompt": ASK, "completion": [called({})], "chat_template_kwargs": {"style": "2024-01-31"}},
        {"prompt": ASK, "completion": [called({})]},
        {"prompt": ASK, "completion": [called({})], "chat_template_kwargs": {"other": 1.5}},
        {"prompt": ASK, "completion": [called({})], "chat_template_kwargs": None},
    ],
    "text that is JSON": [
        {"prompt": ASK, "completion": [{"role": "assistant", "content": text}], "tools": json.dumps([TOOL])}
        for text in ("123", "null", '{"a": 1}', "a\u2028b\u0085\r\n\x00")
    ],
}


def expected_tokens(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """What a row is written to be, without any table between."""
    if isinstance(row["prompt"], str):
        return tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
    tools = row.get("tools")
    return tokenizer.apply_chat_template(
        row["prompt"] + row["completion"],
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        return_dict=True,
        **(row.get("chat_template_kwargs") or {}),
    )["input_ids"]


def prepared(folder: Path, tokenizer: PreTrainedTokenizerBase, samples: Any, **fields: Any) -> Any:
    trainer = FrozenContextTrainer(
        model=fresh_lora(tiny_model("llama", vocab_size=len(tokenizer))),
        args=config(folder, max_steps=1, **fields),
        train_dataset=samples,
        processing_class=tokenizer,
    )
    return trainer.train_dataset


@pytest.mark.parametrize("case", CASES)
def test_rows_train_as_they_are_written(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, case: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(CASES[case]), encoding="utf-8")
    written = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    rows = prepared(tmp_path, tokenizer, load_samples(str(path)))
    assert rows["input_ids"][:] == [expected_tokens(tokenizer, row) for row in written]
    if len(written) > 2:
        streamed = prepared(tmp_path, tokenizer, load_samples(str(path), streaming=True))
        assert [row["input_ids"] for row in streamed] == rows["input_ids"][:]


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(JSON_VALUES, min_size=1, max_size=4))
def test_any_json_comes_back_from_storage(tmp_path: Path, values: list[Any]) -> None:
    rows = [{"prompt": ASK, "completion": [called(value)], "beside": value} for value in values]
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(rows), encoding="utf-8")
    samples = load_samples(str(path))
    found = list(python_rows(samples)) if samples.features["prompt"] == Json() else samples.to_list()
    # The text tells 1 from 1.0 and from true, and 0.0 from -0.0.
    assert [json.dumps(row) for row in found] == [json.dumps(row) for row in rows]


def test_conversations_packing_and_processes(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [
        [{"from": "user", "value": "the facts"}, {"from": "assistant", "value": f"2024-01-{day}", "extra": day / 7}]
        for day in range(10, 15)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([{"conversations": turn, "id": number} for number, turn in enumerate(turns)]))
    messages = [
        [{"role": m["from"], "content": m["value"], **{k: m[k] for k in m if k == "extra"}} for m in turn]
        for turn in turns
    ]
    expected = [tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"] for turn in messages]
    rows = prepared(tmp_path, tokenizer, load_samples(str(path)), dataset_num_proc=2)
    assert rows["input_ids"][:] == expected
    assert rows["id"][:] == [0, 1, 2, 3, 4]
    # What was computed is found again, as long as nothing that it depends on has changed.
    again = prepared(tmp_path, tokenizer, load_samples(str(path)), dataset_num_proc=2)
    assert {file["filename"] for file in again.cache_files} == {file["filename"] for file in rows.cache_files}
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE.replace("<|im_end|>", "the<|im_end|>")
    assert prepared(tmp_path, other, load_samples(str(path)), dataset_num_proc=2)["input_ids"][0] != expected[0]
    packed = prepared(tmp_path, tokenizer, load_samples(str(path)), packing=True, max_length=4096, gradient_horizon=-1)
    assert sorted(packed["seq_lengths"][0]) == sorted(map(len, expected))


def test_a_teacher_gets_its_instructions_as_they_were_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rule = {"role": "system", "content": "2024-01-31", "instruction": True, "rate": 64.35}
    rows = [
        {"prompt": [*([rule] if number % 2 else []), *ASK], "completion": [called({"x": number / 7})]}
        for number in range(3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([strip_instructions(row, DEFAULT_MARKS) for row in rows]))
    for streaming in (False, True):
        samples = load_samples(str(path), streaming=streaming)
        found = list(prepared(tmp_path, tokenizer, samples, loss_type="distill"))
        assert [row["teacher_input_ids"] for row in found] == [expected_tokens(tokenizer, row) for row in rows]
        without = [{**row, "prompt": ASK} for row in rows]
        assert [row["input_ids"] for row in found] == [expected_tokens(tokenizer, row) for row in without]


def test_json_of_another_reader_is_decoded_from_storage(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [*ASK, called({"day": "2024-01-31"})]
    samples = Dataset.from_list([{"messages": [json.dumps(message) for message in messages]}] * 2).cast_column(
        "messages", List(Json())
    )
    found = prepared(tmp_path, tokenizer, samples)
    assert found["input_ids"][0] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_text_that_another_reader_took_for_dates_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(CASES["text that looks like dates"][:1] * 2))
    samples = load_dataset("json", data_files=str(path), split="train")
    with pytest.raises(ValueError, match=r"train dataset has timestamp.* in `completion`.*frozen_peft.load_samples"):
        prepared(tmp_path, tokenizer, samples)


@pytest.mark.parametrize("text", [b'{"a": 1.50}', b'{"a": 1e2}', b'{"a": 100.0}', b'{"a": 0.1}'])
def test_numbers_count_by_their_value(text: bytes) -> None:
    assert parse_json(text) == json.loads(text)
    assert type(parse_json(text)["a"]) is float

# SPDX-License-Identifier: Apache-2.0
"""Rows of traces, from wherever they come, become the branches that each turn rendered by itself gives."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from frozen_peft import FrozenContextTrainer, load_samples
from frozen_peft.context.branches import unfold_branches
from frozen_peft.training.sampling import group_by_shared_prefix
from frozen_peft.training.turn_rendering import TurnRenderer
from tests.tiny_models import add_lora, tiny_model
from tests.training.runs import config
from tests.training.traces import TRACE_VOCABULARY, rendered_turns, template_tokenizer, trace


def made_trainer(folder: Path, rows: Any, template: str = "qwen3", **fields: Any) -> FrozenContextTrainer:
    defaults: dict[str, Any] = {"decision_mode": "turns", "turn_contexts": "inference"}
    return FrozenContextTrainer(
        add_lora(tiny_model("llama", vocab_size=TRACE_VOCABULARY)),
        config(folder, **(defaults | fields)),
        train_dataset=rows,
        processing_class=template_tokenizer(template),
    )


# Behind another answer, Qwen3's template shows that with an empty block of reasoning only while nothing follows.
ONCE_MORE = "<think>\n\n</think>\n\nOnce more.<|im_end|>\n"


def assert_prepared(prepared: Any, rows: list[dict[str, Any]], template: str = "qwen3") -> None:
    for own, row in zip(prepared, rows, strict=True):
        last = len(row["messages"]) - 1
        written = {last: ONCE_MORE} if row["messages"][last]["content"] == "Once more." else {}
        made = unfold_branches(*(torch.tensor(own[name]) for name in ("input_ids", "labels", "branches")))
        expected = rendered_turns(template_tokenizer(template), row, written)
        assert [ids.tolist() for ids, _ in made] == [turn.input_ids.tolist() for turn in expected]
        assert [labels.tolist() for _, labels in made] == [turn.labels.tolist() for turn in expected]


def odd_rows() -> list[dict[str, Any]]:
    """Consecutive assistants, a system message amid, several calls, options, and messages that do not train."""
    first, second, third, fourth = (trace() for _ in range(4))
    first["messages"][3:3] = [{"role": "system", "content": "Slowly."}]
    first["messages"] += [{"role": "assistant", "content": "Once more."}]
    calls = second["messages"][2]["tool_calls"]
    second["messages"][2]["tool_calls"] = [*calls, {**calls[0], "id": "other"}]
    second["messages"][3:3] = [{"role": "tool", "content": "nine", "tool_call_id": "other"}]
    second["messages"][2]["content"] = None
    third["chat_template_kwargs"] = {"enable_thinking": False}
    third["messages"][2] |= {"train": False}
    third["messages"][-1] |= {"weight": 0}
    # Arguments of another shape, which a table with types would fill up.
    fourth["messages"][2]["tool_calls"][0]["function"]["arguments"] = {"other": 1, "deep": {"a": [None, "b"]}}
    return [first, second, third, fourth]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_of_a_file(num_proc: int | None, tmp_path: Path) -> None:
    rows = odd_rows()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = made_trainer(tmp_path, load_samples(path), dataset_num_proc=num_proc)
    assert_prepared(trainer.train_dataset, rows)


@pytest.mark.parametrize("kind", ["table", "stream", "chatml"])
def test_rows_of_other_datasets(kind: str, tmp_path: Path) -> None:
    rows = odd_rows()[:2]
    if kind == "chatml":
        keys = {"role": "from", "content": "value"}
        plain = [{key: message[key] for key in keys} for message in trace(tools=False)["messages"]]
        rows = [{"messages": plain}]
        given: Any = Dataset.from_list(
            [{"conversations": [{keys[key]: value for key, value in each.items()} for each in plain]}]
        )
    else:
        given = Dataset.from_list(rows) if kind == "table" else IterableDataset.from_generator(lambda: iter(rows))
    assert_prepared(made_trainer(tmp_path, given).train_dataset, rows)


def test_of_a_prompt_the_completion_trains(tmp_path: Path) -> None:
    row = trace()
    messages = row.pop("messages")
    given = {"prompt": messages[:4], "completion": messages[4:], **row}
    before = [message | {"train": False} for message in messages[:4]]
    assert_prepared(
        made_trainer(tmp_path, Dataset.from_list([given])).train_dataset, [{**row, "messages": before + messages[4:]}]
    )


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_wrong_row_is_named_by_its_number(num_proc: int | None, tmp_path: Path) -> None:
    rows = [trace() for _ in range(4)]
    rows[3]["messages"][2]["tool_calls"][0]["function"].pop("arguments")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"Sample 3 of the train dataset: `messages\[2\].tool_calls\[0\]`"):
        made_trainer(tmp_path, load_samples(path), dataset_num_proc=num_proc)


def test_what_is_refused(tmp_path: Path) -> None:
    tokens = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]})
    with pytest.raises(ValueError, match=r"The train dataset is tokenized, and `turn_contexts='inference'`"):
        made_trainer(tmp_path, tokens)
    prepared = made_trainer(tmp_path, Dataset.from_list([trace()])).train_dataset
    with pytest.raises(ValueError, match=r"has the column `branches`, and `turn_contexts='training'`"):
        made_trainer(tmp_path, prepared, turn_contexts="training")
    skipping = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match=r"has no column `branches`, and `turn_contexts='inference'`"):
        made_trainer(tmp_path, tokens, **skipping)
    assert made_trainer(tmp_path, prepared, **skipping).train_dataset.column_names == prepared.column_names
    for fields, reason in (
        ({"decision_mode": "tail"}, "Set `decision_mode='turns'`"),
        ({"loss_type": "distill"}, "`loss_type='distill'`"),
        ({"padding_free": True}, "`padding_free` puts several into one row"),
        ({"turn_contexts": "both"}, "`turn_contexts` must be one of training, inference"),
    ):
        with pytest.raises(ValueError, match=reason):
            made_trainer(tmp_path, Dataset.from_list([trace()]), **fields)


@pytest.mark.parametrize(("template", "drops"), [("qwen3", True), ("qwen3_training", False)])
def test_reasoning_that_one_rendering_drops_is_said_once(
    template: str, drops: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"turn_contexts": "training", "assistant_only_loss": template != "qwen3"}
    made_trainer(tmp_path, Dataset.from_list([trace(), trace()]), template, **fields)
    found = [record.message for record in caplog.records if "turn_contexts='inference'" in record.message]
    assert len(found) == drops
    if drops:
        assert "the `reasoning_content` of message 2 out of sample 0 of the train dataset" in found[0]


@pytest.mark.parametrize(
    ("template", "row", "what"),
    [
        ("qwen2_5", trace(), "does not render the `reasoning_content` of `messages.2.`.* reads no such field"),
        (
            "llama3",
            trace(reasoning=None),
            "does not render the `tool_calls` of `messages.2.`: the model learns",
        ),
        ("qwen3_5_nothink", trace(), "does not render that in `messages.2.`: the decision begins before it"),
    ],
)
def test_turns_that_are_not_as_inference_has_them_are_said(
    template: str, row: dict[str, Any], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    renderer = TurnRenderer(template_tokenizer(template))
    for _ in range(2):
        renderer.turns(row)
    assert [bool(re.search(what, record.message)) for record in caplog.records] == [True]


def test_rows_are_grouped_by_the_longest_of_their_contexts(tmp_path: Path) -> None:
    rows = [trace(), trace(tools=False, system=False), trace(reasoning=None), trace(tools=False, system=False)]
    rows[1]["messages"][0]["content"] = rows[3]["messages"][0]["content"] = "Something else. " * 20
    prepared = made_trainer(tmp_path, Dataset.from_list(rows)).train_dataset
    groups = group_by_shared_prefix(prepared, decision_mode="turns")[:, 0].tolist()
    assert groups[0] == groups[2] != groups[1] == groups[3]


def test_a_stream_trains_as_its_table(tmp_path: Path) -> None:
    rows = [trace(), trace(reasoning=None)]
    losses = []
    for given in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        trainer = made_trainer(tmp_path, given, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

# SPDX-License-Identifier: Apache-2.0
"""What preference data may look like, and what is said about a row that cannot be trained."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from trl import DPOConfig, KTOConfig, KTOTrainer

from frozen_peft import (
    FrozenContextDPOConfig,
    FrozenContextDPOTrainer,
    FrozenContextKTOConfig,
    FrozenContextKTOTrainer,
)
from tests.tiny_models import tiny_model
from tests.training.preferences import Plain, acting_lora, as_text, as_tokens, pairs, settings
from tests.training.runs import CHAT_TEMPLATE, in_float64, train, without_timings, word_tokenizer, words

LOGGED = 3e-7
TOOLS = [{"type": "function", "function": {"name": "w3", "description": words(9, seed=3)}}]
TRAINERS = {
    "dpo": (FrozenContextDPOTrainer, FrozenContextDPOConfig, Plain, DPOConfig),
    "kto": (FrozenContextKTOTrainer, FrozenContextKTOConfig, KTOTrainer, KTOConfig),
}


def message(role: str, length: int, seed: int) -> dict[str, str]:
    return {"role": role, "content": words(length, seed=seed) + " "}


def conversations() -> list[dict[str, Any]]:
    """Of several lengths, the second with a system message and an earlier turn."""
    rows = []
    for row, length in enumerate((35, 60, 21, 90)):
        prompt = [message("user", length, row)]
        if row % 2:
            prompt = [message("system", 12, 50), message("user", 5, 51), message("assistant", 4, 52), *prompt]
        rows.append(
            {
                "prompt": prompt,
                "chosen": [message("assistant", 5 + row, 10 + row)],
                "rejected": [message("assistant", 9 - 2 * row, 20 + row)],
            }
        )
    return rows


def implicit(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}


def renamed_tokens() -> list[dict[str, Any]]:
    return [dict(row) for row in as_tokens(pairs())]


# Every format of TRL's documentation, and token ids.
FORMATS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "standard": lambda: list(as_text()),
    "standard, implicit prompt": lambda: [implicit(row) for row in as_text()],
    "conversational": conversations,
    "conversational, implicit prompt": lambda: [implicit(row) for row in conversations()],
    "tools": lambda: [row | {"tools": TOOLS} for row in conversations()],
    "tools as text": lambda: [row | {"tools": json.dumps(TOOLS)} for row in conversations()],
    "template arguments": lambda: [row | {"chat_template_kwargs": {"ending": "w9"}} for row in conversations()],
    "tokenized": renamed_tokens,
}


def unpaired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As KTO's own format has it."""
    return [
        {"label": name == "chosen", "completion": row[name]}
        | {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
        for row in rows
        for name in ("chosen", "rejected")
    ]


def tokenizer_with_tools() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{%- if tools -%}<|im_start|>system {{ tools | tojson }}<|im_end|>{%- endif -%}"
        + CHAT_TEMPLATE.replace(
            "<|im_start|>assistant '", "<|im_start|>assistant ' + (ending + ' ' if ending else '')"
        )
    )
    return tokenizer


def first_step(trainer: type, args: Any, rows: Any) -> dict[str, float]:
    model = tiny_model("llama")
    with in_float64(model) as exact:
        run = train(
            trainer, exact, args, rows, processing_class=tokenizer_with_tools(), peft_config=acting_lora(model)
        )
    return without_timings(run.logs)[0]


def assert_like_trls(method: str, tier: int, rows: Any, folder: Path, **fields: Any) -> None:
    ours, our_config, theirs, their_config = TRAINERS[method]
    # TRL puts all answers that were chosen before those that were rejected.
    fields |= {"max_steps": 1, "per_device_train_batch_size": 4 if method == "dpo" else 8, "learning_rate": 0.0}
    found = first_step(ours, settings(folder / "ours", our_config, tier=tier, **fields), copy.deepcopy(rows))
    expected = first_step(theirs, settings(folder / "theirs", their_config, **fields), rows)
    # A frozen context has another gradient.
    same = expected.keys() - {"grad_norm"} if tier == 2 else expected.keys()
    for key in same:
        assert found[key] == pytest.approx(expected[key], rel=0.0 if tier == 1 else LOGGED), key
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "num_tokens"} <= same


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("tier", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_pairs_is_what_trl_makes_of_it(name: str, tier: int, streams: bool, tmp_path: Path) -> None:
    rows = Dataset.from_list(FORMATS[name]())
    assert_like_trls("dpo", tier, rows.to_iterable_dataset() if streams else rows, tmp_path)


@pytest.mark.parametrize("tier", [1, 2])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "tokenized"])
def test_every_format_of_answers_is_what_trl_makes_of_it(name: str, tier: int, tmp_path: Path) -> None:
    """Pairs are taken apart by TRL."""
    rows = FORMATS[name]()
    assert_like_trls("kto", tier, Dataset.from_list(rows), tmp_path / "pairs")
    if "implicit" not in name:
        assert_like_trls("kto", tier, Dataset.from_list(unpaired(rows)), tmp_path / "unpaired")


def test_a_boundary_inside_of_a_token_is_the_longest_common_prefix(tmp_path: Path) -> None:
    """Where prompt and answer do not tokenise as a prefix: the words of the tokenizer end at a space."""
    rows = [
        {"prompt": f"{words(30, seed=row)}", "chosen": f"3 {words(4, seed=row)}", "rejected": " w5 w6"}
        for row in (1, 2)
    ]
    assert_like_trls("dpo", 2, Dataset.from_list(rows * 2), tmp_path)
    args = settings(tmp_path, verify_context="never")
    run = train(
        FrozenContextDPOTrainer,
        tiny_model("llama"),
        args,
        Dataset.from_list(rows),
        peft_config=acting_lora(tiny_model("llama")),
    )
    assert [len(row["prompt_ids"]) for row in run.trainer.train_dataset] == [29, 29]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt_ids": []}, r"Sample 1 of the train dataset has an empty prompt"),
    "same answers": (
        {"chosen_ids": [7, 8], "rejected_ids": [7, 8]},
        r"Sample 1 of the train dataset has the same tokens",
    ),
    "no answer": ({"rejected_ids": []}, r"Sample 1 of the train dataset has an empty answer \(`rejected_ids`\)"),
    "too long": ({"prompt_ids": [9] * 4095}, r"Sample 1 of the train dataset has 4\d\d\d tokens .* 4096 positions"),
}


@pytest.mark.parametrize("tier", [1, 2])
@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_cannot_be_trained_is_named(name: str, tier: int, tmp_path: Path) -> None:
    change, match = WRONG[name]
    rows = renamed_tokens()
    rows[1] |= change
    given = {"processing_class": word_tokenizer(), "peft_config": acting_lora(tiny_model("llama"))}
    with pytest.raises(ValueError, match=match):
        FrozenContextDPOTrainer(
            tiny_model("llama"), args=settings(tmp_path, tier=tier), train_dataset=Dataset.from_list(rows), **given
        )
    if name != "too long":
        stream = IterableDataset.from_generator(lambda: iter(rows))
        trainer = FrozenContextDPOTrainer(
            tiny_model("llama"), args=settings(tmp_path, tier=tier, max_steps=2), train_dataset=stream, **given
        )
        with pytest.raises(ValueError, match=match):
            trainer.train()


def test_images_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list([row | {"images": [0]} for row in as_text()])
    with pytest.raises(ValueError, match="image column"):
        FrozenContextDPOTrainer(tiny_model("llama"), args=settings(tmp_path), train_dataset=rows)


@pytest.mark.parametrize(("max_length", "kept"), [(100, [40, 65, 23, 93]), (30, [21, 27, 18, 23])])
def test_max_length_drops_the_oldest_tokens_of_prompts(max_length: int, kept: list[int], tmp_path: Path) -> None:
    rows, chosen = pairs(), [6, 3, 12, 1]
    trainer = FrozenContextDPOTrainer(
        tiny_model("llama"),
        args=settings(tmp_path, max_length=max_length),
        train_dataset=as_tokens(rows),
        processing_class=word_tokenizer(),
        peft_config=acting_lora(tiny_model("llama")),
    )
    prompts = trainer.train_dataset["prompt_ids"]
    assert [len(prompt) for prompt in prompts] == kept
    assert [len(answer) for answer in trainer.train_dataset["chosen_ids"]] == chosen
    for row, prompt in zip(rows, prompts, strict=True):
        assert prompt == row.prompt[-len(prompt) :].tolist()
    with pytest.raises(
        ValueError, match=r"Sample 2 of the train dataset has an answer of 13 tokens .*`max_length=10`"
    ):
        FrozenContextDPOTrainer(
            tiny_model("llama"),
            args=settings(tmp_path, max_length=10),
            train_dataset=as_tokens(rows),
            processing_class=word_tokenizer(),
        )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"decision_mode": "turns"}, "one decision, whatever turns"),
        ({"use_liger_kernel": True}, "other kernels into the layers"),
        ({"truncation_mode": "keep_end"}, "an answer is never cut"),
        ({"neftune_noise_alpha": 5.0}, "adds noise to the embeddings"),
        ({"sequence_chunk_size": 8, "padding_free": True}, "puts several into one row"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "same length"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_a_setting_that_would_not_be_what_it_says_is_refused(fields: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        settings(tmp_path, **fields)

# SPDX-License-Identifier: Apache-2.0
"""Margins against plain forwards over whole sequences, with the instructions and without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from frozen_peft.evaluation import Candidate, DecisionMargin, PromptRow, load_model
from tests.evaluation.checkpoint import write_checkpoint
from tests.tiny_models import add_lora

SYSTEM = {"role": "system", "content": "Take whatever road you are given."}
USER = {"role": "user", "content": "Take the left road. "}
# With the instructions, and without.
PROMPTS: list[tuple[Any, Any]] = [
    ([SYSTEM, USER], [USER]),
    ([{**USER, "content": "Agree. Right?"}], [{**USER, "content": "Right?"}]),
    ("Agree with me. The road is:\n", "The road is:\n"),
]
TEXTS = ["ok, taking the left road", "no", "left \u00e9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def row(index: int) -> PromptRow:
    prompt, stripped = PROMPTS[index]
    return PromptRow(index, f"p.jsonl, line {index + 1}", {"prompt": prompt}, prompt, stripped, (0,))


def plain_margin(folder: Path, adapter: Path | None, index: int, text: str) -> float:
    """The definition, one whole sequence at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    totals = []
    for prompt in PROMPTS[index]:
        if isinstance(prompt, str):
            before, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + text + "<|im_end|>")["input_ids"]
        else:
            options: dict[str, Any] = {"return_dict": False}
            before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
            whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], **options)
        assert whole[: len(before)] == before
        with torch.no_grad():
            logprobs = model(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
        predicted = [float(logprobs[place - 1, whole[place]]) for place in range(len(before), len(whole))]
        totals.append(sum(predicted) / len(predicted))
    return totals[0] - totals[1]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_margins_are_those_of_plain_forwards(folder: Path, tmp_path: Path, with_adapter: bool) -> None:
    adapter = tmp_path if with_adapter else None
    if with_adapter:
        add_lora(load_model(str(folder))[0]).save_pretrained(tmp_path)
    model, tokenizer = load_model(str(folder), adapter=str(adapter) if adapter else None)
    pairs = [(index, text) for index in range(len(PROMPTS)) for text in TEXTS]
    candidates = [Candidate(index, number, 0, text, None, "stop") for number, (index, text) in enumerate(pairs)]
    rows = [row(index) for index, _ in pairs]
    found = DecisionMargin(model, tokenizer, batch_size=4).measure(rows, candidates)
    expected = [plain_margin(folder, adapter, index, text) for index, text in pairs]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert max(map(abs, expected)) > 0.1
    assert DecisionMargin(model, tokenizer).measure(rows[::-1], candidates[::-1]) == pytest.approx(
        found[::-1], abs=1e-6
    )


def test_other_tokens_without_the_instructions_have_no_margin(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    # "ro|ad" is one token where the text before it is empty, and two behind what ends in its first half.
    prompt = "Take the left ro"
    strange = PromptRow(0, "p.jsonl, line 1", {"prompt": prompt}, prompt, "Take the left ", (0,))
    assert tokenizer.tokenize("Take the left road") != [*tokenizer.tokenize(prompt), *tokenizer.tokenize("ad")]
    with pytest.raises(ValueError, match=r"p.jsonl, line 1, candidate 0 has other tokens with the instructions"):
        DecisionMargin(model, tokenizer).measure([strange], [Candidate(0, 0, 0, "ad", None, "stop")])

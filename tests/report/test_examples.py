# SPDX-License-Identifier: Apache-2.0
"""Decisions side by side are those of greedy decoding by plain forwards, and what cannot be had is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import PeftModel

from frozen_peft.adapters import activated
from frozen_peft.data import strip_instructions
from frozen_peft.data.rows import dump_row
from frozen_peft.report.examples import ExampleSettings, make_examples
from tests.tiny_models import add_lora, tiny_model
from tests.training.runs import word_tokenizer, words

TOKENIZER = word_tokenizer()
STOP = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def row(seed: int, length: int = 20) -> dict[str, Any]:
    prompt = [{"role": "system", "content": f"w1 <instruction>{words(3, seed=seed)}</instruction>"}]
    prompt += [{"role": "user", "content": words(length + seed, seed=seed)}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": words(3, seed=-seed - 1)}]}


ROWS = [row(seed) for seed in range(9)]
STRIPPED = [strip_instructions(item) for item in ROWS]


@pytest.fixture(scope="module")
def model() -> PeftModel:
    # Adapters large enough to change what is decided.
    model = add_lora(tiny_model("qwen3_5_text"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(20)
    return model


def greedy(model: torch.nn.Module, prompt: list[dict[str, str]], limit: int) -> dict[str, Any]:
    """By one plain forward over everything for each token."""
    tokens = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    new: list[int] = []
    model.eval()
    with torch.no_grad():
        while len(new) < limit and STOP not in new:
            logits = model(input_ids=torch.tensor([tokens + new]), use_cache=False).logits[0, -1]
            new.append(int(logits.argmax()))
    finished = STOP in new
    text = TOKENIZER.decode(new[:-1] if finished else new)
    return {"text": text, "finished": finished}


def test_decisions_are_those_of_plain_forwards(model: PeftModel) -> None:
    found = make_examples(model.train(), TOKENIZER, Dataset.from_list(STRIPPED), ExampleSettings(3, 6))
    assert found["notes"] == []
    assert [example["sample"] for example in found["examples"]] == [0, 3, 6]
    assert all(module.training for module in model.modules())
    for example in found["examples"]:
        full, stripped = ROWS[example["sample"]], STRIPPED[example["sample"]]
        with model.disable_adapter():
            expected = {
                "base": greedy(model, stripped["prompt"], 6),
                "base_instructed": greedy(model, full["prompt"], 6),
            }
        expected["trained"] = greedy(model, stripped["prompt"], 6)
        model.train()
        assert example["decisions"] == expected
        assert example["expected"] == full["completion"][0]["content"]
        assert example["instructions"] == f"<instruction>{words(3, seed=example['sample'])}</instruction>"
        assert example["context_end"] == f"system: w1 \nuser: {full['prompt'][1]['content']}"
        length = len(TOKENIZER.apply_chat_template(stripped["prompt"], add_generation_prompt=True, return_dict=False))
        assert example["context_tokens"] == length
    # The adapters matter to this test.
    decisions = [example["decisions"] for example in found["examples"]]
    assert any(item["trained"] != item["base"] for item in decisions)


def test_of_a_stream_the_first_are_taken(model: PeftModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(map(dump_row, STRIPPED)))
    stream = load_dataset("json", data_files=str(path), split="train", streaming=True)
    found = make_examples(model, TOKENIZER, stream, ExampleSettings(2, 2))
    assert [example["sample"] for example in found["examples"]] == [0, 1]


def test_long_and_unfit_samples_are_passed_over(model: PeftModel) -> None:
    rows = [row(0, 200), {"text": "w1 w2"}, *ROWS[:2], {"prompt": "w1 w2", "completion": " w3"}]
    found = make_examples(model, TOKENIZER, rows, ExampleSettings(5, 2, max_context_tokens=100))
    assert [example["sample"] for example in found["examples"]] == [2, 3, 4]
    assert [example["decisions"]["base_instructed"] for example in found["examples"]] == [None] * 3
    assert found["notes"] == [
        "1 samples passed over: their prompts have more than 100 tokens",
        "1 samples passed over: a sample has the column `prompt` or `messages`; found `text`",
        "base with instructions: no sample has the column `stripped`, which says what they were",
    ]
    assert found["examples"][2]["context_end"] == "w1 w2"
    assert found["examples"][2]["expected"] == " w3"


def test_trained_weights_have_no_base_left() -> None:
    found = make_examples(tiny_model("llama"), TOKENIZER, STRIPPED, ExampleSettings(1, 2))
    assert found["notes"] == ["base: the weights themselves were trained, so the base is no longer there"]
    (example,) = found["examples"]
    assert example["decisions"]["base"] is None
    assert example["decisions"]["trained"] == greedy(tiny_model("llama"), STRIPPED[0]["prompt"], 2)


def test_without_samples_that_is_said(model: PeftModel) -> None:
    assert make_examples(model, TOKENIZER, None, ExampleSettings(2))["notes"] == ["there are no held-out samples"]
    assert make_examples(model, TOKENIZER, ROWS, ExampleSettings(0)) == {
        "format": 1,
        "decoding": "greedy",
        "max_new_tokens": 64,
        "notes": [],
        "examples": [],
    }


def test_what_cannot_be_decoded_is_said(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr("frozen_peft.report.examples.LocalSampler", fail)
    found = make_examples(model, TOKENIZER, ROWS[:1], ExampleSettings(1, 2))
    assert "base: not generated: no room" in found["notes"]
    assert found["examples"][0]["decisions"] == {"base": None, "base_instructed": None, "trained": None}


def test_an_activated_adapter_decides_as_it_is_served() -> None:
    """Against plain forwards with the adapter on from the invocation, where PEFT has it."""
    torch.manual_seed(0)
    model = add_lora(tiny_model("llama"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(20)
    activated.activate_at_invocation(model, activated.find_invocation(TOKENIZER, None))
    found = make_examples(model, TOKENIZER, STRIPPED, ExampleSettings(2, 4))
    assert found["notes"] == []
    for example in found["examples"]:
        prompt = STRIPPED[example["sample"]]["prompt"]
        assert example["decisions"]["trained"] == greedy(model, prompt, 4)
        with model.disable_adapter():
            assert example["decisions"]["base"] == greedy(model, prompt, 4)


@pytest.mark.parametrize(
    ("fields", "message"), [((-1,), "`num_examples` must be 0"), ((1, 0), "`max_example_tokens`")]
)
def test_settings_out_of_range(fields: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExampleSettings(*fields)

# SPDX-License-Identifier: Apache-2.0
"""Every dataset type of `SFTTrainer`, and every way to name a model, trains over frozen contexts.

`SFTTrainer` prepares the same dataset; what it would train on goes through plain forwards with a stop-gradient.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch import nn
from transformers import ProcessorMixin
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextTrainer, lora_config
from tests.reference import Sample, reference_gradients, worst_gradient_error
from tests.tiny_models import tiny_model
from tests.training.runs import (
    RESPONSE,
    Run,
    adapted,
    as_dataset,
    assert_trained_as,
    batches,
    config,
    fresh_lora,
    reference_sgd,
    samples,
    train,
    train_in_float64,
    trained_weights,
    word_tokenizer,
    words,
)

# As in test_frozen_gradient: three steps with gradients exact to 1e-5.


def message(role: str, count: int, seed: int) -> dict[str, str]:
    return {"role": role, "content": words(count, seed=seed)}


def conversation(index: int, turns: int = 1) -> list[dict[str, str]]:
    messages = [message("system", 20 + 3 * index, index)]
    for turn in range(turns):
        messages += [message("user", 4, 10 * index + turn), message("assistant", 5, 100 * index + turn)]
    return messages


TEXT = Dataset.from_list([{"text": words(21 + 2 * index, seed=index)} for index in range(4)])
PROMPT_COMPLETION = Dataset.from_list(
    [{"prompt": words(30 + 4 * i, seed=i), "completion": " " + words(6 + i, seed=9 + i)} for i in range(4)]
)
DATASETS: dict[str, tuple[Dataset, dict[str, Any]]] = {
    "language modelling": (TEXT, {}),
    "prompt and completion": (PROMPT_COMPLETION, {}),
    "prompt and completion, loss on both": (PROMPT_COMPLETION, {"completion_only_loss": False}),
    "conversational prompt and completion": (
        Dataset.from_list([{"prompt": conversation(i)[:2], "completion": conversation(i)[2:]} for i in range(4)]),
        {},
    ),
    "conversations, assistant only": (
        Dataset.from_list([{"messages": conversation(i)} for i in range(4)]),
        {"assistant_only_loss": True},
    ),
    "conversations of several turns, assistant only": (
        Dataset.from_list([{"messages": conversation(i, turns=1 + i % 3)} for i in range(4)]),
        {"assistant_only_loss": True},
    ),
    "conversations, loss on everything": (Dataset.from_list([{"messages": conversation(i)} for i in range(4)]), {}),
    "tokens and labels": (as_dataset(samples()), {}),
    "tokens and completion mask": (
        Dataset.from_dict(
            {
                "input_ids": [row.input_ids.tolist() for row in samples()],
                "completion_mask": [(row.labels != -100).long().tolist() for row in samples()],
            }
        ),
        {"completion_only_loss": True},
    ),
}

WITHOUT_CONTEXT = ("language modelling", "prompt and completion, loss on both", "conversations, loss on everything")


def prepared(dataset: Any, folder: Path, *, formatting_func: Any = None, **fields: Any) -> list[Sample]:
    """What `SFTTrainer` makes of a dataset."""
    trainer = SFTTrainer(
        tiny_model("llama"),
        config(folder, SFTConfig, **fields),
        train_dataset=dataset,
        processing_class=word_tokenizer(),
        formatting_func=formatting_func,
    )
    return [Sample(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in trainer.train_dataset]


def assert_trained_on(run: Run, model: nn.Module, rows: list[Sample]) -> None:
    expected = reference_sgd(model, batches(rows, 2, 3))
    assert_trained_as(run, model, expected)


@pytest.mark.parametrize("kind", DATASETS)
def test_every_dataset_type(kind: str, tmp_path: Path) -> None:
    dataset, fields = DATASETS[kind]
    rows = prepared(dataset, tmp_path, **fields)
    has_context = [row.boundary > 0 for row in rows]
    assert any(has_context) == (kind not in WITHOUT_CONTEXT)
    model = adapted("llama")
    run = train_in_float64(FrozenContextTrainer, model, config(tmp_path, tier=2, **fields), dataset)
    assert_trained_on(run, model, rows)


@pytest.mark.parametrize("kind", ["prompt and completion", "tokens and labels"])
def test_a_stream(kind: str, tmp_path: Path) -> None:
    dataset, fields = DATASETS[kind]
    stream = dataset.to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    model = adapted("llama")
    run = train_in_float64(FrozenContextTrainer, model, config(tmp_path, **fields), stream)
    assert_trained_on(run, model, prepared(dataset, tmp_path, **fields))


def test_a_stream_of_evaluation_samples(tmp_path: Path) -> None:
    dataset = as_dataset(samples())
    losses = []
    for eval_dataset in (dataset, dataset.to_iterable_dataset()):
        trainer = FrozenContextTrainer(
            adapted("llama"),
            config(tmp_path),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=word_tokenizer(),
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_a_formatting_function(tmp_path: Path) -> None:
    def join(row: dict[str, str]) -> str:
        return row["prompt"] + row["completion"]

    rows = prepared(PROMPT_COMPLETION, tmp_path, formatting_func=join, completion_only_loss=False)
    assert len(rows) == len(PROMPT_COMPLETION)
    model = adapted("llama")
    arguments = config(tmp_path, completion_only_loss=False)
    run = train_in_float64(FrozenContextTrainer, model, arguments, PROMPT_COMPLETION, formatting_func=join)
    assert_trained_on(run, model, rows)


def test_a_prepared_dataset_is_taken_as_it_is(tmp_path: Path) -> None:
    model = adapted("llama")
    arguments = config(tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
    run = train_in_float64(FrozenContextTrainer, model, arguments, as_dataset(samples()))
    assert_trained_on(run, model, samples())


def test_packed_samples_without_context_train_as_with_sft_trainer(tmp_path: Path) -> None:
    fields = {"packing": True, "max_length": 64, "packing_strategy": "wrapped"}
    model = adapted("llama")
    ours = train_in_float64(FrozenContextTrainer, model, config(tmp_path, tier=2, **fields), TEXT)
    theirs = train_in_float64(SFTTrainer, model, config(tmp_path, SFTConfig, **fields), TEXT)
    assert_trained_as(ours, model, theirs.weights)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of ordinary checkpoints with their tokenizer."""
    folders = {}
    for name in ("llama", "qwen3_5_text", "qwen3_5"):
        folder = tmp_path_factory.mktemp(name)
        tiny_model(name).save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def last_names(weights: dict[str, torch.Tensor]) -> set[str]:
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in weights}


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("llama", "LlamaForCausalLM"),
        ("qwen3_5_text", "Qwen3_5ForCausalLM"),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    ],
)
def test_a_model_by_its_path(name: str, model_class: str, saved: dict[str, str], tmp_path: Path) -> None:
    run = train(
        FrozenContextTrainer,
        saved[name],
        config(tmp_path, max_steps=1, model_init_kwargs={"dtype": "float32"}),
        PROMPT_COMPLETION,
        processing_class=None if name != "qwen3_5" else word_tokenizer(),
        peft_config=lora_config(saved[name], r=2),
    )
    model = run.trainer.model
    assert type(model.get_base_model()).__name__ == model_class
    assert {"q_proj", "o_proj"} <= last_names(run.weights) <= {*RESPONSE}
    # The same adapters before the step, which moved only `lora_B` away from zero.
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.zero_()
    rows = prepared(PROMPT_COMPLETION, tmp_path)[:2]
    assert worst_gradient_error(run.gradients[0], reference_gradients(model, rows)) <= 1e-5


def test_a_model_and_a_peft_config(tmp_path: Path) -> None:
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    run = train(
        FrozenContextTrainer, tiny_model("qwen3_5_text"), config(tmp_path), PROMPT_COMPLETION, peft_config=peft_config
    )
    assert last_names(run.weights) == {"q_proj", "o_proj"}
    assert all(not torch.equal(weight, torch.zeros(())) for weight in run.weights.values())


def test_a_peft_model_keeps_its_adapters(tmp_path: Path) -> None:
    model = fresh_lora(tiny_model("qwen3_5_text"))
    before = trained_weights(model)
    run = train(FrozenContextTrainer, model, config(tmp_path), PROMPT_COMPLETION)
    assert run.trainer.model is model
    assert run.weights.keys() == before.keys()
    assert all(not torch.equal(run.weights[name], before[name]) for name in before if "lora_B" in name)


class TextProcessor(ProcessorMixin):
    """What a vision-language checkpoint brings in place of a tokenizer, reduced to text."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None):
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text: str, **kwargs: Any) -> Any:
        # A processor always gives a batch.
        return self.tokenizer([text], **kwargs)


def test_a_processor_in_place_of_a_tokenizer(tmp_path: Path) -> None:
    dataset = PROMPT_COMPLETION
    model = adapted("qwen3_5")
    processor = TextProcessor(word_tokenizer())
    run = train_in_float64(FrozenContextTrainer, model, config(tmp_path), dataset, processing_class=processor)
    assert_trained_on(run, model, prepared(dataset, tmp_path))

# SPDX-License-Identifier: Apache-2.0
"""What cannot be trained as asked is refused before training starts, by the name of the sample or field."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from transformers import (
    AutoModelForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from frozen_peft import (
    ContextMismatchError,
    FrozenContextTrainer,
    UnsupportedArchitectureError,
    lora_config,
)
from frozen_peft.context import ContextEncoder
from tests.reference import Sample, random_sample
from tests.tiny_models import tiny_model
from tests.training.runs import IGNORED, adapted, as_dataset, config, samples, train, word_tokenizer, words

ROWS = samples()
UNSUPERVISED = Sample(random_sample(20, 6).input_ids, torch.full((26,), IGNORED))


def trainer(
    dataset: Any, folder: Path, *, model: Any = None, eval_dataset: Any = None, **fields: Any
) -> FrozenContextTrainer:
    return FrozenContextTrainer(
        adapted("llama") if model is None else model,
        config(folder, **fields),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=word_tokenizer(),
    )


@pytest.mark.parametrize("tier", [1, 2])
def test_a_sample_without_a_supervised_label(tier: int, tmp_path: Path) -> None:
    rows = [*ROWS[:3], UNSUPERVISED, *ROWS[3:]]
    with pytest.raises(ValueError, match=r"Sample 3 of the train dataset has no supervised label in its 26 tokens"):
        trainer(as_dataset(rows), tmp_path, tier=tier)
    with pytest.raises(ValueError, match=r"Sample 1 of the mine dataset has no supervised label"):
        trainer(as_dataset(ROWS), tmp_path, eval_dataset={"mine": as_dataset([ROWS[0], UNSUPERVISED])})


def test_a_sample_without_a_supervised_label_in_a_stream(tmp_path: Path) -> None:
    stream = as_dataset([*ROWS[:2], UNSUPERVISED]).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"Sample 2 of the train dataset has no supervised label"):
        trainer(stream, tmp_path).train()


def test_a_sample_without_a_supervised_label_in_a_prepared_dataset(tmp_path: Path) -> None:
    fields = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match=r"Sample 1 of the train dataset has no supervised label"):
        trainer(as_dataset([ROWS[0], UNSUPERVISED]), tmp_path, **fields)


def test_an_empty_completion_has_a_decision_of_its_end(tmp_path: Path) -> None:
    dataset = Dataset.from_list([{"prompt": words(20, seed=1), "completion": ""}])
    prepared = trainer(dataset, tmp_path).train_dataset[0]
    assert [label for label in prepared["labels"] if label != IGNORED] == [word_tokenizer().eos_token_id]


def test_a_decision_longer_than_max_length(tmp_path: Path) -> None:
    rows = [ROWS[1], random_sample(30, 15)]
    message = r"Sample 1 of the train dataset has a decision of 15 tokens, .*longer than `max_length=12`"
    with pytest.raises(ValueError, match=message):
        trainer(as_dataset(rows), tmp_path, max_length=12)


@pytest.mark.parametrize("tier", [1, 2])
def test_an_empty_dataset(tier: int, tmp_path: Path) -> None:
    features = Features({"input_ids": Sequence(Value("int64")), "labels": Sequence(Value("int64"))})
    empty = Dataset.from_dict({"input_ids": [], "labels": []}, features=features)
    with pytest.raises(ValueError, match=r"The train dataset is empty"):
        trainer(empty, tmp_path, tier=tier)
    with pytest.raises(ValueError, match=r"The train dataset is empty"):
        trainer(IterableDataset.from_generator(lambda: iter(()), features=features), tmp_path, tier=tier)
    with pytest.raises(ValueError, match=r"The eval dataset is empty"):
        trainer(as_dataset(ROWS), tmp_path, eval_dataset=empty, tier=tier)


@pytest.mark.parametrize("tier", [1, 2])
def test_a_context_beyond_the_models_positions(tier: int, tmp_path: Path) -> None:
    model = adapted("llama", max_position_embeddings=60)
    message = r"Sample 2 of the train dataset has 73 tokens.* 63 of them context.* the model has 60 positions"
    with pytest.raises(ValueError, match=message):
        trainer(as_dataset(ROWS), tmp_path, model=model, tier=tier)


@pytest.mark.parametrize("tier", [1, 2])
@pytest.mark.parametrize("limit", [{"max_context_length": 40}, {"max_length": 50}], ids=str)
def test_a_limit_on_the_context_brings_it_within_the_models_positions(limit: dict, tier: int, tmp_path: Path) -> None:
    model = adapted("llama", max_position_embeddings=60)
    run = train(FrozenContextTrainer, model, config(tmp_path, tier=tier, **limit), as_dataset(ROWS))
    assert len(run.losses) == 3


def test_a_limit_on_the_context_that_is_not_enough(tmp_path: Path) -> None:
    model = adapted("llama", max_position_embeddings=60)
    with pytest.raises(ValueError, match=r"Sample 2 of the train dataset .* the model has 60 positions"):
        trainer(as_dataset(ROWS), tmp_path, model=model, max_context_length=55)


@pytest.mark.parametrize("fields", [{"padding_free": True}, {"packing": True, "max_length": 128}], ids=str)
def test_contexts_in_one_row(fields: dict, tmp_path: Path) -> None:
    flash = adapted("llama")
    message = (
        r"Sample 0 of the train dataset has a context of \d+ tokens, and `packing` and `padding_free`.*"
        r"Set both to False .*or train with `tier: 1`"
    )
    with pytest.raises(ValueError, match=message):
        trainer(as_dataset(ROWS), tmp_path, model=flash, shuffle_dataset=False, **fields)


def test_images(tmp_path: Path) -> None:
    dataset = Dataset.from_list([{"prompt": words(5, seed=0), "completion": words(3, seed=1), "images": [[0]]}])
    with pytest.raises(ValueError, match=r"The train dataset has an image column, which frozen contexts do not carry"):
        trainer(dataset, tmp_path)


def test_a_preset_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"beta"):
        lora_config(tiny_model("llama"), roles=["beta"])


@pytest.mark.parametrize("roles", [["beta"], ["no_such_role"]])
def test_an_adapter_of_unknown_or_absent_roles(roles: list[str]) -> None:
    with pytest.raises(ValueError, match=roles[0]):
        lora_config(tiny_model("llama"), roles=roles)


def test_a_model_without_a_cache(tmp_path: Path) -> None:
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=97, n_positions=128, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedArchitectureError, match=r"`openai-gpt`\) takes no cache.*`tier: 1`"):
        trainer(as_dataset(ROWS), tmp_path, model=model)
    encoder = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedArchitectureError, match=r"T5ForConditionalGeneration .*`tier: 1`"):
        trainer(as_dataset(ROWS), tmp_path, model=encoder)


@pytest.mark.parametrize("name", ["jamba", "recurrent_gemma"])
def test_an_architecture_that_continues_inexactly(name: str, tmp_path: Path) -> None:
    with pytest.raises(ContextMismatchError, match=rf"does not continue `{name}` exactly.*`tier: 1`"):
        trainer(as_dataset(ROWS), tmp_path, model=tiny_model(name))


def test_an_architecture_that_continues_inexactly_trains_with_tier_1(tmp_path: Path) -> None:
    run = train(FrozenContextTrainer, tiny_model("jamba"), config(tmp_path, tier=1, max_steps=1), as_dataset(ROWS))
    assert len(run.losses) == 1


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("tier", [1, 2])
def test_weights_that_are_offloaded(tier: int, llama_folder: Path, tmp_path: Path) -> None:
    parts = (
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{n}" for n in range(4)),
    )
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    loading = {"device_map": places, "offload_folder": str(tmp_path / "away")}
    model = AutoModelForCausalLM.from_pretrained(llama_folder, **loading)
    message = r"9 weights of LlamaForCausalLM, such as `model\.layers\.1\..*offloaded.*without a device map"
    with pytest.raises(ValueError, match=message):
        trainer(as_dataset(ROWS), tmp_path, model=model, tier=tier)
    with pytest.raises(ValueError, match=message):
        trainer(as_dataset(ROWS), tmp_path, model=str(llama_folder), tier=tier, model_init_kwargs=loading)
    with pytest.raises(ValueError, match=message):
        ContextEncoder(model)


def test_a_device_map_that_offloads_nothing(llama_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder, device_map={"": "cpu"})
    run = train(FrozenContextTrainer, model, config(tmp_path, tier=2, max_steps=1), as_dataset(ROWS))
    assert len(run.losses) == 1


def test_contexts_without_adapters_need_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`context_adapters=False` .*this model has none. Pass `peft_config`"):
        trainer(as_dataset(ROWS), tmp_path, model=tiny_model("llama"), context_adapters=False)


def test_a_collator_that_adds_what_cannot_be_cut(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([rows[0]["input_ids"]])
        return {"input_ids": ids, "labels": torch.tensor([rows[0]["labels"]]), "token_type_ids": torch.zeros_like(ids)}

    own = FrozenContextTrainer(
        adapted("llama"),
        config(tmp_path),
        data_collator=collate,
        train_dataset=as_dataset(ROWS),
        processing_class=word_tokenizer(),
    )
    with pytest.raises(ValueError, match=r"The collator put `token_type_ids` into a batch.*`data_collator`"):
        own.train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tier": 4}, r"`tier` must be 1, 2 or 3, found 4"),
        ({"gradient_horizon": -2}, r"`gradient_horizon` must be -1, 0 or a number of tokens, found -2"),
        ({"prefill_chunk_size": -1}, r"`prefill_chunk_size` must be 0 or more tokens, found -1"),
        ({"max_context_length": 0}, r"`max_context_length` must be 1 token or more, or None, found 0"),
        ({"max_length": 0}, r"`max_length` must be 1 token or more, or None, found 0"),
        ({"checkpoint_every": 0}, r"`checkpoint_every` must be 1 layer or more, found 0"),
        ({"max_context_staleness": -1}, r"`max_context_staleness` must be 0 or more, found -1"),
        ({"verify_context": "sometimes"}, r"`verify_context` must be one of first_batch, always, never"),
        ({"decision_mode": "head"}, r"`decision_mode` must be one of tail, turns"),
        ({"checkpoint_every": 2, "gradient_checkpointing": False}, r"`checkpoint_every=2` has no effect with"),
    ],
    ids=str,
)
def test_a_field_out_of_range(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)

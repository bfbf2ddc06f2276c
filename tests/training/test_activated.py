# SPDX-License-Identifier: Apache-2.0
"""`context_adapters=False` from data to a served adapter: PEFT's activated LoRA, trained on frozen contexts."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from frozen_peft import FrozenContextTrainer
from tests.reference import IGNORED, Sample, random_sample, reference_logprobs, token_logprobs
from tests.tiny_models import tiny_model
from tests.training.runs import (
    adapted,
    as_dataset,
    assert_trained_as,
    batches,
    config,
    fresh_lora,
    reference_sgd,
    train,
    train_in_float64,
    trained_weights,
    word_tokenizer,
    words,
    worst_update_error,
)

TOLERANCE = 1e-4
# Words of the tokenizer, which other rows hold none of.
INVOCATION = "<|im_start|> assistant"
TOKENS = tuple(word_tokenizer()(INVOCATION, add_special_tokens=False)["input_ids"])
SHAPES = ((30, 7), (66, 2), (63, 10), (9, 3), (41, 12), (17, 5))


class Invoked(Sample):
    """A sample whose decision begins with the invocation, the tokens before its first label."""

    @property
    def boundary(self) -> int:
        return super().boundary + 1 - len(TOKENS)


def invoked(boundary: int, length: int, seed: int) -> Invoked:
    """So many tokens of context, the invocation, and so many labels."""
    row = random_sample(boundary, length, seed=seed, low=10)
    input_ids = torch.cat([row.context, torch.tensor(TOKENS), row.decision])
    labels = input_ids.clone()
    labels[: boundary + len(TOKENS)] = IGNORED
    return Invoked(input_ids, labels)


ROWS = [invoked(*shape, seed) for seed, shape in enumerate(SHAPES)]


def arguments(folder: Path, **fields: object):
    return config(folder, context_adapters=False, **fields)


@pytest.mark.parametrize("fields", [{}, {"context_cache_size": "1GiB"}, {"prefill_chunk_size": 7}], ids=str)
@pytest.mark.parametrize("name", ["qwen3_5_text", "llama"])
def test_contexts_are_encoded_without_adapters(name: str, fields: dict, tmp_path: Path) -> None:
    model = adapted(name)
    run = train_in_float64(FrozenContextTrainer, model, arguments(tmp_path, **fields), as_dataset(ROWS))
    assert_trained_as(run, model, reference_sgd(model, batches(ROWS, 2, 3), context_adapters=False))
    with_adapters = reference_sgd(model, batches(ROWS, 2, 3))
    assert worst_update_error(run.weights, with_adapters, trained_weights(model)) > 1e-3


@pytest.mark.parametrize("name", ["qwen3_5_text", "llama", "gemma3_text"])
def test_pefts_own_forward_of_the_saved_adapter(name: str, tmp_path: Path) -> None:
    """Loaded by PEFT alone, over whole sequences, it gives the log-probabilities that training saw."""
    model = fresh_lora(tiny_model(name), init_lora_weights=False)
    run = train(FrozenContextTrainer, model, arguments(tmp_path), as_dataset(ROWS))
    run.trainer.save_model(str(tmp_path / "adapter"))
    saved = LoraConfig.from_pretrained(tmp_path / "adapter")
    assert tuple(saved.alora_invocation_tokens) == TOKENS
    served = PeftModel.from_pretrained(tiny_model(name), tmp_path / "adapter").eval()
    # PEFT's hooks for activated LoRA allow one forward per backward under checkpointing.
    run.trainer.model.get_base_model().gradient_checkpointing_disable()
    for row in ROWS:
        expected = reference_logprobs(
            fresh_copy(run.trainer.model, name), row.input_ids, row.boundary, context_adapters=False
        )
        with torch.no_grad():
            logits = served(input_ids=row.input_ids[None]).logits[0]
        assert torch.allclose(token_logprobs(logits[row.boundary :], row.decision), expected, atol=TOLERANCE)
        loss = evaluated_loss(run.trainer, row)
        assert loss == pytest.approx(-float(expected[len(TOKENS) - 1 :].mean()), abs=TOLERANCE)
        # The trained model itself is served the same way.
        with torch.no_grad():
            assert torch.allclose(run.trainer.model(input_ids=row.input_ids[None]).logits[0], logits, atol=TOLERANCE)


def fresh_copy(model: PeftModel, name: str) -> PeftModel:
    """The trained weights as plain LoRA, in a model that knows nothing of invocations."""
    plain = fresh_lora(tiny_model(name))
    weights = trained_weights(model)
    for weight_name, weight in plain.named_parameters():
        if weight.requires_grad:
            weight.data.copy_(weights[weight_name])
    return plain.eval()


def evaluated_loss(trainer: FrozenContextTrainer, row: Sample) -> float:
    return trainer.evaluate(as_dataset([row]))["eval_loss"]


def test_evaluation_between_steps_with_checkpointing(tmp_path: Path) -> None:
    """PEFT's hooks would refuse a second forward before a backward."""
    run = train(
        FrozenContextTrainer,
        adapted(),
        arguments(tmp_path, eval_strategy="steps", eval_steps=1, gradient_checkpointing=True),
        as_dataset(ROWS),
        eval_dataset=as_dataset(ROWS),
    )
    assert sum("eval_loss" in entry for entry in run.trainer.state.log_history) == 3


def test_merging_is_refused(tmp_path: Path) -> None:
    run = train(FrozenContextTrainer, adapted("llama"), arguments(tmp_path, max_steps=1), as_dataset(ROWS))
    for safe in (False, True):
        with pytest.raises(ValueError, match=r"`context_adapters=False` cannot be merged: contexts were encoded by"):
            run.trainer.model.merge_and_unload(safe_merge=safe)
    run.trainer.save_model(str(tmp_path / "adapter"))
    with pytest.raises(NotImplementedError, match="aLoRA does not support"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter").merge_and_unload()


def test_the_invocation_is_the_generation_prompt_of_the_chat_template(tmp_path: Path) -> None:
    turns = [("system", 30), ("user", 9), ("assistant", 4), ("user", 20), ("assistant", 6)]
    messages = [{"role": role, "content": words(count, seed=index)} for index, (role, count) in enumerate(turns)]
    data = Dataset.from_list([{"messages": messages}] * 2)
    fields = {"assistant_only_loss": True, "max_steps": 1}
    run = train(FrozenContextTrainer, adapted(), arguments(tmp_path, decision_mode="turns", **fields), data)
    prompt = word_tokenizer()("<|im_start|>assistant ")["input_ids"]
    assert run.trainer.model.peft_config["default"].alora_invocation_tokens == prompt
    with pytest.raises(ValueError, match=r"Sample 0 of .* contains the invocation tokens again.*'turns'"):
        train(FrozenContextTrainer, adapted(), arguments(tmp_path, **fields), data)


def test_the_invocation_of_the_field_or_of_the_adapter(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    data = as_dataset(ROWS)
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template. Set `invocation`"):
        train(FrozenContextTrainer, adapted(), arguments(tmp_path), data, processing_class=tokenizer)
    given = arguments(tmp_path, invocation=INVOCATION, max_steps=1)
    run = train(FrozenContextTrainer, adapted(), given, data, processing_class=tokenizer)
    assert tuple(run.trainer.model.peft_config["default"].alora_invocation_tokens) == TOKENS
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        alora_invocation_tokens=list(TOKENS),
        init_lora_weights=False,
    )
    runs = []
    for fields in ({"peft_config": lora}, {}):
        torch.manual_seed(0)
        model = tiny_model("llama") if fields else get_peft_model(tiny_model("llama"), lora)
        runs.append(
            train(
                FrozenContextTrainer,
                model,
                arguments(tmp_path, max_steps=1),
                data,
                processing_class=tokenizer,
                **fields,
            )
        )
        assert tuple(runs[-1].trainer.model.peft_config["default"].alora_invocation_tokens) == TOKENS
    with pytest.raises(ValueError, match=r"'' has none"):
        train(FrozenContextTrainer, adapted(), arguments(tmp_path, invocation=""), data)


def test_a_decision_that_does_not_begin_with_the_invocation(tmp_path: Path) -> None:
    strays = {
        "other tokens": random_sample(20, 5, low=10),
        "supervised from the start": Sample(ROWS[0].input_ids, ROWS[0].input_ids.clone()),
        "one token short": Sample(ROWS[0].input_ids[31:], ROWS[0].labels[31:]),
    }
    for stray in strays.values():
        for make in (as_dataset, streamed):
            with pytest.raises(
                ValueError, match=r"Sample 2 of the train dataset: .* needs it to begin with the invocation"
            ):
                train(FrozenContextTrainer, adapted(), arguments(tmp_path), make([ROWS[0], ROWS[1], stray, ROWS[2]]))


def streamed(rows: list[Sample]) -> IterableDataset:
    return as_dataset(rows).to_iterable_dataset()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, r"needs an adapter that PEFT can switch on by tokens"),
        ({"bias": "all"}, r"training changes `.*bias` of it. Freeze it"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_switched(lora: dict, message: str, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_model("gpt2"),
        LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True, **lora),
    )
    with pytest.raises(ValueError, match=message):
        train(FrozenContextTrainer, model, arguments(tmp_path), as_dataset(ROWS))


def test_other_kinds_of_adapters(tmp_path: Path) -> None:
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"needs a LoRA adapter, and `peft_config` is a IA3Config"):
        train(FrozenContextTrainer, get_peft_model(tiny_model("llama"), ia3), arguments(tmp_path), as_dataset(ROWS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gradient_horizon": 8}, r"`context_adapters=False` needs `gradient_horizon=0`, found 8"),
        ({"tier": 1}, r"`context_adapters=False` needs `gradient_horizon=0`, found -1"),
    ],
    ids=str,
)
def test_fields_that_contradict(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **fields)
    with pytest.raises(ValueError, match=r"`invocation` is where an adapter is switched on"):
        config(tmp_path, invocation="now")

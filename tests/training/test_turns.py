# SPDX-License-Identifier: Apache-2.0
"""A conversation's turns give the losses and gradients of one sample per supervised span with its full context."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from frozen_peft import FrozenContextTrainer, lora_config, quantization_config
from tests.reference import Sample, negative_log_likelihood, num_labels, reference_gradients, worst_gradient_error
from tests.tiny_models import ARCHITECTURES, add_lora, tiny_model
from tests.training.runs import (
    IGNORED,
    Run,
    adapted,
    as_dataset,
    assert_trained_as,
    batches,
    config,
    reference_sgd,
    train,
    train_in_float64,
    word_tokenizer,
    words,
)

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
# Spans of a conversation as (context tokens before it since the last span, labels): odd ones, of one label, with one
# token between two spans, supervised from the start, with tokens after the last span.
CONVERSATIONS = (
    ((30, 7), (9, 1), (1, 5), (66, 4), (3, 0)),
    ((63, 3), (65, 2)),
    ((0, 4), (20, 6)),
    ((41, 5),),
)


def conversation(spans: tuple[tuple[int, int], ...], seed: int) -> Sample:
    """Random tokens, of which so many are not supervised and so many are, in turn."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for before, supervised in spans:
        labels += [IGNORED] * before + [0] * supervised
    input_ids = torch.randint(3, 95, (len(labels),), generator=generator)
    mask = torch.tensor(labels) == IGNORED
    return Sample(input_ids, input_ids.masked_fill(mask, IGNORED))


def one_sample_per_span(sample: Sample) -> list[Sample]:
    """The same supervision as samples that end with their span; found by walking over the labels."""
    made, position, labels = [], 0, sample.labels.tolist()
    while position < len(labels):
        if labels[position] == IGNORED:
            position += 1
            continue
        stop = position
        while stop < len(labels) and labels[stop] != IGNORED:
            stop += 1
        own = torch.full((stop,), IGNORED)
        own[position:stop] = sample.labels[position:stop]
        made.append(Sample(sample.input_ids[:stop], own))
        position = stop
    return made


ROWS = [conversation(spans, seed) for seed, spans in enumerate(CONVERSATIONS)]


def per_span(rows: list[Sample]) -> list[Sample]:
    return [span for row in rows for span in one_sample_per_span(row)]


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: list[Sample]) -> float:
    spans = per_span(rows)
    losses = [negative_log_likelihood(model(input_ids=s.input_ids[None]).logits[0], s.labels) for s in spans]
    return float(sum(losses) / num_labels(spans))


@pytest.mark.parametrize("max_decisions", [1, 3, 16])
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text"])
def test_turns_train_as_one_sample_per_span(name: str, max_decisions: int, tmp_path: Path) -> None:
    arguments = config(tmp_path, decision_mode="turns", max_decisions_per_forward=max_decisions)
    run = train_in_float64(FrozenContextTrainer, adapted(name), arguments, as_dataset(ROWS))
    expected = reference_sgd(adapted(name), [per_span(batch) for batch in batches(ROWS, 2, 3)])
    assert_trained_as(run, adapted(name), expected)
    assert run.losses[0] == pytest.approx(mean_loss(adapted(name), ROWS[:2]), abs=LOSS_TOLERANCE)


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_accumulation_steps": 2},
        {"prefill_chunk_size": 7},
        {"gradient_checkpointing": False},
        {"context_cache_size": "1MiB"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
    ids=str,
)
def test_fields_that_change_no_gradient(fields: dict, tmp_path: Path) -> None:
    arguments = config(tmp_path, decision_mode="turns", max_decisions_per_forward=2, max_steps=2, **fields)
    size = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    run = train_in_float64(FrozenContextTrainer, adapted(), arguments, as_dataset(ROWS))
    expected = reference_sgd(adapted(), [per_span(batch) for batch in batches(ROWS, size, 2)])
    assert_trained_as(run, adapted(), expected)


# Besides those that are trained above, one of each kind of layer, experts among them; context/test_parity has all.
ONE_OF_A_KIND = ("kimi_linear", "qwen3_5_moe_text", "falcon_h1", "lfm2", "gemma3_text", "gpt_oss", "gpt2")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ONE_OF_A_KIND else pytest.mark.long)
        for name in ARCHITECTURES
        if name not in ("llama", "qwen3_5_text")
    ],
)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    model = add_lora(tiny_model(name))
    expected = reference_gradients(model, per_span(ROWS[:2]))
    # The auxiliary loss of a mixture of experts is no sum over tokens, so it depends on what is batched with what.
    fields = {"max_decisions_per_forward": 3, "max_steps": 1, "router_aux_loss_coef": 0.0}
    run = train(FrozenContextTrainer, model, config(tmp_path, decision_mode="turns", **fields), as_dataset(ROWS))
    assert worst_gradient_error(run.gradients[0], expected) <= GRADIENT_TOLERANCE


def test_the_auxiliary_loss_of_parts_is_their_mean(tmp_path: Path) -> None:
    """As if every decision had been a micro-batch of its own."""
    spans = per_span(ROWS[:1])
    fields = {"router_aux_loss_coef": 1.0, "per_device_train_batch_size": 1, "max_steps": 1}
    parts = config(tmp_path, decision_mode="turns", max_decisions_per_forward=1, **fields)
    runs = [
        train(FrozenContextTrainer, add_lora(tiny_model("gpt_oss")), parts, as_dataset(ROWS)),
        train(
            FrozenContextTrainer,
            add_lora(tiny_model("gpt_oss")),
            config(tmp_path, gradient_accumulation_steps=len(spans), **fields),
            as_dataset(spans),
        ),
    ]
    assert worst_gradient_error(runs[0].gradients[0], runs[1].gradients[0]) <= GRADIENT_TOLERANCE
    assert runs[0].losses == pytest.approx(runs[1].losses, abs=LOSS_TOLERANCE)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_evaluation_in_parts_is_evaluation_in_one(tmp_path: Path) -> None:
    metrics = []
    for max_decisions in (2, 16):
        arguments = config(
            tmp_path, decision_mode="turns", max_decisions_per_forward=max_decisions, per_device_eval_batch_size=4
        )
        trainer = FrozenContextTrainer(
            adapted(),
            arguments,
            train_dataset=as_dataset(ROWS),
            eval_dataset=as_dataset(ROWS),
            processing_class=word_tokenizer(),
        )
        metrics.append(trainer.evaluate()["eval_loss"])
        prediction = trainer.predict(trainer.eval_dataset)
        assert len(prediction.predictions) == len(prediction.label_ids) == len(ROWS)
    expected = mean_loss(adapted(), ROWS)
    assert metrics == pytest.approx([expected, expected], abs=LOSS_TOLERANCE)


def test_turns_of_messages(tmp_path: Path) -> None:
    """Of messages, with the chat template's own masks."""
    rows = []
    for seed in range(2):
        turns = [
            {"role": role, "content": words(count, seed=10 * seed + index)}
            for index, (role, count) in enumerate(
                [("system", 30), ("user", 9), ("assistant", 4), ("user", 20), ("assistant", 6)]
            )
        ]
        rows.append({"messages": turns})
    arguments = config(tmp_path, decision_mode="turns", assistant_only_loss=True, max_steps=1)
    run = train_in_float64(FrozenContextTrainer, adapted(), arguments, Dataset.from_list(rows))
    prepared = run.trainer.train_dataset
    samples = [Sample(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in prepared]
    assert [len(one_sample_per_span(sample)) for sample in samples] == [2, 2]
    expected = reference_sgd(adapted(), [per_span(samples)])
    assert_trained_as(run, adapted(), expected)


def test_the_conversation_is_encoded_once(tmp_path: Path) -> None:
    arguments = config(tmp_path, decision_mode="turns", max_decisions_per_forward=2, max_steps=1)
    run = train(FrozenContextTrainer, adapted(), arguments, as_dataset(ROWS[:2]))
    encoded = sum(max(span.boundary for span in one_sample_per_span(row)) for row in ROWS[:2])
    asked = sum(span.boundary for span in per_span(ROWS[:2]))
    assert run.logs[0]["context/tokens_encoded"] == encoded
    assert run.logs[0]["context/tokens_reused"] == asked - encoded
    assert run.logs[0]["context/hit_rate"] == pytest.approx((asked - encoded) / asked)
    # Tokens after the last span are not read.
    assert run.logs[0]["num_tokens"] == sum(
        max(len(span.input_ids) for span in one_sample_per_span(row)) for row in ROWS[:2]
    )


@pytest.mark.parametrize("limit", [{"max_length": 40}, {"max_context_length": 25}], ids=str)
def test_limits_cut_each_turns_own_context(limit: dict, tmp_path: Path) -> None:
    def cut(span: Sample) -> Sample:
        oldest = max(len(span.input_ids) - limit.get("max_length", 10**6), 0)
        oldest = max(oldest, span.boundary - limit.get("max_context_length", 10**6))
        return Sample(span.input_ids[oldest:], span.labels[oldest:])

    arguments = config(tmp_path, decision_mode="turns", max_steps=1, **limit)
    run = train_in_float64(FrozenContextTrainer, adapted("llama"), arguments, as_dataset(ROWS))
    expected = reference_sgd(adapted("llama"), [[cut(span) for span in per_span(ROWS[:2])]])
    assert_trained_as(run, adapted("llama"), expected)


def test_a_turn_longer_than_max_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Sample 2 of the train dataset has a decision of 7 tokens.*`max_length=6`"):
        train(
            FrozenContextTrainer,
            adapted(),
            config(tmp_path, decision_mode="turns", max_length=6),
            as_dataset([ROWS[1], ROWS[3], ROWS[2]]),
        )


def test_a_horizon_reaches_back_from_each_turn(tmp_path: Path) -> None:
    """Decisions of which each begins some tokens earlier, where labels of earlier turns do not count again."""
    horizon = 12

    class WithHorizon(Sample):
        @property
        def boundary(self) -> int:
            return max(super().boundary - horizon, 0)

    arguments = config(tmp_path, decision_mode="turns", gradient_horizon=horizon, max_steps=1)
    run = train(FrozenContextTrainer, adapted(), arguments, as_dataset(ROWS))
    spans = [WithHorizon(span.input_ids, span.labels) for span in per_span(ROWS[:2])]
    assert worst_gradient_error(run.gradients[0], reference_gradients(adapted(), spans)) <= GRADIENT_TOLERANCE


def test_a_full_gradient_needs_no_turns(tmp_path: Path) -> None:
    runs = [
        train(FrozenContextTrainer, adapted(), config(tmp_path, tier=1, decision_mode=mode), as_dataset(ROWS)).weights
        for mode in ("tail", "turns")
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def naive(model: Any, folder: Path, rows: list[Sample], **fields: Any) -> Run:
    """One step over one sample per span, in one batch and with nothing shared between them but equal contexts."""
    spans = per_span(rows)
    fields = {"per_device_train_batch_size": len(spans), "max_steps": 1} | fields
    return train(FrozenContextTrainer, model, config(folder, **fields), as_dataset(spans))


@pytest.mark.parametrize("name", ["qwen3_5_text", "gemma3_text"])
def test_under_autocast(name: str, tmp_path: Path) -> None:
    """In 16 bit, where cutting a context elsewhere rounds differently; the error is that of 16 bit in float32."""
    fields = {"bf16": True, "max_steps": 1}
    turns = train(
        FrozenContextTrainer, adapted(name), config(tmp_path, decision_mode="turns", **fields), as_dataset(ROWS)
    )
    spans = naive(adapted(name), tmp_path, ROWS[:2], bf16=True)
    exact = reference_gradients(adapted(name), per_span(ROWS[:2]))
    assert worst_gradient_error(turns.gradients[0], spans.gradients[0]) <= 2 * worst_gradient_error(
        spans.gradients[0], exact
    )
    for key, gradient in turns.gradients[0].items():
        assert torch.cosine_similarity(gradient.flatten(), exact[key].flatten(), dim=0) > 0.99, key


@pytest.mark.slow
def test_on_a_4_bit_base(tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "checkpoint")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2}
    tiny_model("qwen3_5_text", **sizes).save_pretrained(checkpoint)
    gradients = []
    for fields, rows in (({"decision_mode": "turns"}, ROWS[:2]), ({}, per_span(ROWS[:2]))):
        torch.manual_seed(0)
        arguments = config(tmp_path / "run", per_device_train_batch_size=len(rows), max_steps=1, **fields)
        options = {
            "quantization_config": quantization_config(checkpoint, bnb_4bit_compute_dtype=torch.float32),
            "peft_config": lora_config(checkpoint, r=2, init_lora_weights=False),
        }
        gradients.append(train(FrozenContextTrainer, checkpoint, arguments, as_dataset(rows), **options).gradients[0])
    assert worst_gradient_error(*gradients) <= GRADIENT_TOLERANCE

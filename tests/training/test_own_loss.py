# SPDX-License-Identifier: Apache-2.0
"""A loss of the user's own, by overriding `compute_loss` as TRL's guides show, is computed over the contexts."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trl import SFTConfig, SFTTrainer

from frozen_peft import ContextMismatchError, FrozenContextConfig, FrozenContextTrainer
from tests.distillation.pairs import Loss, pairs
from tests.distillation.pairs import as_dataset as pairs_dataset
from tests.reference import (
    CACHE,
    IGNORED,
    Sample,
    num_labels,
    random_sample,
    reference_gradients,
    stop_gradient_at_context,
    worst_gradient_error,
)
from tests.training.runs import adapted, as_dataset, config, samples, stopped_forward, train, word_tokenizer

TOLERANCE = 1e-5
ROWS = samples()[:2]
MODEL_INPUTS = ("input_ids", "labels", "attention_mask")

Call = Callable[[nn.Module, dict[str, Any]], torch.Tensor]


def with_all(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).logits


def by_name(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def by_position(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(inputs["input_ids"], inputs["attention_mask"]).logits


def with_its_cache_alone(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(input_ids=inputs["input_ids"], **{CACHE: inputs[CACHE]}).logits


def with_its_cache_by_another_name(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """As code that was written for another release of transformers passes it."""
    other = "cache" if CACHE == "past_key_values" else "past_key_values"
    return model(input_ids=inputs["input_ids"], **{other: inputs[CACHE]}).logits


def by_hidden_states(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    pretrained = model.get_base_model()
    hidden = pretrained.get_decoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return pretrained.get_output_embeddings()(hidden.last_hidden_state)


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the labels of how far each is below the likeliest token."""
    predicted = labels[:, 1:] != IGNORED
    chosen = logits[:, :-1][predicted].gather(-1, labels[:, 1:][predicted][:, None]).squeeze(-1)
    return (logits[:, :-1][predicted].amax(-1) - chosen).sum()


def margin_trainer(call: Call, parent: type[SFTTrainer] = FrozenContextTrainer) -> type[SFTTrainer]:
    class MarginTrainer(parent):  # type: ignore[misc, valid-type]
        def compute_loss(
            self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs["labels"]
            count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            logits = call(model, {name: value for name, value in inputs.items() if name != "labels"})
            loss = margin(logits, labels) / count
            return (loss, {"logits": logits}) if return_outputs else loss

    return MarginTrainer


def plain_margin(model: nn.Module, rows: list[Sample]) -> torch.Tensor:
    """The same by plain forwards with a stop-gradient at context positions."""
    loss = torch.zeros(())
    for row in rows:
        loss = loss + margin(stopped_forward(model, row).logits, row.labels[None])
    return loss / num_labels(rows)


def turns_of(spans: Sequence[tuple[int, int]]) -> Sample:
    """A sample of several turns, given by the tokens that each supervises."""
    row = random_sample(spans[-1][1], 0, seed=3)
    labels = torch.full_like(row.input_ids, IGNORED)
    for start, stop in spans:
        labels[start:stop] = row.input_ids[start:stop]
    return Sample(row.input_ids, labels)


@pytest.mark.parametrize(
    ("call", "name", "fields"),
    [
        *((call, "qwen3_5_text", {"tier": 2}) for call in (with_all, by_name, by_position, by_hidden_states)),
        (with_its_cache_alone, "qwen3_5_text", {"gradient_checkpointing": False}),
        (with_its_cache_by_another_name, "qwen3_5_text", {"tier": 2}),
        (by_name, "llama", {}),
    ],
)
def test_a_loss_of_ones_own_is_over_the_contexts(
    call: Call, name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(name)
    arguments = config(tmp_path, max_steps=1, **fields)
    run = train(margin_trainer(call), copy.deepcopy(model), arguments, as_dataset(ROWS))
    expected = plain_margin(model, ROWS)
    assert run.losses == pytest.approx([expected.item()], abs=TOLERANCE)
    expected.backward()
    gradients = {key: weight.grad for key, weight in model.named_parameters() if weight.requires_grad}
    assert worst_gradient_error(run.gradients[0], gradients) <= TOLERANCE


@pytest.mark.parametrize("call", [with_all, by_name])
def test_stretches_give_a_loss_of_ones_own_all_its_logits(call: Call, tmp_path: Path) -> None:
    model = adapted()
    arguments = config(tmp_path, max_steps=1, tier=3, sequence_chunk_size=8)
    run = train(margin_trainer(call), copy.deepcopy(model), arguments, as_dataset(ROWS))
    loss = torch.zeros(())
    for row in ROWS:
        loss = loss + margin(model(input_ids=row.input_ids[None], use_cache=False).logits, row.labels[None])
    assert run.losses == pytest.approx([loss.item() / num_labels(ROWS)], abs=TOLERANCE)


@pytest.mark.parametrize("call", [with_all, by_name])
def test_evaluation_calls_it_over_the_contexts(call: Call, tmp_path: Path) -> None:
    model = adapted()
    trainer = margin_trainer(call)(
        copy.deepcopy(model),
        config(tmp_path, tier=2),
        train_dataset=as_dataset(ROWS),
        processing_class=word_tokenizer(),
    )
    expected = plain_margin(model, ROWS).item()
    assert trainer.evaluate(as_dataset(ROWS))["eval_loss"] == pytest.approx(expected, abs=TOLERANCE)


def test_what_calls_super_gets_what_trl_makes_of_the_contexts(tmp_path: Path) -> None:
    model = adapted()
    seen = []

    class Penalised(FrozenContextTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(sorted(inputs))
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            with torch.no_grad():
                again = model(**{name: inputs[name] for name in ("input_ids", "position_ids", CACHE)}).logits
            seen.append(again.shape)
            return 2.0 * loss

    ours = train(Penalised, copy.deepcopy(model), config(tmp_path, tier=2, max_steps=1), as_dataset(ROWS))
    plain = train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path, tier=2, max_steps=1), as_dataset(ROWS))
    assert ours.losses == pytest.approx([2.0 * loss for loss in plain.losses], abs=TOLERANCE)
    assert seen[0] == sorted({*MODEL_INPUTS, "position_ids", CACHE})


def test_turns_come_in_parts_that_a_model_can_be_called_with(tmp_path: Path) -> None:
    model, spans = adapted("llama"), ((20, 30), (35, 42), (44, 50))
    row = turns_of(spans)
    fields = {"decision_mode": "turns", "max_decisions_per_forward": 2, "per_device_train_batch_size": 1}
    arguments = config(tmp_path, max_steps=1, **fields)
    run = train(margin_trainer(by_name), copy.deepcopy(model), arguments, as_dataset([row]))
    loss = torch.zeros(())
    for start, stop in spans:
        with stop_gradient_at_context(model, start - 1, stop):
            logits = model(input_ids=row.input_ids[None, :stop], use_cache=False).logits
        own = row.labels[None, :stop].clone()
        own[:, :start] = IGNORED
        loss = loss + margin(logits, own)
    loss = loss / sum(stop - start for start, stop in spans)
    assert run.losses == pytest.approx([loss.item()], abs=TOLERANCE)
    loss.backward()
    gradients = {key: weight.grad for key, weight in model.named_parameters() if weight.requires_grad}
    assert worst_gradient_error(run.gradients[0], gradients) <= TOLERANCE


def test_a_second_batch_inside_of_it_has_its_own_contexts(tmp_path: Path) -> None:
    model, others = adapted(), samples()[4:6]

    class Replaying(FrozenContextTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            other = self.data_collator(
                [{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in others]
            )
            replayed = super().compute_loss(model, other)
            return super().compute_loss(model, inputs, *args, **kwargs) + replayed

    run = train(Replaying, copy.deepcopy(model), config(tmp_path, tier=2, max_steps=1), as_dataset(ROWS))
    alone = [
        train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path, tier=2, max_steps=1), as_dataset(rows))
        for rows in (ROWS, others)
    ]
    assert run.losses == pytest.approx([sum(one.losses[0] for one in alone)], abs=TOLERANCE)
    for name, gradient in run.gradients[0].items():
        torch.testing.assert_close(gradient, sum(one.gradients[0][name] for one in alone), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
def test_labels_that_a_training_step_of_ones_own_changes_are_those_that_train(tmp_path: Path, in_place: bool) -> None:
    """A batch was cut by then; what it is cut to follows what is in it."""
    model = adapted()

    class Masking(FrozenContextTrainer):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            labels = inputs["labels"] if in_place else inputs["labels"].clone()
            labels[:, :34] = IGNORED
            inputs["labels"] = labels
            return super().training_step(model, inputs, *args, **kwargs)

    masked = [Sample(row.input_ids, row.labels.clone()) for row in ROWS]
    for row in masked:
        row.labels[:34] = IGNORED
    fields = {"tier": 2, "max_steps": 1, "per_device_train_batch_size": 1, "average_tokens_across_devices": False}
    found = train(Masking, copy.deepcopy(model), config(tmp_path, **fields), as_dataset(ROWS))
    expected = reference_gradients(model, masked[:1], reduction="sum")
    # As TRL has it, a loss is divided by the labels that the batch was collated with.
    assert worst_gradient_error(found.gradients[0], {k: v / num_labels(ROWS[:1]) for k, v in expected.items()}) <= 1e-5


@pytest.mark.parametrize("name", ["qwen3_5_text", "llama"])
def test_what_the_base_says_is_said_over_a_context_of_its_own(name: str, tmp_path: Path) -> None:
    """A penalty on the divergence from the base, as with `SFTTrainer`: the base read the context too."""
    model = adapted(name)

    def against_base(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            base = with_all(model, inputs)
            again = by_name(model, inputs)
        assert torch.equal(base, again)
        return with_all(model, inputs) - base

    run = train(
        margin_trainer(against_base), copy.deepcopy(model), config(tmp_path, tier=2, max_steps=1), as_dataset(ROWS)
    )
    loss = torch.zeros(())
    for row in ROWS:
        with torch.no_grad(), model.disable_adapter():
            base = model(input_ids=row.input_ids[None], use_cache=False).logits
        loss = loss + margin(stopped_forward(model, row).logits - base, row.labels[None])
    assert run.losses == pytest.approx([loss.item() / num_labels(ROWS)], abs=TOLERANCE)


def altered(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(input_ids=inputs["input_ids"].clone(), attention_mask=inputs["attention_mask"]).logits


def without(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(input_ids=inputs["input_ids"], **{CACHE: None}).logits


@pytest.mark.parametrize("call", [altered, without])
def test_a_loss_that_forgets_the_contexts_is_refused(call: Call, tmp_path: Path) -> None:
    with pytest.raises(ContextMismatchError, match=CACHE):
        train(margin_trainer(call), adapted(), config(tmp_path, tier=2, max_steps=1), as_dataset(ROWS))


def test_a_forward_of_other_tokens_is_the_users(tmp_path: Path) -> None:
    model, other = adapted(), random_sample(3, 4, seed=9).input_ids[None]

    def beside(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        return with_all(model, inputs) + 0.0 * model(input_ids=other).logits.sum()

    run = train(margin_trainer(beside), copy.deepcopy(model), config(tmp_path, tier=2, max_steps=1), as_dataset(ROWS))
    assert run.losses == pytest.approx([plain_margin(model, ROWS).item()], abs=TOLERANCE)


@pytest.mark.parametrize("call", [with_all, by_name])
def test_without_contexts_it_is_what_sft_computes(call: Call, tmp_path: Path) -> None:
    model, rows = adapted(), samples()[:4]
    fields = {"gradient_accumulation_steps": 2, "max_steps": 2}
    ours, theirs = (
        train(
            margin_trainer(call, parent),
            copy.deepcopy(model),
            config(tmp_path, kind, **own, **fields),
            as_dataset(rows),
        )
        for parent, kind, own in (
            (FrozenContextTrainer, FrozenContextConfig, {"tier": 1}),
            (SFTTrainer, SFTConfig, {}),
        )
    )
    assert ours.losses == theirs.losses
    assert all(torch.equal(weight, theirs.weights[name]) for name, weight in ours.weights.items())


def test_a_mean_of_ones_own_is_averaged_over_the_parts_of_turns(tmp_path: Path) -> None:
    class MeanTrainer(FrozenContextTrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            return margin(model(**inputs).logits, labels) / (labels[:, 1:] != IGNORED).sum()

    model, row = adapted("llama"), turns_of(((20, 30), (35, 45), (50, 60), (62, 72)))
    losses = []
    for size in (1, 4):
        fields = {"decision_mode": "turns", "max_decisions_per_forward": size, "per_device_train_batch_size": 1}
        arguments = config(tmp_path, max_steps=1, **fields)
        losses += train(MeanTrainer, copy.deepcopy(model), arguments, as_dataset([row])).losses
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)


def test_distillation_is_asked_for(tmp_path: Path) -> None:
    made = pairs(((9, 4), (20, 3)))
    with pytest.raises(ValueError, match=r"`loss_type='distill'` is the loss, and a `compute_loss` of your own"):
        train(margin_trainer(with_all), adapted(), config(tmp_path, tier=2, **Loss().fields), pairs_dataset(made))

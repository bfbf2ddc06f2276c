# SPDX-License-Identifier: Apache-2.0
"""Preference pairs over one frozen context: DPO's loss and gradients are those of plain forwards."""

import copy
import math
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from frozen_peft.context import ContextEncoder, FrozenContext
from frozen_peft.training.dpo import FrozenContextDPOConfig
from tests.reference import worst_gradient_error
from tests.tiny_models import ARCHITECTURES, LATENT_ATTENTION, tiny_model
from tests.training.preferences import (
    SHAPES,
    Plain,
    Stopped,
    acting_lora,
    adapted_everywhere,
    as_text,
    as_tokens,
    first_figures,
    pairs,
    settings,
    sigmoid_loss,
    train_pairs,
    untouched,
    without_adapters,
)
from tests.training.runs import (
    LEARNING_RATE,
    adapted,
    equal,
    gradients_of,
    in_float64,
    trained_weights,
    without_timings,
    word_tokenizer,
    worst_update_error,
)

# In float64, where rounding leaves 1e-13; what is logged went through float32.
TOLERANCE, LOGGED = 1e-9, 3e-7
# What TRL computes of a reference beforehand it keeps in float32, and some losses are for float32 alone.
SINGLE = 1e-5
ROWS = pairs()
# Everything that TRL's loss can be, with what each needs.
LOSSES: dict[str, dict[str, Any]] = {
    **{
        name: {"loss_type": name}
        for name in (
            "sigmoid",
            "hinge",
            "ipo",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sft",
            "sigmoid_norm",
        )
    },
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "aot, smoothed": {"loss_type": "aot", "label_smoothing": 0.1},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "unweighted": {"loss_type": ["sigmoid", "sft"]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "ld_alpha": {"ld_alpha": 0.4},
    "weighted": {"use_weighting": True},
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *LATENT_ATTENTION])
def test_every_architecture_trains_as_direct_autograd_says(name: str, tmp_path: Path) -> None:
    model = adapted_everywhere(name)
    # What experts add to a loss beside it is over decisions alone.
    args = settings(tmp_path, per_device_train_batch_size=len(ROWS), router_aux_loss_coef=0.0)
    # Given as a base and its adapters, which TRL would otherwise take for the reference.
    run = train_pairs(args, ROWS, model, ref_model=_double(without_adapters(model)))
    with in_float64(model) as exact:
        loss = sigmoid_loss(exact, without_adapters(exact), ROWS)
        expected = gradients_of(loss, exact)
    # What adapters do over the base is not nothing.
    assert abs(loss.item() - math.log(2)) > 1e-3
    assert run.losses[0] == pytest.approx(loss.item(), rel=LOGGED)
    assert worst_gradient_error(run.gradients[0], expected) <= TOLERANCE


def _double(model: torch.nn.Module) -> torch.nn.Module:
    model.set_experts_implementation("eager")
    return model.double()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precompute_ref_log_probs": True},
        {"gradient_checkpointing": False},
        {"prefill_chunk_size": 7},
        {"gradient_horizon": 9},
        {"gradient_horizon": 9, "sequence_chunk_size": 4},
        {"sequence_chunk_size": 4},
        {"context_cache_size": "1GiB"},
        {"max_context_staleness": 2, "context_cache_size": "1GiB"},
        {"verify_context": "always"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text"])
def test_with_the_base_for_a_reference(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    args = settings(tmp_path, learning_rate=0.0, max_steps=4, **fields)
    run = train_pairs(args, ROWS, name)
    for step, rows in enumerate([ROWS[:2], ROWS[2:]] * 2):
        model = run.trainer.model
        with in_float64(untouched(model)) as exact:
            loss = sigmoid_loss(exact, without_adapters(exact), rows, fields.get("gradient_horizon", 0))
            expected = gradients_of(loss, exact)
        is_kept = "precompute_ref_log_probs" in fields
        assert run.losses[step] == pytest.approx(loss.item(), rel=SINGLE if is_kept else LOGGED)
        assert worst_gradient_error(run.gradients[step], expected) <= (SINGLE if is_kept else TOLERANCE)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", ["ref", "ref_model", "whole model"])
def test_a_reference_stays_what_it_was_while_the_policy_moves(kind: str, precompute: bool, tmp_path: Path) -> None:
    """Of a model that comes trained it is the copy `ref`, of one that is trained as a whole another model."""
    args = settings(tmp_path, max_steps=6, precompute_ref_log_probs=precompute, context_cache_size="1GiB")
    model = adapted("qwen3_5_text") if kind != "whole model" else tiny_model("qwen3_5_text")
    if kind == "whole model":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.endswith("q_proj.weight"))
    if kind == "ref_model":
        named = {"ref_model": _double(copy.deepcopy(model)).merge_and_unload()}
    else:
        named = {} if kind == "ref" else {"ref_model": _double(copy.deepcopy(model))}
    named |= {"peft_config": None} if kind == "whole model" else {}
    run = train_pairs(args, ROWS, model, **named)
    assert ("ref" in getattr(run.trainer.model, "peft_config", {})) == (kind == "ref")
    with in_float64(model) as exact:
        before = copy.deepcopy(exact)
        parameters = {name: weight for name, weight in exact.named_parameters() if weight.requires_grad}
        for step, rows in enumerate([ROWS[:2], ROWS[2:]] * 3):
            loss = sigmoid_loss(exact, before, rows)
            assert run.losses[step] == pytest.approx(loss.item(), rel=SINGLE if precompute else LOGGED)
            for name, gradient in gradients_of(loss, exact).items():
                parameters[name].data -= LEARNING_RATE * gradient
        expected = trained_weights(exact)
    assert abs(run.losses[-1] - math.log(2)) > 1e-2
    assert worst_update_error(run.weights, expected, trained_weights(model)) <= (SINGLE if precompute else TOLERANCE)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_trls_of_what_plain_forwards_give(name: str, tmp_path: Path) -> None:
    fields = LOSSES[name] | {"per_device_train_batch_size": len(ROWS)}
    run = train_pairs(settings(tmp_path, learning_rate=0.0, **fields), ROWS, "qwen3_5_text")
    is_single = "f_alpha_divergence_coef" in fields
    model = untouched(run.trainer.model)
    with nullcontext(model) if is_single else in_float64(model) as exact:
        # Its loss is called with the policy, and calls the model without adapters for the reference.
        plain = Plain(
            without_adapters(exact),
            args=settings(tmp_path, DPOConfig, **fields),
            train_dataset=as_tokens(ROWS),
            processing_class=word_tokenizer(),
            peft_config=acting_lora(exact.get_base_model()),
        )
        batch = DataCollatorForPreference(pad_token_id=0)([dict(row) for row in as_tokens(ROWS)])
        loss = plain._compute_loss(Stopped(exact), batch, return_outputs=False)
        expected = gradients_of(loss, exact)
    assert run.losses[0] == pytest.approx(loss.item(), rel=SINGLE if is_single else LOGGED)
    assert worst_gradient_error(run.gradients[0], expected) <= (SINGLE if is_single else TOLERANCE)
    logged = first_figures(run)
    for key, values in plain._metrics["eval"].items():
        if key != "num_tokens":
            assert logged[key] == pytest.approx(sum(values) / len(values), rel=SINGLE if is_single else LOGGED), key


@pytest.mark.parametrize(
    "fields", [*LOSSES.values(), {"precompute_ref_log_probs": True}, {"pad_to_multiple_of": 8}], ids=str
)
def test_tier_1_is_dpo_trainer_bit_for_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    steps = 10 if "loss_type" not in fields else 2
    ours = train_pairs(settings(tmp_path / "ours", tier=1, max_steps=steps, **fields), as_text())
    theirs = train_pairs(settings(tmp_path / "theirs", DPOConfig, max_steps=steps, **fields), as_text())
    assert without_timings(ours.logs) == without_timings(theirs.logs)
    assert equal(ours.weights, theirs.weights)


def test_a_context_is_encoded_once_for_both_answers_and_the_references_once_for_good(tmp_path: Path) -> None:
    run = train_pairs(settings(tmp_path, max_steps=6, context_cache_size="1GiB"), ROWS)
    policy, reference = run.trainer._frozen.encoder.counts, run.trainer._reference_contexts.encoder.counts
    contexts = sum(prompt - 1 for prompt, _, _ in SHAPES)
    assert policy.num_tokens_asked == reference.num_tokens_asked == 3 * 2 * contexts
    assert policy.num_tokens_encoded == 3 * contexts
    assert reference.num_tokens_encoded == contexts
    assert [entry["reference/hit_rate"] for entry in run.logs] == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["base", "ref", "ref_model"])
def test_contexts_of_the_reference_are_gone_before_the_policys_come(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that memory is that of one, where no store keeps them."""
    alive: list[weakref.ref[FrozenContext]] = []
    encode, at_hand = ContextEncoder.encode, []

    def noted(self: ContextEncoder, *args: Any, **kwargs: Any) -> FrozenContext:
        at_hand.append(sum(each() is not None for each in alive))
        alive.append(weakref.ref(frozen := encode(self, *args, **kwargs)))
        return frozen

    monkeypatch.setattr(ContextEncoder, "encode", noted)
    given = {"ref_model": tiny_model("llama").double()} if kind == "ref_model" else {}
    args = settings(tmp_path, max_steps=3, verify_context="never")
    train_pairs(args, ROWS, adapted("llama") if kind == "ref" else "llama", **given)
    assert len(at_hand) >= 6
    assert not any(at_hand)


def test_contexts_of_the_base_are_those_of_both(tmp_path: Path) -> None:
    """With `context_adapters=False` there is one prefill for policy and reference."""
    rows = _behind_invocation()
    args = settings(tmp_path, context_adapters=False, invocation="user w3", max_steps=4, context_cache_size="1GiB")
    run = train_pairs(args, rows)
    assert run.trainer._reference_contexts is None
    contexts = sum(len(row["prompt_ids"]) - 2 for row in rows)
    assert run.trainer._frozen.encoder.counts.num_tokens_encoded == contexts
    assert all(math.isfinite(loss) for loss in run.losses)


def _behind_invocation() -> Dataset:
    tokens = word_tokenizer()("user w3")["input_ids"]
    return as_tokens(ROWS).map(lambda row: {"prompt_ids": [*row["prompt_ids"][:-2], *tokens]})


def test_changing_a_token_of_the_context_changes_the_loss(tmp_path: Path) -> None:
    losses = []
    for place in (None, 0, 17, 38):
        prompt = ROWS[0].prompt.clone()
        if place is not None:
            prompt[place] = 5
        changed = [type(ROWS[0])(prompt, ROWS[0].chosen, ROWS[0].rejected)]
        args = settings(tmp_path / str(place), per_device_train_batch_size=1)
        losses.append(train_pairs(args, changed, "qwen3_5_text").losses[0])
    assert min(abs(loss - losses[0]) for loss in losses[1:]) > 1e-6


def test_the_reference_does_not_read_the_policys_contexts(tmp_path: Path) -> None:
    """The figure that shows it: what the reference gives each answer is what the base gives it."""
    run = train_pairs(settings(tmp_path, FrozenContextDPOConfig, learning_rate=0.0), ROWS)
    with in_float64(untouched(run.trainer.model)) as exact:
        loss = sigmoid_loss(exact, without_adapters(exact), ROWS[:2])
    assert run.losses[0] == pytest.approx(loss.item(), rel=LOGGED)

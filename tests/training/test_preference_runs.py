# SPDX-License-Identifier: Apache-2.0
"""Preference trainings as they are run: accumulated, evaluated, resumed, with every argument of TRL's constructor."""

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from frozen_peft import (
    ContextMismatchError,
    FrozenContextDPOConfig,
    FrozenContextDPOTrainer,
    FrozenContextKTOConfig,
    FrozenContextKTOTrainer,
)
from tests.reference import worst_gradient_error
from tests.tiny_models import tiny_model
from tests.training.preferences import (
    acting_lora,
    adapted_everywhere,
    as_text,
    as_tokens,
    pairs,
    settings,
    sigmoid_loss,
    train_pairs,
    untouched,
)
from tests.training.runs import (
    LEARNING_RATE,
    adapted,
    config,
    equal,
    gradients_of,
    in_float64,
    train,
    trained_weights,
    without_timings,
    word_tokenizer,
    worst_update_error,
)
from tests.training.test_kto import rows_of as answers

ROWS = pairs()
TOLERANCE, LOGGED = 1e-9, 3e-7
SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 5}


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    at_once = train_pairs(settings(tmp_path / "once", per_device_train_batch_size=4), ROWS)
    fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    accumulated = train_pairs(settings(tmp_path / "accumulated", **fields), ROWS)
    assert accumulated.losses == pytest.approx(at_once.losses, rel=LOGGED)
    assert worst_gradient_error(accumulated.gradients[0], at_once.gradients[0]) <= TOLERANCE


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("tier", [1, 2])
def test_evaluation_is_trls(tier: int, precompute: bool, tmp_path: Path) -> None:
    """Of one dataset, of several by name, and of one that comes later."""
    fields = {"max_steps": 2, "precompute_ref_log_probs": precompute, "learning_rate": 0.0}
    found, held_out = [], {"short": as_text().select([0, 2]), "long": as_text().select([1, 3])}
    for args in (settings(tmp_path / "ours", tier=tier, **fields), settings(tmp_path / "theirs", DPOConfig, **fields)):
        run = train_pairs(args, as_text(), eval_dataset=held_out)
        figures = run.trainer.evaluate()
        figures |= {f"new {key}": value for key, value in run.trainer.evaluate(as_text().select([3])).items()}
        found.append(figures)
    (ours,), (theirs,) = without_timings(found[:1]), without_timings(found[1:])
    assert {"eval_short_loss", "eval_rewards/margins", "new eval_logps/chosen"} <= theirs.keys()
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=0.0 if tier == 1 else 1e-5)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*compute_metrics.*:FutureWarning")
def test_a_metric_sees_the_decisions_of_both_answers(tmp_path: Path) -> None:
    seen: list[Any] = []

    def keep(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"seen": 1.0}

    trainer = FrozenContextDPOTrainer(
        adapted("llama"),
        args=settings(tmp_path, per_device_eval_batch_size=4, include_for_metrics=["inputs"]),
        train_dataset=as_tokens(ROWS),
        eval_dataset=as_tokens(ROWS),
        processing_class=word_tokenizer(),
        compute_metrics=keep,
    )
    trainer.evaluate()
    model = untouched(trainer.model)
    rows = [
        row.sample(answer) for answers in ("chosen", "rejected") for row in ROWS for answer in [getattr(row, answers)]
    ]
    for row, logits, labels in zip(rows, seen[0].predictions, seen[0].label_ids, strict=True):
        with torch.no_grad():
            plain = model(input_ids=row.input_ids[None]).logits[0, row.boundary :]
        torch.testing.assert_close(torch.tensor(logits[: len(plain)]), plain, atol=2e-5, rtol=1e-4)
        assert labels[: len(plain)].tolist() == row.decision.tolist()


@pytest.mark.parametrize(
    "case", ["base", "store", "by the base", "ref", "precomputed", "shuffled", "kto", "stretches"]
)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(case: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "store": {"context_cache_size": "1GiB"},
        "by the base": {"context_adapters": False, "invocation": "user w3", "context_cache_size": "1GiB"},
        "precomputed": {"precompute_ref_log_probs": True},
        "shuffled": {"train_sampling_strategy": "random", "gradient_accumulation_steps": 2},
        "stretches": {"tier": 3, "sequence_chunk_size": 16},
    }.get(case, {})
    trainer, kind = FrozenContextDPOTrainer, FrozenContextDPOConfig
    rows = as_tokens(ROWS)
    if case == "kto":
        trainer, kind, rows = FrozenContextKTOTrainer, FrozenContextKTOConfig, answers()
    if case == "by the base":
        tokens = word_tokenizer()("user w3")["input_ids"]
        rows = rows.map(lambda row: {"prompt_ids": [*row["prompt_ids"][:-2], *tokens]})

    def run(folder: Path, resume: str | None = None) -> Any:
        model, given = tiny_model("qwen3_5_text"), {}
        if case == "ref":
            model = adapted("qwen3_5_text")
        else:
            given["peft_config"] = acting_lora(model)
        return train(trainer, model, settings(folder, kind, **(SAVING | fields)), rows, resume=resume, **given)

    at_once = run(tmp_path / "at_once")
    resumed = run(tmp_path / "resumed", str(tmp_path / "at_once" / "checkpoint-2"))
    assert resumed.losses[-3:] == at_once.losses[-3:]
    assert equal(resumed.weights, at_once.weights)


def test_rows_under_one_document_come_together(tmp_path: Path) -> None:
    documents = [torch.randint(7, 88, (50,), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    rows = [
        type(row)(torch.cat([documents[index % 2], row.prompt]), row.chosen, row.rejected)
        for index, row in enumerate(pairs(((9, 3, 4), (12, 5, 2), (7, 4, 6), (15, 3, 8))))
    ]
    fields = {"group_by_context": True, "train_sampling_strategy": "random", "max_steps": 2}
    run = train_pairs(settings(tmp_path, **fields), rows)
    counts = run.trainer._frozen.encoder.counts
    # Both documents once, and what each prompt adds, less the token that belongs to the answers.
    assert counts.num_tokens_encoded == 2 * 50 + 9 + 12 + 7 + 15 - 4


def test_contexts_of_the_reference_are_found_by_another_run(tmp_path: Path) -> None:
    """In files, by what the reference is: the base, or the very adapter."""
    fields = {"context_cache_dir": str(tmp_path / "contexts"), "max_steps": 2}
    for name, model, found in (
        ("first", "llama", False),
        ("second", "llama", True),
        ("adapter", adapted("llama"), False),
        ("same adapter", adapted("llama"), True),
        ("another adapter", adapted("llama", seed=1), False),
    ):
        run = train_pairs(settings(tmp_path / name, **fields), ROWS, model)
        encoded = run.trainer._reference_contexts.encoder.counts.num_tokens_encoded
        assert (encoded == 0) is found, name


def test_every_argument_of_the_constructor_is_taken(tmp_path: Path) -> None:
    """By position, too, and a plain configuration of TRL is converted."""
    assert inspect.signature(FrozenContextDPOTrainer) == inspect.signature(DPOTrainer)
    steps: list[int] = []

    class Noting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    trainer = FrozenContextDPOTrainer(
        str(tmp_path / "model"),
        None,
        config(tmp_path / "run", DPOConfig, max_steps=1, max_length=1024),
        None,
        as_text(),
        {"held out": as_text()},
        word_tokenizer(),
        None,
        [Noting()],
        (optimizer, None),
        None,
        acting_lora(model),
    )
    assert isinstance(trainer.args, FrozenContextDPOConfig)
    assert trainer.args.max_length is None
    trainer.train()
    assert steps == [1]
    assert trainer.optimizer.optimizer is optimizer
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        FrozenContextDPOTrainer(tiny_model("llama"), args=settings(tmp_path), **_given())


def _given() -> dict[str, Any]:
    return {"processing_class": word_tokenizer(), "peft_config": acting_lora(tiny_model("llama"))}


def test_a_collator_of_ones_own_makes_the_batches(tmp_path: Path) -> None:
    seen: list[int] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append(len(rows))
        return run.data(rows)

    run = type("Made", (), {"data": None})()
    plain = train_pairs(settings(tmp_path), ROWS)
    run.data = plain.trainer.data_collator
    own = train_pairs(settings(tmp_path), ROWS, data_collator=collate)
    assert own.losses == plain.losses
    assert set(seen) == {2}

    def with_more(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return run.data(rows) | {"token_type_ids": torch.zeros(1)}

    with pytest.raises(ValueError, match="`token_type_ids` into a batch"):
        train_pairs(settings(tmp_path), ROWS, data_collator=with_more)


@pytest.mark.parametrize("tier", [1, 2])
def test_a_synchronised_reference_follows_the_policy(tier: int, tmp_path: Path) -> None:
    """Its contexts are encoded anew. Without adapters, which TRL does not synchronise."""
    fields = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.7, "max_steps": 5}
    fields |= {"context_cache_size": "1GiB"}
    model = tiny_model("llama").double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("q_proj.weight"))
    given = {"peft_config": None}
    run = train_pairs(settings(tmp_path, tier=tier, **fields), ROWS, model, ref_model=copy.deepcopy(model), **given)
    if tier == 1:
        del fields["context_cache_size"]
        args = settings(tmp_path, DPOConfig, **fields)
        theirs = train_pairs(args, ROWS, model, ref_model=copy.deepcopy(model), **given)
        assert run.losses == theirs.losses
        assert equal(run.weights, theirs.weights)
        return
    with in_float64(model) as exact:
        reference, start = copy.deepcopy(exact), trained_weights(exact)
        parameters = {name: weight for name, weight in exact.named_parameters() if weight.requires_grad}
        for step, rows in enumerate([ROWS[:2], ROWS[2:], ROWS[:2], ROWS[2:], ROWS[:2]]):
            loss = sigmoid_loss(exact, reference, rows)
            assert run.losses[step] == pytest.approx(loss.item(), rel=LOGGED)
            for name, gradient in gradients_of(loss, exact).items():
                parameters[name].data -= LEARNING_RATE * gradient
            if (step + 1) % 2 == 0:
                for name, weight in reference.named_parameters():
                    weight.data.mul_(0.3).add_(exact.get_parameter(name).data, alpha=0.7)
        assert worst_update_error(run.weights, trained_weights(exact), start) <= TOLERANCE
    with pytest.raises(NotImplementedError, match="PEFT model"):
        train_pairs(settings(tmp_path, **fields), ROWS)


def test_in_16_bit_and_with_reentrant_checkpoints(tmp_path: Path) -> None:
    exact = train_pairs(settings(tmp_path / "exact", max_steps=2), ROWS, "qwen3_5_text")
    model = tiny_model("qwen3_5_text")
    args = settings(tmp_path / "half", max_steps=2, bf16=True)
    half = train(FrozenContextDPOTrainer, model, args, as_tokens(ROWS), peft_config=acting_lora(model))
    assert half.losses == pytest.approx(exact.losses, rel=0.2)
    args = settings(tmp_path / "reentrant", max_steps=2, gradient_checkpointing_kwargs={"use_reentrant": True})
    reentrant = train_pairs(args, ROWS, "qwen3_5_text")
    assert reentrant.losses == pytest.approx(exact.losses, rel=LOGGED)


@pytest.mark.parametrize("kind", ["whole model", "adapters"])
def test_an_evaluation_before_training_is_in_16_bit_too(kind: str, tmp_path: Path) -> None:
    """With a reference model beside the policy, which transformers then does not prepare."""
    model = tiny_model("llama")
    given = {"peft_config": acting_lora(model) if kind == "adapters" else None}
    trainer = FrozenContextDPOTrainer(
        model,
        tiny_model("llama", seed=1),
        settings(tmp_path, bf16=True, max_steps=1, learning_rate=0.0),
        train_dataset=as_tokens(ROWS),
        eval_dataset=as_tokens(ROWS),
        processing_class=word_tokenizer(),
        **given,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_logps/chosen", "eval_logps/rejected"):
        assert before[name] == after[name]
    exact = settings(tmp_path / "exact", max_steps=1, learning_rate=0.0, per_device_train_batch_size=4)
    exact_run = train_pairs(exact, ROWS, "llama", ref_model=tiny_model("llama", seed=1).double(), **given)
    assert before["eval_loss"] == pytest.approx(exact_run.losses[0], rel=0.05)


@pytest.mark.parametrize(
    ("name", "lora", "match"),
    [
        ("llama", LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "reference of a preference loss"),
        ("gpt2", LoraConfig(target_modules=["c_attn"], bias="all", fan_in_fan_out=True), "biases of its own"),
        ("llama", PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "prefix"),
    ],
    ids=["pissa", "bias", "prefix"],
)
def test_adapters_without_which_a_model_is_no_reference_are_refused(
    name: str, lora: Any, match: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"(?i){match}"):
        FrozenContextDPOTrainer(
            tiny_model(name),
            args=settings(tmp_path),
            train_dataset=as_tokens(ROWS),
            processing_class=word_tokenizer(),
            peft_config=lora,
        )


def test_a_weight_of_the_base_that_is_trained_would_move_the_reference(tmp_path: Path) -> None:
    model = adapted("llama")
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"training changes `.*norm.weight`"):
        train_pairs(settings(tmp_path), ROWS, model)
    assert train_pairs(settings(tmp_path, precompute_ref_log_probs=True), ROWS, model).losses


def test_a_reference_with_adapters_is_refused(tmp_path: Path) -> None:
    reference = get_peft_model(tiny_model("llama"), acting_lora(tiny_model("llama")))
    with pytest.raises(ValueError, match="`ref_model` is a PeftModel"):
        FrozenContextDPOTrainer(
            tiny_model("llama"), reference, args=settings(tmp_path), train_dataset=as_tokens(ROWS), **_given()
        )


def test_precomputed_figures_are_not_those_of_another_setting(tmp_path: Path) -> None:
    """TRL names its file by model and rows; contexts that are cut give others, and so does `ld_alpha`."""
    # In a table on the disk, where TRL looks for what it has computed.
    as_tokens(ROWS).save_to_disk(str(tmp_path / "rows"))
    found = []
    for name, fields in (
        ("whole", {}),
        ("cut", {"max_context_length": 5}),
        ("again", {}),
        ("tail", {"ld_alpha": 0.0}),
    ):
        rows = Dataset.load_from_disk(str(tmp_path / "rows"))
        args = settings(tmp_path / name, precompute_ref_log_probs=True, learning_rate=0.0, **fields)
        found.append(train_pairs(args, rows).trainer.train_dataset["ref_chosen_logps"])
    assert found[0] == found[2]
    assert found[0] != found[1]
    assert found[0] != found[3]


def test_a_context_that_is_cut_is_the_same_for_both_answers(tmp_path: Path) -> None:
    run = train_pairs(settings(tmp_path, max_context_length=11, learning_rate=0.0), ROWS, "llama")
    cut = [type(row)(row.prompt[-12:], row.chosen, row.rejected) for row in ROWS]
    expected = train_pairs(settings(tmp_path, DPOConfig, learning_rate=0.0), cut, "llama")
    assert run.losses == pytest.approx(expected.losses, rel=LOGGED)


def test_a_loss_of_ones_own_reads_the_contexts(tmp_path: Path) -> None:
    class Doubled(FrozenContextDPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            return 2 * super()._compute_loss(model, inputs, return_outputs)

    class Forgetful(FrozenContextDPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            return super()._compute_loss(
                model, {"input_ids": inputs["input_ids"] * 1, **_mask(inputs)}, return_outputs
            )

    plain = train_pairs(settings(tmp_path), ROWS)
    with in_float64(tiny_model("llama")) as model:
        doubled = train(Doubled, model, settings(tmp_path), as_tokens(ROWS), peft_config=acting_lora(model))
    assert doubled.losses == pytest.approx([2 * loss for loss in plain.losses], rel=LOGGED)
    with pytest.raises(ContextMismatchError):
        train(Forgetful, tiny_model("llama"), settings(tmp_path), as_tokens(ROWS), **_given())


@pytest.mark.parametrize("name", ["dpo", "dpo, with a model", "kto"])
def test_a_loss_of_ones_own_may_run_the_reference(name: str, tmp_path: Path) -> None:
    """Over contexts as that encodes them, which are not at hand by then."""
    trainer, kind, rows = (
        (FrozenContextKTOTrainer, FrozenContextKTOConfig, answers())
        if name == "kto"
        else (FrozenContextDPOTrainer, FrozenContextDPOConfig, as_tokens(ROWS))
    )

    class Running(trainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            untold = {key: value for key, value in inputs.items() if not key.startswith("ref_")}
            assert len(untold) < len(inputs)
            return super()._compute_loss(model, untold, return_outputs)

    runs = []
    for each in (trainer, Running):
        model = tiny_model("qwen3_5_text")
        given = {"ref_model": tiny_model("qwen3_5_text", seed=1).double()} if name == "dpo, with a model" else {}
        with in_float64(model) as exact:
            args = settings(tmp_path / each.__name__, kind, max_steps=4)
            runs.append(train(each, exact, args, rows, peft_config=acting_lora(model), **given))
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=LOGGED)
    torch.testing.assert_close(runs[1].weights, runs[0].weights, rtol=TOLERANCE, atol=TOLERANCE)


def _mask(inputs: Any) -> dict[str, Any]:
    return {name: inputs[name] for name in ("attention_mask", "completion_mask")}


def test_all_adapters_learn(tmp_path: Path) -> None:
    """A comparison that is learned: the margin grows."""
    args = settings(tmp_path, max_steps=8, learning_rate=0.01, per_device_train_batch_size=4)
    run = train_pairs(args, ROWS, adapted_everywhere("qwen3_5_text"))
    margins = [entry["rewards/margins"] for entry in run.logs]
    assert margins[-1] > margins[0] + 0.1
    assert run.losses[-1] < math.log(2)

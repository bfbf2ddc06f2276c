# SPDX-License-Identifier: Apache-2.0
"""From rows with the column `stripped` to batches that hold each sample with and without its instructions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from frozen_peft import FrozenContextTrainer
from frozen_peft.data import strip_instructions
from tests.distillation.pairs import Loss, Pair, reference_loss, sharp
from tests.reference import IGNORED, Sample
from tests.tiny_models import tiny_model
from tests.training.runs import as_dataset, config, samples, train, word_tokenizer, words

LOSS = Loss(top_k=5)
TOKENIZER = word_tokenizer()
MODEL = "llama"


def message(role: str, count: int, seed: int) -> dict[str, str]:
    return {"role": role, "content": words(count, seed=seed)}


def conversation(seed: int) -> dict[str, Any]:
    """Prompt and completion, with an instruction in a message of its own and one within a message."""
    prompt = [
        {"role": "system", "content": f"<instruction>{words(3, seed=seed + 50)}</instruction>"},
        message("user", 6 + seed, seed),
        {"role": "user", "content": f"{words(4, seed=seed + 1)} <instruction>w1 w2</instruction> w3"},
    ]
    return {"prompt": prompt, "completion": [message("assistant", 3 + seed, seed + 2)]}


CONVERSATIONS = [conversation(seed) for seed in range(4)]
STRIPPED = [strip_instructions(row) for row in CONVERSATIONS]
TEXTS = [
    {
        "prompt": f"<instruction>{words(5, seed=seed + 9)}</instruction> {words(8, seed=seed)}",
        "completion": " w1 w2 w3",
    }
    for seed in range(4)
]


def token_ids(row: dict[str, Any]) -> Sample:
    """A conversation as one sequence of which the completion is supervised, written out."""
    text = ""
    for entry in row["prompt"]:
        text += f"<|im_start|>{entry['role']} {entry['content']}<|im_end|>"
    start = len(TOKENIZER(text + "<|im_start|>assistant ")["input_ids"])
    text += f"<|im_start|>assistant {row['completion'][0]['content']}<|im_end|>"
    ids = torch.tensor(TOKENIZER(text)["input_ids"])
    labels = ids.clone()
    labels[:start] = IGNORED
    return Sample(ids, labels)


def make_trainer(folder: Path, dataset: Any, model: PeftModel | None = None, **fields: Any) -> FrozenContextTrainer:
    arguments = config(folder, **(LOSS.fields | {"max_steps": 1} | fields))
    return FrozenContextTrainer(
        model or sharp(MODEL), arguments, train_dataset=dataset, processing_class=word_tokenizer()
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_conversations_are_distilled_from_their_restored_selves(streamed: bool, tmp_path: Path) -> None:
    dataset = Dataset.from_list(STRIPPED)
    trainer = make_trainer(
        tmp_path, dataset.to_iterable_dataset() if streamed else dataset, per_device_train_batch_size=4
    )
    expected = reference_loss(
        sharp(MODEL),
        [Pair(token_ids(own), token_ids(whole)) for own, whole in zip(STRIPPED, CONVERSATIONS, strict=True)],
        LOSS,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_columns_of_the_prepared_dataset(tmp_path: Path) -> None:
    prepared = make_trainer(tmp_path, Dataset.from_list(STRIPPED)).train_dataset
    for row, own, whole in zip(prepared, STRIPPED, CONVERSATIONS, strict=True):
        assert row["input_ids"] == token_ids(own).input_ids.tolist()
        assert row["labels"] == token_ids(own).labels.tolist()
        assert row["teacher_input_ids"] == token_ids(whole).input_ids.tolist()
        assert row["teacher_labels"] == token_ids(whole).labels.tolist()


def test_an_order_that_trl_shuffles_is_one_order(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Dataset.from_list(STRIPPED), shuffle_dataset=True, seed=3)
    rows = [row["teacher_input_ids"] for row in trainer.train_dataset]
    assert sorted(rows) == sorted(token_ids(row).input_ids.tolist() for row in CONVERSATIONS)
    assert rows != [token_ids(row).input_ids.tolist() for row in CONVERSATIONS]
    trainer.train()


def test_text_and_its_evaluation(tmp_path: Path) -> None:
    rows = [strip_instructions(row) for row in TEXTS]
    assert all("<instruction>" not in row["prompt"] for row in rows)
    trainer = make_trainer(tmp_path, Dataset.from_list(rows))
    trainer.train()
    metrics = trainer.evaluate(Dataset.from_list(rows[:2]))
    assert metrics["eval_loss"] > 0.01


def test_turns_of_a_conversation(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "<instruction>w5 w6</instruction>"},
                message("user", 5, seed),
                message("assistant", 4, seed + 1),
                {"role": "user", "content": "w7 <instruction>w8 w9</instruction>"},
                message("assistant", 3, seed + 2),
            ]
        }
        for seed in range(2)
    ]
    dataset = Dataset.from_list([strip_instructions(row) for row in rows])
    trainer = make_trainer(tmp_path, dataset, decision_mode="turns", assistant_only_loss=True)
    trainer.train()
    assert trainer.state.log_history[0]["distill/divergence"] > 0.01
    # Two turns of both conversations, each asked about once.
    assert trainer.state.log_history[0]["distill/reused"] == 0.0


def test_an_empty_list_has_the_teacher_see_what_the_student_sees(tmp_path: Path) -> None:
    rows = [{**row, "stripped": []} for row in STRIPPED]
    prepared = make_trainer(tmp_path, Dataset.from_list([*rows, *STRIPPED])).train_dataset
    assert prepared["teacher_input_ids"][:4] == prepared["input_ids"][:4]
    assert prepared["teacher_input_ids"][4:] != prepared["input_ids"][4:]


def test_a_collator_of_the_user_does_not_see_the_teacher(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.extend(set(row) for row in rows)
        pad = torch.nn.utils.rnn.pad_sequence
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        return {
            "input_ids": pad(ids, batch_first=True),
            "labels": pad([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORED),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        }

    arguments = config(tmp_path, **LOSS.fields, max_steps=1)
    run = train(FrozenContextTrainer, sharp(MODEL), arguments, Dataset.from_list(STRIPPED), data_collator=collate)
    assert run.losses[0] > 0.01
    assert seen
    assert all(columns == {"input_ids", "labels"} for columns in seen)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{k: v for k, v in row.items() if k != "stripped"} for row in STRIPPED], r"train dataset has no column `str"),
        ([*STRIPPED[:2], {**STRIPPED[2], "stripped": None}], r"Sample 2 of the train dataset has no `stripped`"),
        (
            [
                STRIPPED[0],
                {**STRIPPED[1], "stripped": [*STRIPPED[1]["stripped"], {**STRIPPED[1]["stripped"][0], "index": 9}]},
            ],
            r"Sample 1 of the train dataset: .*pieces in `stripped` have no place",
        ),
    ],
)
def test_rows_without_their_instructions(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, Dataset.from_list(rows))


def test_a_token_that_reaches_into_the_decision_is_named(tmp_path: Path) -> None:
    """The prompt's last word and the completion's first become one token where no instruction stands between."""
    rows = [
        {"prompt": "w1 w2 ", "completion": "w3 w4"},
        {"prompt": "w1 w2 <instruction>w5 </instruction>", "completion": "3 w4"},
    ]
    rows = [strip_instructions(rows[0]), {**strip_instructions(rows[1]), "prompt": "w1 w2 w"}]
    rows[1]["stripped"][0]["start"] = 7
    rows[1]["stripped"][0]["text"] = " "
    with pytest.raises(ValueError, match=r"Sample 1 of the train dataset has another decision .*supervised token"):
        make_trainer(tmp_path, Dataset.from_list(rows))


def test_messages_that_do_not_fit_into_one_table(tmp_path: Path) -> None:
    """`datasets` types a column by its first thousand rows."""
    extra = {
        "prompt": [
            {"role": "system", "content": "<instruction>w1</instruction>", "mood": "w2"},
            message("user", 3, 1),
        ],
        "completion": [message("assistant", 3, 2)],
    }
    rows = [*([{**STRIPPED[0]}] * 1001), strip_instructions(extra)]
    # What is left of the odd one has the fields of the others.
    assert set(rows[-1]["prompt"][0]) == {"role", "content"}
    with pytest.raises(ValueError, match=r"(?s)train dataset does not fit into one table.*mood"):
        make_trainer(tmp_path, Dataset.from_list(rows))


def test_tokenized_data_needs_the_teachers_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenized and has no `teacher_input_ids` and no `teacher_labels`"):
        make_trainer(tmp_path, as_dataset(samples()))


@pytest.mark.parametrize(
    ("labels", "teacher_labels", "message"),
    [
        ([IGNORED, 5, 6, 7], [IGNORED, IGNORED, 6, 7], "3 supervised tokens without instructions, 2 with them"),
        ([IGNORED, 5, 6, 7], [IGNORED, 5, 8, 7], "supervised token 1 is 6 without instructions, 8 with them"),
        ([IGNORED, 5, 6, 7], [5, 6, 7, IGNORED], "begins with a supervised token, which nothing predicts"),
        ([IGNORED, 5, 6, 7], [IGNORED, 5, 6, 7, IGNORED], "has 4 `teacher_input_ids` and 5 `teacher_labels`"),
    ],
)
def test_decisions_that_differ(labels: list[int], teacher_labels: list[int], message: str, tmp_path: Path) -> None:
    dataset = Dataset.from_dict(
        {
            "input_ids": [[4, 5, 6, 7]] * 2,
            "labels": [[IGNORED, 5, 6, 7], labels],
            "teacher_input_ids": [[4, 5, 6, 7]] * 2,
            "teacher_labels": [[IGNORED, 5, 6, 7], teacher_labels],
        }
    )
    with pytest.raises(ValueError, match=f"Sample 1 of the train dataset .*{message}"):
        make_trainer(tmp_path, dataset)


def test_turns_that_differ(tmp_path: Path) -> None:
    dataset = Dataset.from_dict(
        {
            "input_ids": [[4, 5, 6, 7]],
            "labels": [[IGNORED, 5, 6, 7]],
            "teacher_input_ids": [[4, 5, 6, 9, 7]],
            "teacher_labels": [[IGNORED, 5, 6, IGNORED, 7]],
        }
    )
    make_trainer(tmp_path, dataset)
    with pytest.raises(ValueError, match="its turns begin at other tokens"):
        make_trainer(tmp_path, dataset, decision_mode="turns")


def test_instructions_that_the_model_has_no_positions_for(tmp_path: Path) -> None:
    dataset = Dataset.from_dict(
        {
            "input_ids": [[4, 5, 6]],
            "labels": [[IGNORED, IGNORED, 6]],
            "teacher_input_ids": [[4] * 61 + [5, 6]],
            "teacher_labels": [[IGNORED] * 62 + [6]],
        }
    )
    with pytest.raises(ValueError, match="has 63 tokens with its instructions in place, and the model has 60 positio"):
        make_trainer(tmp_path, dataset, sharp(MODEL, max_position_embeddings=60))


def test_a_limit_of_the_students_context_leaves_the_teachers_alone(tmp_path: Path) -> None:
    """Instructions often stand at the start, which a limit drops first."""
    row = CONVERSATIONS[3]
    own = token_ids(STRIPPED[3])
    trainer = make_trainer(tmp_path, Dataset.from_list(STRIPPED[3:]), max_context_length=4)
    cut = Sample(own.input_ids[own.boundary - 4 :], own.labels[own.boundary - 4 :])
    expected = reference_loss(sharp(MODEL), [Pair(cut, token_ids(row))], LOSS)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distill_top_k": -1}, r"`distill_top_k` must be 0 \(all\) or more tokens, found -1"),
        ({"distill_chunk_size": 0}, r"`distill_chunk_size` must be 1 token or more, found 0"),
        ({"distill_temperature": 0.0}, r"`distill_temperature` must be above 0, found 0.0"),
        ({"distill_likelihood_weight": 1.0}, r"`distill_likelihood_weight` must be from 0 to less than 1, found 1.0"),
        ({"distill_divergence": "js"}, r"`distill_divergence` must be one of forward_kl, reverse_kl, jsd, found 'js'"),
        ({"distill_cache_size": "much"}, r"`distill_cache_size`: "),
        ({"packing": True, "max_length": 64}, r"`packing` puts several into one row"),
        ({"padding_free": True}, r"`padding_free` puts several into one row"),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor=0.1` smooths labels"),
    ],
)
def test_configurations_that_cannot_be_distilled(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, loss_type="distill", **fields)


def test_a_field_without_effect_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config(tmp_path, distill_top_k=7)
    assert "No effect of `distill_top_k`: it belongs to `loss_type='distill'`" in caplog.text


def test_models_that_cannot_be_distilled(tmp_path: Path) -> None:
    dataset = Dataset.from_list(STRIPPED)
    with pytest.raises(ValueError, match=r"with its adapters off, for a teacher, and this model has none"):
        make_trainer(tmp_path, dataset, tiny_model(MODEL))
    model = sharp(MODEL)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"base model for a teacher, and training changes `.*norm.weight` of it"):
        make_trainer(tmp_path, dataset, model)
    with (
        pytest.warns(FutureWarning, match="compute_loss_func"),
        pytest.raises(ValueError, match="`compute_loss_func` another one"),
    ):
        FrozenContextTrainer(
            sharp(MODEL),
            config(tmp_path, **LOSS.fields),
            train_dataset=dataset,
            processing_class=word_tokenizer(),
            compute_loss_func=lambda *args, **kwargs: torch.zeros(()),
        )


def test_the_configuration_stays_as_it_was_given(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Dataset.from_list(STRIPPED))
    assert trainer.args.loss_type == "distill"
    arguments = config(tmp_path, **LOSS.fields)
    with pytest.raises(ValueError, match="train dataset has no column"):
        FrozenContextTrainer(
            sharp(MODEL), arguments, train_dataset=Dataset.from_list(CONVERSATIONS), processing_class=word_tokenizer()
        )
    assert arguments.loss_type == "distill"

# SPDX-License-Identifier: Apache-2.0
"""`group_by_context` in the real trainer: order, epochs, several processes and resuming."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from frozen_peft import FrozenContextTrainer
from tests.reference import Sample, random_sample
from tests.training.runs import adapted, as_dataset, config, equal, samples, train, word_tokenizer

NUM_DOCUMENTS = 6
ROWS_PER_DOCUMENT = 4


def row_of(index: int) -> Sample:
    """One of the decisions on a document; documents are interleaved, and the last token says which row it is."""
    document = random_sample(24, 0, seed=index % NUM_DOCUMENTS).input_ids
    question = random_sample(0, 6, seed=100 + index).input_ids
    input_ids = torch.cat([document, question, torch.tensor([10 + index])])
    labels = input_ids.clone()
    labels[:27] = -100
    return Sample(input_ids, labels)


ROWS = as_dataset([row_of(index) for index in range(NUM_DOCUMENTS * ROWS_PER_DOCUMENT)])


def grouping(folder: Path, **fields: Any) -> Any:
    defaults = {"group_by_context": True, "train_sampling_strategy": "random", "gradient_accumulation_steps": 2}
    return config(folder, **(defaults | {"max_steps": -1, "num_train_epochs": 2} | fields))


def documents(rows: Sequence[int], size: int) -> list[set[int]]:
    """The documents of each `size` rows, one after the other."""
    return [{row % NUM_DOCUMENTS for row in rows[place : place + size]} for place in range(0, len(rows), size)]


def flat(batches: Sequence[Sequence[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


class _Recording(FrozenContextTrainer):
    """Keeps the rows of each micro-batch that it trains on."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.seen: list[list[int]] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        self.seen.append([int(labels[labels != -100][-1]) - 10 for labels in inputs["labels"]])
        return super().training_step(model, inputs, *args)


def one_of(num_processes: int, process: int) -> type[_Recording]:
    """A trainer whose batches are those that one of several processes would be handed."""

    class _OneOf(_Recording):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            prepare = self.accelerator.prepare

            def prepare_shard(*objects: Any) -> Any:
                if isinstance(objects[0], DataLoader):
                    return prepare_data_loader(objects[0], num_processes=num_processes, process_index=process)
                return prepare(*objects)

            self.accelerator.prepare = prepare_shard

        def get_total_train_batch_size(self, args: Any) -> int:
            return num_processes * super().get_total_train_batch_size(args)

    return _OneOf


def make(
    folder: Path, dataset: Any, trainer_class: type[FrozenContextTrainer] = FrozenContextTrainer, **fields: Any
) -> FrozenContextTrainer:
    return trainer_class(
        adapted("llama"), grouping(folder, **fields), train_dataset=dataset, processing_class=word_tokenizer()
    )


def run(trainer_class: type[_Recording], arguments: Any, model: Any = None, **kwargs: Any) -> Any:
    return train(trainer_class, copy.deepcopy(model or adapted("llama")), arguments, ROWS, **kwargs)


def test_a_step_trains_the_decisions_on_one_document_and_epochs_differ(tmp_path: Path) -> None:
    seen = run(_Recording, grouping(tmp_path)).trainer.seen
    rows = flat(seen)
    assert all(len(step) == 1 for step in documents(rows, 4))
    first, second = rows[: len(ROWS)], rows[len(ROWS) :]
    assert sorted(first) == sorted(second) == list(range(len(ROWS)))
    assert first != second
    assert run(_Recording, grouping(tmp_path)).trainer.seen == seen
    assert run(_Recording, grouping(tmp_path, data_seed=1)).trainer.seen != seen


def test_the_order_is_the_parents_unless_asked_for(tmp_path: Path) -> None:
    arguments = config(tmp_path, max_steps=2)
    assert run(_Recording, arguments).trainer.seen == [[0, 1], [2, 3]]


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_document_stays_on_one_process(num_processes: int, drop_last: bool, tmp_path: Path) -> None:
    arguments = grouping(tmp_path, num_train_epochs=1, dataloader_drop_last=drop_last)
    seen = [run(one_of(num_processes, process), arguments).trainer.seen for process in range(num_processes)]
    assert all(len(batches) == len(ROWS) // (2 * num_processes) for batches in seen)
    assert all(len(step) == 1 for batches in seen for step in documents(flat(batches), 4))
    assert sorted(row for batches in seen for row in flat(batches)) == list(range(len(ROWS)))


def test_batches_split_over_processes(tmp_path: Path) -> None:
    """With `split_batches` a batch of four is two rows on each of two processes."""
    fields = {"per_device_train_batch_size": 4, "accelerator_config": {"split_batches": True}}
    order = list(make(tmp_path, ROWS, one_of(2, 0), **fields)._get_train_sampler())
    for process in (0, 2):
        places = [place + process + row for place in range(0, len(order), 4) for row in (0, 1)]
        assert all(len(step) == 1 for step in documents([order[place] for place in places], 4))


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """In the middle of the first epoch, between epochs, and in the middle of the second."""
    fields = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    model = adapted()
    whole = run(_Recording, grouping(tmp_path, save_strategy="steps", save_steps=2, **fields), model)
    for stopped_after in (2, 6, 8):
        checkpoint = str(tmp_path / f"checkpoint-{stopped_after}")
        resumed = run(_Recording, grouping(tmp_path, **fields), model, resume=checkpoint)
        assert resumed.trainer.seen == whole.trainer.seen[2 * stopped_after :]
        assert resumed.losses == whole.losses
        assert equal(resumed.weights, whole.weights)


@pytest.mark.parametrize("process", [0, 1])
def test_one_of_several_processes_resumes_its_order_in_the_second_epoch(process: int, tmp_path: Path) -> None:
    trainer_class = one_of(2, process)
    whole = run(trainer_class, grouping(tmp_path, save_strategy="steps", save_steps=1)).trainer.seen
    resumed = run(trainer_class, grouping(tmp_path), resume=str(tmp_path / "checkpoint-4")).trainer.seen
    assert len(whole) == 12
    assert resumed == whole[8:]
    assert whole[2:6] != whole[8:]


def test_contexts_are_compared_as_they_are_kept(tmp_path: Path) -> None:
    """Two tokens of each context follow the document."""
    kept = make(tmp_path, ROWS, max_context_length=18)
    assert all(len(step) == 1 for step in documents(list(kept._get_train_sampler()), 4))
    kept = make(tmp_path, ROWS, max_context_length=17)
    assert any(len(step) > 1 for step in documents(list(kept._get_train_sampler()), 4))


def test_turns_have_what_precedes_the_last_of_them_in_common(tmp_path: Path) -> None:
    """An early turn leaves nothing before the first boundary, and the documents before the last."""
    early = ROWS.map(lambda row: {"labels": row["labels"][:3] + row["input_ids"][3:5] + row["labels"][5:]})
    trainer = make(tmp_path, early)
    assert any(len(step) > 1 for step in documents(list(trainer._get_train_sampler()), 4))
    trainer.args.decision_mode = "turns"
    assert all(len(step) == 1 for step in documents(list(trainer._get_train_sampler()), 4))


def test_a_stream_cannot_be_grouped(tmp_path: Path) -> None:
    stream = ROWS.to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    with pytest.raises(ValueError, match=r"`group_by_context=True` .* found `IterableDataset`"):
        make(tmp_path, stream, max_steps=1)


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length", "batch_rebalance"])
def test_another_order_contradicts_grouping(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`group_by_context=True` and `train_sampling_strategy='{strategy}'`"):
        grouping(tmp_path, train_sampling_strategy=strategy)


def test_grouping_without_frozen_contexts_warns_and_orders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="frozen_peft.config"):
        arguments = grouping(tmp_path, tier=1, num_train_epochs=1)
    assert [record.getMessage() for record in caplog.records if "gradient_horizon=-1" in record.getMessage()]
    seen = run(_Recording, arguments).trainer.seen
    assert all(len(step) == 1 for step in documents(flat(seen), 4))


def test_contexts_with_nothing_in_common_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warnings(dataset: Dataset) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="frozen_peft.training.sampling"):
            make(tmp_path, dataset)._get_train_sampler()
        return [record.getMessage() for record in caplog.records if "no two contexts" in record.getMessage()]

    assert len(warnings(as_dataset(samples()))) == 1
    assert warnings(ROWS) == []

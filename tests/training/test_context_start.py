# SPDX-License-Identifier: Apache-2.0
"""What stays of a context's beginning where its oldest tokens are dropped, against rows that were cut by hand.

The reference runs plain forwards over the cut rows, whose positions run on without a gap.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from frozen_peft import FrozenContextTrainer
from tests.reference import IGNORED, Sample
from tests.training.runs import (
    adapted,
    as_dataset,
    batches,
    config,
    reference_sgd,
    samples,
    train,
    trained_weights,
    word_tokenizer,
    worst_update_error,
)
from tests.training.test_activated import TOKENS, invoked
from tests.training.test_turns import one_sample_per_span

UPDATE_TOLERANCE = 3e-5
LIMIT = 19


def tokenizer() -> PreTrainedTokenizerFast:
    made = word_tokenizer()
    made.bos_token = "w0"
    return made


BOS = tokenizer().bos_token_id
# A system message of nine tokens, with the beginning-of-sequence token before it.
SYSTEM = tokenizer()("w0 <|im_start|> system w1 w2 w3 w4 w5 <|im_end|>")["input_ids"]


def beginning(row: Sample, tokens: list[int]) -> Sample:
    """A row that begins with these tokens, none of them supervised."""
    input_ids = torch.cat([torch.tensor(tokens), row.input_ids[len(tokens) :]])
    return Sample(input_ids, row.labels)


# In every other one something is there to keep.
ROWS = [
    beginning(row, SYSTEM if index % 2 == 0 else [11]) if row.boundary > len(SYSTEM) else row
    for index, row in enumerate(samples())
]


def cut(row: Sample, num_excess: int, keep: str) -> Sample:
    """A row without its oldest tokens, but for what stays."""
    begins = row.input_ids[: len(SYSTEM)].tolist() == SYSTEM
    kept = {"system": len(SYSTEM) if begins else 0, "0": int(begins)}.get(keep)
    kept = int(keep) if kept is None else kept
    if num_excess <= 0:
        return row
    parts = [torch.cat([each[:kept], each[kept + num_excess :]]) for each in (row.input_ids, row.labels)]
    return Sample(*parts)


def trained(rows: list[Sample], folder: Path, **fields: Any) -> dict[str, torch.Tensor]:
    arguments = config(folder, **fields)
    run = train(FrozenContextTrainer, adapted("llama"), arguments, as_dataset(rows), processing_class=tokenizer())
    return run.weights


def assert_trained_on(weights: dict[str, torch.Tensor], steps: list[list[Sample]]) -> None:
    expected = reference_sgd(adapted("llama"), steps)
    assert worst_update_error(weights, expected, trained_weights(adapted("llama"))) <= UPDATE_TOLERANCE


@pytest.mark.parametrize("keep", ["0", "system", "5"])
def test_contexts_beyond_max_context_length(keep: str, tmp_path: Path) -> None:
    rows = [cut(row, row.boundary - LIMIT, keep) for row in ROWS]
    assert max(row.boundary for row in rows) == LIMIT
    weights = trained(ROWS, tmp_path, max_context_length=LIMIT, keep_context_start=keep)
    assert_trained_on(weights, batches(rows, 2, 3))


@pytest.mark.parametrize("horizon", [-1, 12, 4])
def test_the_part_of_the_context_that_carries_gradient(horizon: int, tmp_path: Path) -> None:
    class WithHorizon(Sample):
        @property
        def boundary(self) -> int:
            return 0 if horizon == -1 else max(super().boundary - horizon, 0)

    rows = [cut(row, row.boundary - LIMIT, "system") for row in ROWS]
    fields = {"max_context_length": LIMIT, "keep_context_start": "system", "gradient_horizon": horizon}
    with_horizon = [WithHorizon(row.input_ids, row.labels) for row in rows]
    assert_trained_on(trained(ROWS, tmp_path, **fields), batches(with_horizon, 2, 3))


@pytest.mark.parametrize("tier", [1, 2])
def test_samples_beyond_max_length(tier: int, tmp_path: Path) -> None:
    longest = 30
    rows = [cut(row, len(row.input_ids) - longest, "system") for row in ROWS]
    assert max(len(row.input_ids) for row in rows) == longest
    fields = {"tier": tier, "max_length": longest}
    weights = trained(ROWS, tmp_path, keep_context_start="system", **fields)
    assert torch.equal(
        torch.cat([weight.flatten() for weight in weights.values()]),
        torch.cat([weight.flatten() for weight in trained(rows, tmp_path, **fields).values()]),
    )


@pytest.mark.parametrize("limit", [{"max_length": 30}, {"max_context_length": LIMIT}], ids=str)
@pytest.mark.parametrize("keep", ["0", "system"])
def test_turns_have_each_a_start(keep: str, limit: dict, tmp_path: Path) -> None:
    """Two supervised spans, each behind the beginning of the one conversation."""
    rows = []
    for row in ROWS[:4:2]:
        labels = row.labels.clone()
        labels[14:17] = row.input_ids[14:17]
        rows.append(Sample(row.input_ids, labels))
    weights = trained(rows, tmp_path, decision_mode="turns", max_steps=1, keep_context_start=keep, **limit)
    spans = [span for row in rows for span in one_sample_per_span(row)]
    assert len(spans) == 4
    excess = [
        max(len(span.input_ids) - limit.get("max_length", 999), span.boundary - limit.get("max_context_length", 999))
        for span in spans
    ]
    assert max(excess) > 0
    assert_trained_on(weights, [[cut(span, over, keep) for span, over in zip(spans, excess, strict=True)]])


def test_grouping_sees_contexts_as_they_are_cut(tmp_path: Path) -> None:
    """What the latest tokens alone would bring together does not begin alike."""
    document = list(range(40, 80))
    starts = [[BOS, 20 + index] for index in range(4)]
    ids = [[*start, *document, 12, 13] for start in starts]
    labels = [[IGNORED] * 42 + [12, 13]] * 4
    dataset = Dataset.from_dict({"input_ids": ids, "labels": labels})
    groups = []
    for keep in ("0", "2"):
        arguments = config(tmp_path, group_by_context=True, max_context_length=22, keep_context_start=keep,
                           train_sampling_strategy="random")  # fmt: skip
        trainer = FrozenContextTrainer(
            adapted("llama"), arguments, train_dataset=dataset, processing_class=tokenizer()
        )
        sampler = trainer._get_train_sampler()
        groups.append(len(set(sampler._groups[:, 0].tolist())))
    assert groups == [1, 4]


def test_what_is_cut_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("frozen_peft.training.samples").propagate = True
    trained(ROWS, tmp_path, max_context_length=LIMIT, max_steps=1)
    (line,) = [record.getMessage() for record in caplog.records if "lose" in record.getMessage()]
    over = [row.boundary - LIMIT for row in ROWS if row.boundary > LIMIT]
    tokens = sum(row.boundary for row in ROWS)
    assert line.startswith("`max_context_length=19`: of the train dataset, ")
    assert f"{len(over)} of {len(ROWS)} samples lose {sum(over)} of the {tokens} tokens of their contexts" in line
    caplog.clear()
    trained(ROWS, tmp_path, max_length=30, max_steps=1)
    (line,) = [record.getMessage() for record in caplog.records if "lose" in record.getMessage()]
    over = [len(row.input_ids) - 30 for row in ROWS if len(row.input_ids) > 30]
    assert f"`max_length=30`: of the train dataset, {len(over)} of {len(ROWS)} samples lose {sum(over)} of" in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_context_length": 6}, r"Sample 0 .* begins with 9 tokens that stay .* more than `max_context_length=6`"),
        ({"max_length": 15}, r"Sample 0 .* 9 tokens that stay .* decision are 16, more than `max_length=15`"),
        (
            {"max_length": 15, "decision_mode": "turns"},
            r"Sample 0 .* 9 tokens that stay .* decision are 16, more than `max_length=15`",
        ),
    ],
    ids=str,
)
def test_limits_that_leave_no_room_for_it(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trained(ROWS[:1], tmp_path, keep_context_start="system", **fields)


@pytest.mark.parametrize("keep", ["sys", "-1", "1.5", ""])
def test_values_that_are_none(keep: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`keep_context_start` must be 'system' or a number of tokens, found"):
        config(tmp_path, keep_context_start=keep)
    with pytest.raises(ValueError, match=r"`keep_context_start=20` keeps more tokens than `max_context_length=19`"):
        config(tmp_path, keep_context_start=20, max_context_length=19)


class TestMaxLengthWithInvocation:
    """`context_adapters=False`: a decision begins with the invocation tokens, which are not cut either."""

    def test_cuts_contexts_before_it(self, tmp_path: Path) -> None:
        rows = [invoked(boundary, 5, seed) for seed, boundary in enumerate((30, 41))]
        longest = 5 + len(TOKENS) + 3
        short = [type(row)(row.input_ids[-longest:], row.labels[-longest:]) for row in rows]
        weights = []
        for given, fields in ((rows, {"max_length": longest}), (short, {})):
            arguments = config(tmp_path, context_adapters=False, max_steps=1, **fields)
            weights.append(train(FrozenContextTrainer, adapted("llama"), arguments, as_dataset(given)).weights)
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    @pytest.mark.parametrize("less", [1, len(TOKENS)])
    @pytest.mark.parametrize("boundary", [30, 0])
    def test_names_itself_where_it_is_too_low(self, boundary: int, less: int, tmp_path: Path) -> None:
        needed = 5 + len(TOKENS)
        message = rf"Sample 0 .* has a decision of {needed} tokens, longer than `max_length={needed - less}`"
        with pytest.raises(ValueError, match=message):
            train(
                FrozenContextTrainer,
                adapted("llama"),
                config(tmp_path, context_adapters=False, max_length=needed - less),
                as_dataset([invoked(boundary, 5, 0)]),
            )


def test_rows_do_not_change_where_they_are_cut() -> None:
    """The dataset's own tensors stay as they are."""
    from frozen_peft.context import Cut, cut_batch

    ids, labels = torch.arange(12)[None], torch.arange(12)[None].clone()
    labels[0, :8] = IGNORED
    before = ids.clone(), labels.clone()
    ((decision,),) = cut_batch(ids, labels, None, Cut(max_context_length=3))
    decision.labels.zero_()
    assert torch.equal(ids, before[0])
    assert torch.equal(labels, before[1])
    assert np.array_equal(decision.context, [4, 5, 6])

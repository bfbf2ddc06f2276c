# SPDX-License-Identifier: Apache-2.0
"""Turns behind what inference shows train as one sample per turn, rendered by itself."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import ProcessorMixin

from frozen_peft import FrozenContextTrainer
from frozen_peft.context.branches import fold_branches, unfold_branches
from frozen_peft.training.turn_rendering import TurnRenderer
from tests.reference import Sample, negative_log_likelihood, num_labels, reference_gradients, worst_gradient_error
from tests.tiny_models import ARCHITECTURES, LATENT_ATTENTION, add_lora, tiny_model
from tests.training.runs import Run, config, train
from tests.training.traces import (
    TEMPLATES,
    TRACE_VOCABULARY,
    reasoning_field,
    rendered_turns,
    template_tokenizer,
    trace,
)

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5


def adapted(name: str = "qwen3_5_text") -> Any:
    return add_lora(tiny_model(name, vocab_size=TRACE_VOCABULARY))


def one_step(model: Any, folder: Path, rows: list[dict], template: str = "qwen3", **fields: Any) -> Run:
    """One step over all rows, whose turns stand behind what inference shows."""
    defaults = {"max_steps": 1, "per_device_train_batch_size": len(rows), "router_aux_loss_coef": 0.0}
    arguments = config(folder, decision_mode="turns", turn_contexts="inference", **(defaults | fields))
    tokenizer = template_tokenizer(template)
    return train(FrozenContextTrainer, model, arguments, Dataset.from_list(rows), processing_class=tokenizer)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, turns: list[Sample]) -> float:
    losses = [negative_log_likelihood(model(input_ids=s.input_ids[None]).logits[0], s.labels) for s in turns]
    return float(sum(losses) / num_labels(turns))


def assert_trained_per_turn(run: Run, model: Any, turns: list[Sample]) -> None:
    assert worst_gradient_error(run.gradients[0], reference_gradients(model, turns)) <= GRADIENT_TOLERANCE
    assert run.losses[0] == pytest.approx(mean_loss(model, turns), rel=LOSS_TOLERANCE)


# One of each kind of layer.
ONE_OF_A_KIND = ("llama", "qwen3_5_text", "kimi_linear", "falcon_h1", "lfm2", "gemma3_text", "gpt_oss")
# The last two of those that do something else from a length on: TRL has no head for llama4, and phimoe draws experts.
ALL = (*ARCHITECTURES, *LATENT_ATTENTION, "phi3", "ministral3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ONE_OF_A_KIND else pytest.mark.long) for name in ALL]
)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    rows = [trace(), trace(tools=False)]
    run = one_step(adapted(name), tmp_path, rows, max_decisions_per_forward=3)
    turns = [turn for row in rows for turn in rendered_turns(template_tokenizer("qwen3"), row)]
    assert len(turns) == 8
    assert_trained_per_turn(run, adapted(name), turns)


def refusal(template: str, *, reasoning: bool, tools: bool, system: bool) -> str | None:
    """Why a template that TRL ships has no such conversation."""
    name = template.removesuffix("_training")
    if name == "gemma" and system:
        return "System role not supported"
    if name in ("cohere", "cohere2", "gemma", "gemma3") and tools:
        return "Conversation roles must alternate"
    if name == "llava_next" or (name in ("idefics3", "smolvlm") and tools):
        # They know content in parts alone.
        return "str object"
    if name == "deepseekv3" and tools:
        # Its arguments are text, and behind a second call it forgets the end of the first one's result.
        return "can only concatenate|before the generation prompt"
    return None


@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_every_template_that_trl_ships(template: str) -> None:
    tokenizer = template_tokenizer(template)
    for reasoning, tools, system in itertools.product((False, True), repeat=3):
        row = trace(reasoning=reasoning_field(template) if reasoning else None, tools=tools, system=system)
        if (reason := refusal(template, reasoning=reasoning, tools=tools, system=system)) is not None:
            with pytest.raises(ValueError, match=rf"(?s)`messages\[\d\]`.*({reason})"):
                TurnRenderer(tokenizer).turns(row)
            continue
        # It leaves out the reasoning behind a call once the answer is there, and not while it is written.
        hides_calls = template.startswith("gptoss") and tools and reasoning
        assert_rendered(tokenizer, row, {5 + system: GPT_OSS_ANSWER} if hides_calls else {})


GPT_OSS_ANSWER = (
    "<|channel|>analysis<|message|>so it is seven<|end|>"
    "<|start|>assistant<|channel|>final<|message|>It is seven.<|return|>"
)


class TextProcessor(ProcessorMixin):
    def __init__(self, tokenizer: Any, chat_template: str):
        super().__init__(tokenizer, chat_template=chat_template)


@pytest.mark.parametrize("template", ["idefics3", "llava_next", "qwen2_5_vl", "gemma3"])
def test_a_processor_gets_content_in_parts(template: str) -> None:
    tokenizer, row = template_tokenizer(template), trace(reasoning=None, tools=False)
    turns = TurnRenderer(TextProcessor(tokenizer, str(tokenizer.chat_template))).turns(row)
    parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in row["messages"]]
    for turn, expected in zip(turns, rendered_turns(tokenizer, {"messages": parts}), strict=True):
        assert turn.input_ids == expected.input_ids.tolist()
        assert turn.input_ids[turn.first :] == expected.labels[expected.labels != -100].tolist()


@pytest.mark.parametrize("as_text", [False, True])
def test_deepseek_calls_once(as_text: bool) -> None:
    row = trace(reasoning=None, num_calls=1, as_text=as_text)
    if as_text:
        assert_rendered(template_tokenizer("deepseekv3"), row)
    assert_rendered(template_tokenizer("deepseekv3_training"), row)


def assert_rendered(tokenizer: Any, row: dict[str, Any], written: Mapping[int, str] = {}) -> None:
    """The branches of a row, folded and unfolded, are what its turns are when each is rendered by itself."""
    turns = TurnRenderer(tokenizer).turns(row)
    folded = fold_branches([turn.input_ids for turn in turns], [turn.first for turn in turns])
    made = unfold_branches(*(torch.tensor(folded[name]) for name in ("input_ids", "labels", "branches")))
    expected = rendered_turns(tokenizer, row, written)
    assert len(made) == len(expected) > 0
    for (ids, labels), turn in zip(made, expected, strict=True):
        assert torch.equal(ids, turn.input_ids)
        assert torch.equal(labels, turn.labels)


REASONING = ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "glm4moe", "nemotron_3_nano")
OTHERS = ("gptoss", "lfm2_2_5_v2", "llama3_1", "qwen2_5", "gemma4_v5", "deepseek_r1_distill")
# What a trace with tools is for a template that does not know every one.
TRAINED: dict[str, dict[str, Any]] = {
    **{name: {} for name in (*REASONING, *OTHERS)},
    "deepseekv3": {"reasoning": None, "num_calls": 1, "as_text": True},
    "gemma3": {"tools": False},
}


@pytest.mark.parametrize(
    "template", [pytest.param(name, marks=() if name in ("qwen3", "gptoss") else pytest.mark.slow) for name in TRAINED]
)
def test_templates_train_as_one_sample_per_turn(template: str, tmp_path: Path) -> None:
    """With and without tools, with and without reasoning."""
    own, field = TRAINED[template], reasoning_field(template)
    # A table has the columns of its first row.
    rows = [trace(**({"reasoning": reasoning} | own)) for reasoning in (field, None)]
    rows += [trace(reasoning=reasoning, tools=False) for reasoning in (field, None)]
    written = [{6: GPT_OSS_ANSWER} if template == "gptoss" and row is rows[0] else {} for row in rows]
    tokenizer = template_tokenizer(template)
    turns = [turn for row, own in zip(rows, written, strict=True) for turn in rendered_turns(tokenizer, row, own)]
    run = one_step(adapted(), tmp_path, rows, template)
    assert_trained_per_turn(run, adapted(), turns)


ROWS = [trace(), trace(tools=False), trace(system=False), trace(reasoning=None)]
PER_TURN = [rendered_turns(template_tokenizer("qwen3"), row) for row in ROWS]


@pytest.mark.parametrize(
    "fields",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"group_by_context": True, "train_sampling_strategy": "random"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_decisions_per_forward": 2},
        {"context_cache_size": "1MiB", "prefill_chunk_size": 17},
        {"sequence_chunk_size": 7},
        {"tier": 1},
        {"tier": 1, "sequence_chunk_size": 50},
    ],
    ids=str,
)
def test_fields_that_change_no_gradient(fields: dict[str, Any], tmp_path: Path) -> None:
    run = one_step(adapted(), tmp_path, ROWS, **fields)
    turns = [turn for row in PER_TURN for turn in row]
    if fields.get("tier") == 1:
        # The whole sample carries gradient.
        turns = [WholeSample(turn.input_ids, turn.labels) for turn in turns]
    assert_trained_per_turn(run, adapted(), turns)


class WholeSample(Sample):
    @property
    def boundary(self) -> int:
        return 0


def test_contexts_are_those_of_inference_to_the_limit(tmp_path: Path) -> None:
    limit = 37
    run = one_step(adapted(), tmp_path, ROWS[:1], max_context_length=limit)
    turns = [
        Sample(*(tokens[max(turn.boundary - limit, 0) :] for tokens in (turn.input_ids, turn.labels)))
        for turn in PER_TURN[0]
    ]
    assert_trained_per_turn(run, adapted(), turns)


def test_what_branches_share_is_encoded_once(tmp_path: Path) -> None:
    run = one_step(adapted(), tmp_path, ROWS[:2])
    # What the two rows begin with alike is too short to be shared.
    contexts = [[turn.context.tolist() for turn in row] for row in PER_TURN[:2]]
    num_encoded = sum(map(num_prefixes, contexts))
    assert run.logs[0]["context/tokens_encoded"] == num_encoded
    assert run.logs[0]["context/tokens_reused"] == sum(len(one) for row in contexts for one in row) - num_encoded
    sequences = [[turn.input_ids.tolist() for turn in row] for row in PER_TURN[:2]]
    assert run.logs[0]["num_tokens"] == sum(map(num_prefixes, sequences))


def num_prefixes(sequences: list[list[int]]) -> int:
    """How many different beginnings some sequences have: the nodes of their tree."""
    return len({tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence) + 1)})


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_evaluation_is_that_of_one_sample_per_turn(tmp_path: Path) -> None:
    tokenizer = template_tokenizer("qwen3")
    fields = {"decision_mode": "turns", "turn_contexts": "inference", "max_decisions_per_forward": 3}
    rows = Dataset.from_list(ROWS)
    trainer = FrozenContextTrainer(
        adapted(), config(tmp_path, **fields), train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    batches = [[turn for row in PER_TURN[first : first + 2] for turn in row] for first in (0, 2)]
    expected = sum(mean_loss(adapted(), batch) for batch in batches) / 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=LOSS_TOLERANCE)
    prediction = trainer.predict(trainer.eval_dataset)
    assert [int((labels != -100).sum()) for labels in prediction.label_ids] == list(map(num_labels, PER_TURN))
    # What is prepared is prepared again as it is, and rows of messages are.
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=LOSS_TOLERANCE)


def test_switched_on_at_the_generation_prompt(tmp_path: Path) -> None:
    run = one_step(adapted(), tmp_path, ROWS, context_adapters=False, context_cache_size="1MiB")

    class Activated(Sample):
        @property
        def boundary(self) -> int:
            # `<|im_start|>assistant` and a line break, however many tokens that is.
            return super().boundary + 1 - len(template_tokenizer("qwen3")("<|im_start|>assistant\n")["input_ids"])

    turns = [Activated(turn.input_ids, turn.labels) for row in PER_TURN for turn in row]
    expected = reference_gradients(adapted(), turns, context_adapters=False)
    assert worst_gradient_error(run.gradients[0], expected) <= GRADIENT_TOLERANCE


def test_later_epochs_find_every_branch(tmp_path: Path) -> None:
    fields = {"context_adapters": False, "context_cache_size": "64MiB", "max_steps": 2}
    run = one_step(adapted(), tmp_path, ROWS[:2], **fields)
    first, second = (entry["context/tokens_encoded"] for entry in run.logs)
    assert first > 0 == second

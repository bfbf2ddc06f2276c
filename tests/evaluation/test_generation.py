# SPDX-License-Identifier: Apache-2.0
"""Local candidates against transformers' own `generate`, one prompt at a time and with nothing shared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from frozen_peft.adapters import activate_at_invocation
from frozen_peft.evaluation import Candidate, LocalSampler, PromptRow, SamplingSettings, load_model
from frozen_peft.evaluation.candidates import candidate_seed
from tests.evaluation.checkpoint import write_checkpoint
from tests.tiny_models import add_lora

GREEDY = SamplingSettings(num_candidates=1, temperature=0.0, max_new_tokens=10)
SAMPLED = SamplingSettings(num_candidates=3, max_new_tokens=10)
FACTS = {"role": "system", "content": "The facts are noted in the book of facts. Take the left road."}
PROMPTS: list[Any] = [
    [FACTS, {"role": "user", "content": "Left?"}],
    [FACTS, {"role": "user", "content": "I would rather take the right road."}],
    [{"role": "user", "content": "Right?"}],
    "Once upon a time",
    [FACTS, {"role": "user", "content": "Left?"}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def rows_of(settings: SamplingSettings, prompts: list[Any] = PROMPTS) -> list[PromptRow]:
    return [
        PromptRow(
            index,
            f"p.jsonl, line {index + 1}",
            {"prompt": prompt},
            prompt,
            None,
            tuple(candidate_seed(settings.seed, prompt, index, number) for number in range(settings.num_candidates)),
        )
        for index, prompt in enumerate(prompts)
    ]


def sampled(sampler: LocalSampler, rows: list[PromptRow], **options: Any) -> dict[tuple[int, int], Candidate]:
    found: dict[tuple[int, int], Candidate] = {}
    for batch in sampler.sample(rows, **options):
        for candidate in batch:
            assert (candidate.prompt, candidate.number) not in found
            found[candidate.prompt, candidate.number] = candidate
    return found


def test_greedy_candidates_are_those_of_generate(folder: Path) -> None:
    rows = rows_of(GREEDY)
    found = sampled(LocalSampler(*load_model(str(folder)), GREEDY, batch_size=3), rows)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(found) == len(rows)
    for row in rows:
        text = row.prompt
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=isinstance(row.prompt, str))
        output = model.generate(**inputs, do_sample=False, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :]
        candidate = found[row.index, 0]
        own = output[:-1] if int(output[-1]) == tokenizer.eos_token_id else output
        assert candidate.text == tokenizer.decode(own)
        assert candidate.num_tokens == len(output)
        assert candidate.finish == ("stop" if int(output[-1]) == tokenizer.eos_token_id else "length")


def test_candidates_do_not_hang_on_batches_order_or_what_is_done(folder: Path) -> None:
    rows = rows_of(SAMPLED)
    model, tokenizer = load_model(str(folder))
    expected = sampled(LocalSampler(model, tokenizer, SAMPLED), rows)
    assert len({candidate.text for candidate in expected.values()}) == 15
    for batch_size in (1, 2, 4):
        assert sampled(LocalSampler(model, tokenizer, SAMPLED, batch_size=batch_size), rows) == expected
    sampler = LocalSampler(model, tokenizer, SAMPLED, batch_size=4)
    assert sampled(sampler, rows[::-1]) == expected
    done = {(0, 1), (1, 0), (1, 1), (1, 2), (3, 2)}
    assert sampled(sampler, rows, done=done) == {key: item for key, item in expected.items() if key not in done}
    again = [replace(row, seeds=tuple(seed + 1 for seed in row.seeds)) for row in rows]
    assert not {item.text for item in sampled(sampler, again).values()} & {item.text for item in expected.values()}


def test_what_prompts_share_is_encoded_once(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    sampler = LocalSampler(model, tokenizer, SAMPLED, batch_size=3)
    # In an order in which none of those that begin alike stand together.
    rows = rows_of(SAMPLED, [PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[3], PROMPTS[0]])
    contexts = [sampler._context(sampler._prompt(row)).tokens.tolist() for row in rows]
    shared = next(i for i, (a, b) in enumerate(zip(contexts[0], contexts[2], strict=False)) if a != b)
    assert shared > 16
    forwards: list[int] = []
    original = model.get_decoder().forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        forwards.append(kwargs["input_ids"].numel())
        return original(*args, **kwargs)

    model.get_decoder().forward = counted
    sampled(sampler, rows)
    prefilled = sum(size for size in forwards if size > 3)
    assert prefilled == len(contexts[0]) + len(contexts[2]) - shared + len(contexts[1]) + len(contexts[3])


def test_an_adapter_samples(folder: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(folder))
    add_lora(model).save_pretrained(tmp_path)
    rows = rows_of(GREEDY)
    base = sampled(LocalSampler(*load_model(str(folder)), GREEDY), rows)
    adapted, tokenizer = load_model(str(folder), adapter=str(tmp_path))
    assert sampled(LocalSampler(adapted, tokenizer, GREEDY), rows) != base
    with adapted.disable_adapter():
        assert sampled(LocalSampler(adapted, tokenizer, GREEDY), rows) == base


def test_an_adapter_that_tokens_switch_on_is_refused(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    adapted = add_lora(model)
    activate_at_invocation(adapted, (1,))
    with pytest.raises(ValueError, match="alora_invocation_tokens"):
        LocalSampler(adapted, tokenizer, GREEDY)


def test_an_adapter_with_tokens_of_its_own_is_refused(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    prompted = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="is a PromptTuningConfig, which puts tokens of its own before a context"):
        LocalSampler(prompted, tokenizer, GREEDY)


def test_what_would_not_fit_is_refused_before_sampling(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    rows = rows_of(GREEDY, ["short", "a " * 5000])
    with pytest.raises(ValueError, match=r"line 2: \d+ tokens and `max_new_tokens` 10 are more than the 4096"):
        LocalSampler(model, tokenizer, GREEDY).check(rows)
    LocalSampler(model, tokenizer, GREEDY).check(rows[:1])
    with pytest.raises(ValueError, match="`batch_size` must be 1 candidate or more, got 0"):
        LocalSampler(model, tokenizer, GREEDY, batch_size=0)


def test_a_finished_candidate_ends_where_it_says(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    found = sampled(LocalSampler(model, tokenizer, SAMPLED), rows_of(SAMPLED))
    finished = [item for item in found.values() if item.finish == "stop"]
    assert 0 < len(finished) < len(found)
    assert all(item.num_tokens == 10 for item in found.values() if item.finish == "length")
    assert all(tokenizer.eos_token not in item.text for item in found.values())

# SPDX-License-Identifier: Apache-2.0
"""Scores of probes equal those of plain full forwards, one decision at a time."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from frozen_peft import FrozenContextTrainer
from frozen_peft.data import strip_instructions
from frozen_peft.evaluation import CONDITIONS, Probe, ProbeScores, compare_probes, score_probes, summarize
from frozen_peft.evaluation import decision_scores as decision_scores_module
from frozen_peft.evaluation import probe_scores as probe_scores_module
from frozen_peft.evaluation.probe_tokens import ProbeTokens
from tests.reference import IGNORED, double_precision
from tests.tiny_models import ARCHITECTURES, add_lora, tiny_model, to_double
from tests.training.runs import config, fresh_lora, word_tokenizer, words

TOLERANCE = 1e-5
TOKENIZER = word_tokenizer()
INVOCATION = TOKENIZER("<|im_start|> assistant", add_special_tokens=False)["input_ids"]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def probe(context: int, seed: int, kind: str = "target", *, tokens: tuple[int, int] = (3, 5), **fields) -> Probe:
    """A probe in the context of that number of words; equal numbers give equal contexts."""
    prompt = [said("system", words(context, seed=context)), said("user", words(4, seed=context + 1))]
    preferred, rejected = (words(count, seed=1000 * seed + count) for count in tokens)
    return Probe(prompt, preferred, rejected, kind, id=f"{seed}", place=f"probe {seed}", **fields)


# Several decisions in one context, contexts of a window and more, and one that begins like another.
PROBES = [
    probe(40, 1, tokens=(3, 5)),
    probe(40, 2, "control", tokens=(1, 9)),
    probe(71, 3, tokens=(6, 2)),
    probe(40, 4, tokens=(2, 3)),
    probe(9, 5, "control", tokens=(4, 3)),
    Probe(
        [*probe(40, 6).prompt, said("assistant", "w1 w2"), said("user", words(20, seed=8))],
        "w4 w5",
        "w5",
        "control",
        id="6",
        place="probe 6",
    ),
]


def chat_ids(prompt: list[dict], text: str | None = None) -> list[int]:
    """Tokens up to the assistant's decision, or with it."""
    messages = prompt if text is None else [*prompt, said("assistant", text)]
    ids = TOKENIZER.apply_chat_template(messages, tokenize=True, add_generation_prompt=text is None)
    return list(ids["input_ids"])


@torch.no_grad()
def plain_logprobs(
    model: nn.Module, context: list[int], decision: list[int], *, adapters: bool = True
) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary before each token of a decision, `[tokens, V]`, by one forward."""
    weights = nullcontext() if adapters or not isinstance(model, PeftModel) else model.disable_adapter()
    with weights:
        logits = model(input_ids=torch.tensor([context + decision]), use_cache=False).logits[0]
    return logits[len(context) - 1 : -1].double().log_softmax(-1)


def plain_sum(model: nn.Module, context: list[int], decision: list[int], *, adapters: bool = True) -> float:
    logprobs = plain_logprobs(model, context, decision, adapters=adapters)
    return float(logprobs.gather(-1, torch.tensor(decision)[:, None]).sum())


def assert_as_plain(model: nn.Module, result: ProbeScores, prompts: dict[str, list[int]]) -> None:
    """Every log-probability and KL, against plain forwards behind the prompt of each probe."""
    adapters = result.model == "adapted"
    for score in result.scores:
        own = chat_ids(score.probe.prompt)
        for text, actual in ((score.probe.preferred, score.preferred), (score.probe.rejected, score.rejected)):
            decision = chat_ids(score.probe.prompt, text)[len(own) :]
            context = prompts[score.probe.id]
            expected = plain_sum(model, context, decision, adapters=adapters)
            assert actual.logprob == pytest.approx(expected, rel=TOLERANCE)
            assert actual.num_tokens == len(decision)
            if actual.kl_to_base is not None:
                base, adapted = (plain_logprobs(model, context, decision, adapters=on) for on in (False, True))
                divergence = (base.exp() * (base - adapted)).sum(-1).mean()
                # A difference of log-probabilities of a few nats, which float32 knows to some 1e-7.
                assert actual.kl_to_base == pytest.approx(float(divergence), rel=TOLERANCE, abs=1e-6)
                assert actual.kl_to_base > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_plain_forwards(name: str) -> None:
    model = add_lora(tiny_model(name))
    probes = [PROBES[0], PROBES[1], PROBES[2]]
    results = compare_probes(model, TOKENIZER, probes, ["given"], batch_size=4, prefill_chunk_size=7)
    assert [result.model for result in results] == ["base", "adapted"]
    for result in results:
        assert [score.probe for score in result.scores] == probes
        assert_as_plain(model, result, {one.id: chat_ids(one.prompt) for one in probes})
    has_kl = [[score.kl_to_base is not None for score in result.scores] for result in results]
    assert has_kl == [[False, False, False], [False, True, False]]
    base, adapted = ([score.margin for score in result.scores] for result in results)
    assert all(abs(one - other) > 100 * TOLERANCE * abs(one) for one, other in zip(base, adapted, strict=True))


def test_scores_in_double_precision() -> None:
    """What is left of a difference is not rounding."""
    model = to_double(add_lora(tiny_model("qwen3_5_text")))
    with double_precision(model), torch.no_grad():
        (_, result) = compare_probes(model, TOKENIZER, PROBES[:2], ["given"], prefill_chunk_size=16)
        for score in result.scores:
            context = chat_ids(score.probe.prompt)
            decision = chat_ids(score.probe.prompt, score.probe.preferred)[len(context) :]
            base, adapted = (plain_logprobs(model, context, decision, adapters=on) for on in (False, True))
            expected = float(adapted.gather(-1, torch.tensor(decision)[:, None]).sum())
            assert score.preferred.logprob == pytest.approx(expected, rel=1e-11)
            if score.probe.kind == "control":
                divergence = float((base.exp() * (base - adapted)).sum(-1).mean())
                assert score.preferred.kl_to_base == pytest.approx(divergence, rel=1e-10)


@pytest.mark.parametrize(("name", "batch_size"), [("qwen3_5_text", 3), ("gemma3_text", 1), ("llama", 64)])
def test_every_condition(name: str, batch_size: int) -> None:
    model = add_lora(tiny_model(name))
    instructed = [said("system", "always w7"), *PROBES[0].prompt]
    row = {"prompt": [said("system", "<instruction>always w7</instruction>"), *PROBES[0].prompt]}
    stripped = strip_instructions(row)
    probes = [Probe(PROBES[0].prompt, "w1", "w2 w3", stripped=stripped["stripped"], id="s"), *PROBES]
    assert stripped["prompt"] == probes[0].prompt
    results = compare_probes(model, TOKENIZER, probes, CONDITIONS, batch_size=batch_size, seed=3)
    assert [(result.model, result.condition) for result in results] == [
        (which, condition) for which in ("base", "adapted") for condition in CONDITIONS
    ]
    given = {one.id: chat_ids(one.prompt) for one in probes}
    for result in results:
        if result.condition == "given":
            assert_as_plain(model, result, given)
        elif result.condition == "instructed":
            instructed[0]["content"] = "<instruction>always w7</instruction>"
            assert [score.probe.id for score in result.scores] == ["s"]
            assert_as_plain(model, result, {"s": chat_ids(instructed)})
            assert "1 of 4 target probes" in " ".join(result.notes)
        elif result.condition == "empty":
            assert_as_plain(model, result, dict.fromkeys(given, INVOCATION))
        else:
            moved = ProbeTokens(TOKENIZER, probes).under("shuffled", seed=3)
            prompts = {one.probe.id: one.preferred.prompt.tolist() for one in moved}
            assert_as_plain(model, result, prompts)


def test_a_shuffled_context_is_another_ones_of_the_same_kind() -> None:
    tokens = ProbeTokens(TOKENIZER, PROBES)
    given = {one.id: tuple(chat_ids(one.prompt)) for one in PROBES}
    seen = set()
    for seed in range(8):
        moved = tokens.under("shuffled", seed=seed)
        assert [one.probe for one in moved] == PROBES
        prompts = {one.probe.id: tuple(one.preferred.prompt.tolist()) for one in moved}
        for one in PROBES:
            others = {given[other.id] for other in PROBES if other.kind == one.kind} - {given[one.id]}
            assert prompts[one.id] in others
        # Contexts change places; what shared one still does.
        assert prompts["1"] == prompts["4"]
        assert tokens.under("shuffled", seed=seed)[1].preferred.prompt.tolist() == list(prompts["2"])
        seen.add(prompts["2"])
    assert len(seen) == 2


def test_each_context_is_encoded_once() -> None:
    model = tiny_model("qwen3_5_text")
    probes = [probe(64, seed) for seed in range(6)]
    num_tokens = 0

    def count(module: nn.Module, args: tuple) -> None:
        nonlocal num_tokens
        num_tokens += args[0].numel()

    scorer = decision_scores_module.DecisionScorer(model, batch_size=4)
    tokens = [side for one in ProbeTokens(TOKENIZER, probes).under("given") for side in (one.preferred, one.rejected)]
    scorer._verified = True
    handle = model.get_input_embeddings().register_forward_pre_hook(count)
    scorer.score(tokens, weights=["base"])
    handle.remove()
    context = len(chat_ids(probes[0].prompt)) - 1
    # Decisions of 3 and 5 tokens, their ends, and the token that predicts the first.
    widest = 4 * (5 + 1 + 1)
    assert context + 12 * 2 <= num_tokens <= 3 * context + 3 * widest
    assert scorer.num_tokens_encoded == context


@pytest.mark.parametrize("name", ["qwen3_5_text", "llama"])
def test_contexts_of_the_base_are_kept_in_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another adapter of a base, and the base alone, find what it encoded; another base of that shape does not."""
    scorers: list[decision_scores_module.DecisionScorer] = []

    class Recorded(decision_scores_module.DecisionScorer):
        def __init__(self, *args: object, **fields: object):
            super().__init__(*args, **fields)
            scorers.append(self)

    monkeypatch.setattr(probe_scores_module, "DecisionScorer", Recorded)
    probes = PROBES[:3]
    prompts = {one.id: chat_ids(one.prompt) for one in probes}
    # The last token of a prompt belongs to the decision.
    num_context = sum(len(prompt) - 1 for prompt in {tuple(prompt) for prompt in prompts.values()})

    def base(seed: int = 0) -> PreTrainedModel:
        return tiny_model(name, seed=seed).requires_grad_(False)

    models = [
        (add_lora(base()), 2 * num_context),
        (fresh_lora(base(), init_lora_weights=False), num_context),
        (base(), 0),
        (base(seed=1), num_context),
    ]
    for model, num_encoded in models:
        results = compare_probes(model, TOKENIZER, probes, ["given"], context_cache_dir=tmp_path)
        assert scorers[-1].num_tokens_encoded == num_encoded
        for result in results:
            assert_as_plain(model, result, prompts)
    with pytest.raises(ValueError, match=r"is in training.*requires_grad_\(False\)"):
        compare_probes(tiny_model(name), TOKENIZER, probes, ["given"], context_cache_dir=str(tmp_path))


def test_logits_are_bounded_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_lora(tiny_model("falcon_h1"))
    whole = compare_probes(model, TOKENIZER, PROBES, ["given"])
    widths = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[:-1].numel())
    )
    monkeypatch.setattr(decision_scores_module, "MAX_LOGITS", 4 * 97)
    chunked = compare_probes(model, TOKENIZER, PROBES, ["given"])
    handle.remove()
    # The comparison of the first decision with a plain forward has logits of its own.
    assert widths.count(4) > 10
    assert sorted(widths)[-5] <= 4
    for one, other in zip(whole, chunked, strict=True):
        for left, right in zip(one.scores, other.scores, strict=True):
            assert left.preferred.logprob == pytest.approx(right.preferred.logprob, rel=1e-6)
            if left.preferred.kl_to_base is not None:
                assert left.preferred.kl_to_base == pytest.approx(right.preferred.kl_to_base, rel=1e-5)


def plain_greedy(model: nn.Module, context: list[int], count: int) -> list[int]:
    inputs = torch.tensor([context])
    made = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return made[0, len(context) :].tolist()


@pytest.mark.parametrize("name", ["qwen3_5_text", "llama"])
def test_exact_matches_are_those_of_greedy_generation(name: str) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        # Only words and the end of a turn come out on top, the latter often enough.
        head[[0, 1, 3, *range(88, 97)]] = 0.0
        head[2] *= 2.5
    prompts = [[said("user", words(12, seed=seed))] for seed in range(12)]
    probes, truths = [], []
    for prompt in prompts:
        context = chat_ids(prompt)
        made = plain_greedy(model, context, 6)
        text = TOKENIZER.decode([token for token in made if token != 2])
        variants = {text, f"{text} w3", " ".join(text.split()[:-1]), " ".join([*text.split()[:-1], "w9"])}
        for variant in sorted(variants - {""}):
            ids = chat_ids(prompt, variant)[len(context) :]
            probes.append(Probe(prompt, "w1", "w2", expected=variant, id=str(len(probes))))
            truths.append(plain_greedy(model, context, len(ids)) == ids)
    result = score_probes(model, TOKENIZER, probes, batch_size=16)
    assert [score.is_exact for score in result.scores] == truths
    assert 3 <= sum(truths) <= len(truths) // 2
    figures = summarize(result)["target"].exact_match
    assert (figures.num, figures.total) == (sum(truths), len(truths))


def test_tokens_are_those_of_training(tmp_path: Path) -> None:
    chat = [{"prompt": one.prompt, "completion": [said("assistant", one.preferred)]} for one in PROBES]
    text = [{"prompt": words(7, seed=seed) + " ", "completion": words(3, seed=-seed - 1)} for seed in range(3)]
    for rows in (chat, text):
        trainer = FrozenContextTrainer(
            tiny_model("llama"), config(tmp_path), None, Dataset.from_list(rows), processing_class=TOKENIZER
        )
        probes = [
            Probe(row["prompt"], "w1" if rows is text else one.preferred, "w2 w2", id=str(index))
            for index, (row, one) in enumerate(zip(rows, PROBES, strict=False))
        ]
        if rows is text:
            probes = [Probe(row["prompt"], row["completion"], "w2 w2", id=row["prompt"]) for row in text]
        for own, sample in zip(ProbeTokens(TOKENIZER, probes).under("given"), trainer.train_dataset, strict=True):
            assert [*own.preferred.prompt.tolist(), *own.preferred.decision.tolist()] == sample["input_ids"]
            labels = [IGNORED] * len(own.preferred.prompt) + own.preferred.decision.tolist()
            assert labels == sample["labels"]


def test_a_prompt_that_is_rendered_in_another_way_before_a_decision(tmp_path: Path) -> None:
    """The decision begins where the two diverge, as in training, and a note says so."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- '<|im_start|>assistant ' -}}", "{{- '<|im_start|>assistant w80 ' + (hint or '') -}}"
    )
    row = {"prompt": [said("user", "w5")], "preferred": "w1", "rejected": "w2"}
    row |= {"chat_template_kwargs": {"hint": "w79"}, "tools": "[]"}
    sample = {name: row[name] for name in ("prompt", "chat_template_kwargs", "tools")}
    sample["completion"] = [said("assistant", "w1")]
    trainer = FrozenContextTrainer(
        tiny_model("llama"), config(tmp_path), None, Dataset.from_list([sample]), processing_class=tokenizer
    )
    tokens = ProbeTokens(tokenizer, [Probe.from_row(row)])
    (own,) = tokens.under("given")
    assert trainer.train_dataset[0]["input_ids"] == [*own.preferred.prompt.tolist(), *own.preferred.decision.tolist()]
    assert own.preferred.prompt.tolist() == chat_ids(row["prompt"])
    (note,) = tokens.notes
    assert note.startswith("1 of 1 prompts are tokenized differently")
    (result,) = compare_probes(tiny_model("llama"), tokenizer, [Probe.from_row(row)], ["given"])
    assert result.notes == (note,)


def test_decisions_without_context() -> None:
    """An empty conversation keeps the assistant's header; an empty text leaves the first token unpredicted."""
    model = add_lora(tiny_model("qwen3_5_text"))
    chat = Probe([], "w1 w2", "w3 w4 w5", expected="w1", id="chat")
    text = Probe("", "w1 w2", "w3 w4 w5", expected="w1", id="text")
    first, second = score_probes(model, TOKENIZER, [chat, text]).scores
    for one, actual in (("w1 w2", first.preferred), ("w3 w4 w5", first.rejected)):
        ids = TOKENIZER(f"{one} <|im_end|>", add_special_tokens=False)["input_ids"]
        assert actual.logprob == pytest.approx(plain_sum(model, INVOCATION, ids), rel=TOLERANCE)
    for one, actual in (("w1 w2", second.preferred), ("w3 w4 w5", second.rejected)):
        ids = TOKENIZER(f"{one} <|im_end|>", add_special_tokens=False)["input_ids"]
        assert actual.logprob == pytest.approx(plain_sum(model, ids[:1], ids[1:]), rel=TOLERANCE)
        assert actual.num_tokens == len(ids) - 1
    assert first.is_exact is not None
    assert second.is_exact is None


def test_the_beginning_of_a_sequence_stays_in_an_empty_context() -> None:
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "<unk>"
    tokenizer.chat_template = "<unk> " + tokenizer.chat_template
    (own,) = ProbeTokens(tokenizer, [PROBES[0]]).under("empty")
    assert own.preferred.prompt.tolist() == [3, *INVOCATION]


@pytest.mark.parametrize("name", ["qwen3_5_text", "llama"])
def test_an_adapter_that_an_invocation_switches_on(name: str) -> None:
    """PEFT's own forward of an activated LoRA over the whole sequence gives the same scores."""
    reference = fresh_lora(tiny_model(name), init_lora_weights=False, alora_invocation_tokens=INVOCATION)
    model = fresh_lora(tiny_model(name), init_lora_weights=False, alora_invocation_tokens=INVOCATION)
    model.load_state_dict(reference.state_dict())
    results = compare_probes(model, TOKENIZER, PROBES[:3], ["given", "empty"], batch_size=4)
    given = {one.id: chat_ids(one.prompt) for one in PROBES[:3]}
    for result in results:
        prompts = given if result.condition == "given" else dict.fromkeys(given, INVOCATION)
        assert_as_plain(reference, result, prompts)
    assert results[0].scores[0].margin != pytest.approx(results[2].scores[0].margin, rel=100 * TOLERANCE)


def test_a_decision_must_begin_at_the_invocation() -> None:
    model = fresh_lora(tiny_model("llama"), alora_invocation_tokens=[4, 5])
    with pytest.raises(ValueError, match=r"probe 1: `preferred` \(given\): .*invocation tokens \[4, 5\]"):
        score_probes(model, TOKENIZER, PROBES[:1])


def test_a_model_is_left_as_it_was() -> None:
    model = add_lora(tiny_model("qwen3_5_text", attention_dropout=0.0)).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    compare_probes(model, TOKENIZER, PROBES[:2], ["given"])
    assert all(module.training for module in model.modules())
    assert "forward" not in model.get_base_model().get_decoder().__dict__
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    outputs = model(input_ids=torch.tensor([[4, 5, 6]]))
    assert outputs.logits.requires_grad


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "gpt_oss"])
def test_a_model_in_training(name: str, tmp_path: Path) -> None:
    """With gradient checkpointing, TRL's head and an auxiliary loss, before its adapters moved and after."""
    rows = [{"prompt": one.prompt, "completion": [said("assistant", one.preferred)]} for one in PROBES]
    arguments = config(tmp_path, gradient_checkpointing=True, max_steps=1, learning_rate=1.0)
    trainer = FrozenContextTrainer(
        fresh_lora(tiny_model(name)), arguments, None, Dataset.from_list(rows), processing_class=TOKENIZER
    )
    assert trainer.aux_loss_enabled
    (before,) = (score.margin for score in score_probes(trainer.model, TOKENIZER, PROBES[:1]).scores)
    trainer.train()
    results = compare_probes(trainer.model, TOKENIZER, PROBES[:2], ["given"])
    assert trainer.model.training
    trainer.model.eval()
    for result in results:
        assert_as_plain(trainer.model, result, {one.id: chat_ids(one.prompt) for one in PROBES[:2]})
    base, adapted = (result.scores[0].margin for result in results)
    assert base == pytest.approx(before, rel=TOLERANCE)
    assert adapted != pytest.approx(before, rel=100 * TOLERANCE)


def test_logits_that_are_not_numbers_are_an_error() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[50] = float("nan")
    with pytest.raises(ValueError, match=r"probe 1: `preferred` \(given\): the base model gives its 4 tokens .*NaN"):
        score_probes(model, TOKENIZER, PROBES[:1], batch_size=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preferred": " "}, "`preferred` is ' ', which tokenizes to nothing"),
        ({"rejected": "\n"}, "tokenizes to nothing"),
        ({"preferred": "w1  w2", "rejected": "w1 w2"}, "`preferred` and `rejected` have the same tokens"),
    ],
)
def test_decisions_that_cannot_be_compared(fields: dict, message: str) -> None:
    values = {"prompt": PROBES[0].prompt, "preferred": "w1", "rejected": "w2"} | fields
    bad = Probe(**values, place="probes.jsonl, line 3")
    with pytest.raises(ValueError, match=f"probes.jsonl, line 3: .*{message}"):
        score_probes(tiny_model("llama"), TOKENIZER, [bad])
    problems = []
    (result,) = compare_probes(tiny_model("llama"), TOKENIZER, [bad, PROBES[0]], ["given"], on_bad=problems.append)
    assert [score.probe for score in result.scores] == [PROBES[0]]
    assert len(problems) == 1


def test_conditions_that_cannot_be_had() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="target probes, which have no `stripped`"):
        score_probes(model, TOKENIZER, PROBES, "instructed")
    with pytest.raises(ValueError, match="contexts are all one and the same"):
        score_probes(model, TOKENIZER, PROBES[:1], "shuffled")
    results = compare_probes(model, TOKENIZER, PROBES[:2])
    assert {result.condition: len(result.scores) for result in results} == {
        "given": 2,
        "instructed": 0,
        "shuffled": 0,
        "empty": 2,
    }
    with pytest.raises(ValueError, match="`condition` is one of"):
        score_probes(model, TOKENIZER, PROBES, "shuffeld")


def test_a_probe_longer_than_the_model() -> None:
    with pytest.raises(ValueError, match=r"probe 3: `preferred`.* tokens, where the model has 64 positions"):
        score_probes(tiny_model("llama", max_position_embeddings=64), TOKENIZER, PROBES[2:3])

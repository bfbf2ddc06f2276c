# SPDX-License-Identifier: Apache-2.0
"""A lost or wrong context stops training with an error that says by how much, and what to do."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from frozen_peft import ContextMismatchError, FrozenContextTrainer
from frozen_peft.context import FrozenContext, verify, verify_context
from tests.reference import random_sample
from tests.tiny_models import SLIDING_WINDOW, STATES, add_lora, tiny_model
from tests.training.runs import adapted, as_dataset, config, equal, samples, train

ROWS = samples()
REPORT = re.compile(
    r"`(?P<type>\w+)` does not continue exactly from a frozen context: .*"
    r"error of the decision's log-probabilities is (?P<error>[\d.e+-]+) .*where (?P<tolerance>[\d.e+-]+) is allowed; "
    r".*`tier: 1`.*another architecture, or a newer transformers",
    re.DOTALL,
)


def sabotage(monkeypatch: pytest.MonkeyPatch, change: Callable[[FrozenContext], FrozenContext]) -> None:
    """Spoils every context that the check encodes, and no other."""
    encode = verify.encode_context
    monkeypatch.setattr(verify, "encode_context", lambda *args, **kwargs: change(encode(*args, **kwargs)))


def zeroed(kind: str) -> Callable[[FrozenContext], FrozenContext]:
    return lambda frozen: frozen.mutated(kind, torch.zeros_like)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in ("llama", "mistral", "qwen3_5_text", "lfm2") for k in STATES[n]]
)
def test_a_lost_state_stops_training(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, zeroed(kind))
    with pytest.raises(ContextMismatchError) as caught:
        train(FrozenContextTrainer, adapted(name), config(tmp_path), as_dataset(ROWS))
    report = REPORT.search(str(caught.value))
    assert report, caught.value
    assert report["type"] == name
    assert float(report["error"]) > 10 * float(report["tolerance"]) > 0


@pytest.mark.parametrize("kind", STATES["qwen3_5_text"])
def test_shifted_states_stop_training(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conv inputs move by a token, keys, values and the recurrent state by a feature."""
    sabotage(monkeypatch, lambda frozen: frozen.mutated(kind, lambda state: state.roll(1, dims=-1)))
    with pytest.raises(ContextMismatchError, match="does not continue exactly"):
        train(FrozenContextTrainer, adapted(), config(tmp_path), as_dataset(ROWS))


def test_nothing_has_been_trained_when_the_error_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    sabotage(monkeypatch, zeroed("recurrent"))
    with pytest.raises(ContextMismatchError):
        train(FrozenContextTrainer, model, config(tmp_path), as_dataset(ROWS))
    assert equal(dict(model.state_dict()), before)


def test_evaluation_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(FrozenContextTrainer, adapted(), config(tmp_path, verify_context="always"), as_dataset(ROWS))
    sabotage(monkeypatch, zeroed("keys_values"))
    with pytest.raises(ContextMismatchError):
        run.trainer.evaluate(as_dataset(ROWS))


@pytest.mark.parametrize(("mode", "checks"), [("never", 0), ("first_batch", 1), ("always", 3)])
def test_when_contexts_are_checked(mode: str, checks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def count(model: Any, input_ids: torch.Tensor, boundary: int, **kwargs: Any) -> verify.ContextCheck:
        calls.append(boundary)
        return verify_context(model, input_ids, boundary, **kwargs)

    monkeypatch.setattr("frozen_peft.training.checks.verify_context", count)
    run = train(FrozenContextTrainer, adapted(), config(tmp_path, verify_context=mode), as_dataset(ROWS))
    assert len(run.losses) == 3
    # The sample with the longest context of each batch.
    assert calls == [30, 63, 52][:checks]


def test_the_first_batch_is_the_first_with_a_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = samples([(0, 5), (0, 7), (30, 5), (20, 4), (25, 6), (10, 3)])
    with caplog.at_level(logging.INFO, logger="frozen_peft.training.checks"):
        train(FrozenContextTrainer, adapted(), config(tmp_path), as_dataset(rows))
    lines = [record.getMessage() for record in caplog.records if "agrees with a plain forward" in record.getMessage()]
    assert len(lines) == 1
    assert "num_context_tokens=30" in lines[0]


def test_without_a_check_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, zeroed("recurrent"))
    run = train(FrozenContextTrainer, adapted(), config(tmp_path, verify_context="never"), as_dataset(ROWS))
    assert len(run.losses) == 3


def test_with_full_gradient_there_is_nothing_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, zeroed("recurrent"))
    run = train(FrozenContextTrainer, adapted(), config(tmp_path, tier=1, verify_context="always"), as_dataset(ROWS))
    assert len(run.losses) == 3


def test_a_context_that_the_decision_ignores_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that hardly uses its context loses it within every tolerance, but then nothing moves when it changes."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-7)
    sample = random_sample(40, 9)
    check = verify_context(model, sample.input_ids, sample.boundary)
    assert 0 < check.effect < check.tolerance
    sabotage(monkeypatch, zeroed("keys_values"))
    with pytest.raises(ContextMismatchError, match=r"`llama` has lost its context"):
        verify_context(model, sample.input_ids, sample.boundary)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_5_text"])
def test_the_check_costs_a_bounded_part_of_a_sample(name: str) -> None:
    model = add_lora(tiny_model(name))
    tokens: list[int] = []
    model.get_base_model().get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    heads: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: heads.append(output.shape[-2]))
    sample = random_sample(2000, 90)
    check = verify_context(model, sample.input_ids, sample.boundary)
    # A sliding window is overflown, and so are several chunks of the linear-attention kernels.
    assert SLIDING_WINDOW < check.num_context_tokens <= 300
    assert check.num_decision_tokens == 64
    assert max(tokens) <= check.num_context_tokens + check.num_decision_tokens
    assert max(heads) < check.num_decision_tokens


def test_a_4_bit_or_16_bit_model_has_the_wider_tolerance() -> None:
    sample = random_sample(40, 9)
    exact = verify_context(tiny_model("llama"), sample.input_ids, sample.boundary)
    rounded = verify_context(tiny_model("llama", dtype=torch.bfloat16), sample.input_ids, sample.boundary)
    assert exact.tolerance <= 1e-3
    assert rounded.tolerance == 5e-2
    assert exact.error <= 1e-5 < rounded.error


def test_layers_that_drop_out_by_themselves_are_no_mismatch() -> None:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 3}
    config = OPTConfig(vocab_size=97, num_attention_heads=4, max_position_embeddings=400, dropout=0.5, **sizes)
    model = OPTForCausalLM(config).train()
    model.activation_checkpointing_enable()
    check = verify_context(model, torch.randint(3, 97, (150,)), 120, chunk_size=40)
    assert check.error < 1e-5 < check.effect
    assert model.training

# SPDX-License-Identifier: Apache-2.0
"""With `torch_compile` the parts of decoder layers are compiled, and what is trained is the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

from frozen_peft import FrozenContextTrainer, quantization_config
from frozen_peft.adapters import keep_linear4bit_trainable
from frozen_peft.context import use_segmented_attention
from frozen_peft.context.compiled import compile_layers, not_compiled
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.context.verify import verify_context
from tests.frozen_runs import checkpoint_layers, encode, frozen_gradients
from tests.gradient.stretch_cases import in_stretches, reference
from tests.reference import random_sample, reference_gradients, worst_gradient_error
from tests.tiny_models import ARCHITECTURES, STATES, add_lora, tiny_model
from tests.training.runs import adapted, as_dataset, config, samples, train, word_tokenizer

TOLERANCE = 1e-5
# Traces and differentiates as every backend does, and runs the operations one by one: no compiler is needed.
BACKEND = "aot_eager"
# One layer of each kind, as tracing takes seconds for each.
HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
LONG = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
BATCHES = [
    [random_sample(70, 9, seed=1), random_sample(30, 14, seed=2), random_sample(0, 11, seed=3)],
    [random_sample(65, 5, seed=4), random_sample(20, 7, seed=5)],
]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test compiled, or `TrainingArguments` left in the environment, is not the next one's."""
    for name in ("BACKEND", "MODE"):
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    for name in ("BACKEND", "MODE"):
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}", raising=False)


def compiled(name: str, *, backend: Any = BACKEND, **config_overrides: Any) -> torch.nn.Module:
    model = add_lora(tiny_model(name, **config_overrides))
    use_segmented_attention(model)
    checkpoint_layers(model)
    compile_layers(get_pretrained_model(model), backend=backend)
    return model


def compiled_parts(model: torch.nn.Module) -> list[bool]:
    """Whether each part of a decoder layer is compiled."""
    layers = get_decoder(get_pretrained_model(model)).layers
    return [part._compiled_call_impl is not None for layer in layers for part in layer.children()]


@pytest.mark.slow
def test_gradients_over_a_frozen_context_are_those_of_a_plain_forward_and_a_lost_context_is_seen() -> None:
    """Also with other lengths than it was compiled for; the mutants have states, or keys and values, zeroed."""
    plain, model = add_lora(tiny_model("qwen3_5_text", **HYBRID)), compiled("qwen3_5_text", **HYBRID)
    for rows in BATCHES:
        frozen, expected = encode(model, rows, chunk_size=33), reference_gradients(plain, rows)
        assert worst_gradient_error(frozen_gradients(model, rows, frozen), expected) < TOLERANCE
    for kind in STATES["qwen3_5_text"]:
        lost = frozen.mutated(kind, torch.zeros_like)
        assert worst_gradient_error(frozen_gradients(model, rows, lost), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG) for name in ARCHITECTURES])
def test_any_architecture(name: str) -> None:
    plain, model = add_lora(tiny_model(name)), compiled(name)
    for rows in BATCHES:
        actual = frozen_gradients(model, rows, encode(model, rows, chunk_size=33))
        assert worst_gradient_error(actual, reference_gradients(plain, rows)) < TOLERANCE


def test_prefill_and_plain_checks_run_as_they_are_and_decisions_compiled() -> None:
    counter = CompileCounter()
    model = compiled("llama", backend=counter, num_hidden_layers=1)
    rows = BATCHES[1]
    frozen = encode(model, rows)
    assert counter.frame_count == 0
    frozen_gradients(model, rows, frozen)
    num_compiled = counter.frame_count
    assert num_compiled > 0
    with not_compiled():
        frozen_gradients(model, rows, frozen)
    assert counter.frame_count == num_compiled
    assert all(compiled_parts(model))
    assert verify_context(model, rows[0].input_ids, rows[0].boundary).error < TOLERANCE


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG) for name in ("llama", "qwen3_5_text")])
def test_stretches_of_the_sequence(name: str) -> None:
    rows = BATCHES[1]
    expected = reference(add_lora(tiny_model(name)), rows)
    assert worst_gradient_error(in_stretches(compiled(name), rows, 16), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"tier": 2}, pytest.param({"tier": 3, "sequence_chunk_size": 16, "checkpoint_every": 2}, marks=LONG)]
)
def test_training_gives_the_same_losses_and_gradients(fields: dict[str, Any], tmp_path: Path) -> None:
    """Of every step from the same weights: those of a step before would differ by its rounding."""
    fields = fields | {"learning_rate": 0.0}
    plain, fast = (
        train(
            FrozenContextTrainer,
            adapted("llama", num_hidden_layers=2),
            config(tmp_path, **fields, **options),
            as_dataset(samples()),
        )
        for options in ({}, {"torch_compile": True, "torch_compile_backend": BACKEND})
    )
    assert fast.losses == pytest.approx(plain.losses, rel=TOLERANCE)
    for ours, theirs in zip(fast.gradients, plain.gradients, strict=True):
        assert worst_gradient_error(ours, theirs) < TOLERANCE
    assert all(compiled_parts(fast.trainer.model))
    assert not any(compiled_parts(plain.trainer.model))
    # No wrapper around the model, so that adapters are saved under their own names.
    assert fast.weights.keys() == plain.weights.keys()


def test_a_launcher_that_asks_for_a_compiler_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", BACKEND)
    trainer = FrozenContextTrainer(
        adapted("llama"), config(tmp_path), train_dataset=as_dataset(samples()), processing_class=word_tokenizer()
    )
    assert all(compiled_parts(trainer.model))
    # By accelerate's own way the whole model would be wrapped.
    assert trainer.accelerator.prepare(trainer.model) is trainer.model


def test_what_cannot_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="cannot make one graph"):
        compile_layers(tiny_model("llama"), fullgraph=True)
    monkeypatch.setattr("frozen_peft.context.compiled.GradientCheckpointingLayer", torch.nn.Transformer)
    with pytest.raises(ValueError, match="Set `torch_compile` to False"):
        compile_layers(tiny_model("llama"), backend=BACKEND)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
# Of torch 2.13 itself, where it traces the autograd function of bitsandbytes' 4-bit product.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_over_a_4_bit_base(tmp_path: Path) -> None:
    tiny_model("qwen3_5_text", **HYBRID).save_pretrained(tmp_path)
    quantization = quantization_config(str(tmp_path), bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    model = add_lora(base)
    keep_linear4bit_trainable(model)
    use_segmented_attention(model)
    checkpoint_layers(model)
    rows = BATCHES[0]
    expected = frozen_gradients(model, rows, encode(model, rows))
    compile_layers(get_pretrained_model(model), backend=BACKEND)
    assert worst_gradient_error(frozen_gradients(model, rows, encode(model, rows)), expected) < TOLERANCE

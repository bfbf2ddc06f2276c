# SPDX-License-Identifier: Apache-2.0
"""Architectures that need more than keys and values as they are: right, or refused by name and with the reason."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from frozen_peft import FrozenContextConfig
from frozen_peft.context import use_segmented_attention, verify_context
from frozen_peft.context.capability import reason_against_segments
from frozen_peft.context.dropout import attention_dropout, has_dropout
from frozen_peft.context.models import require_exact_continuation
from frozen_peft.context.segments import is_segmented
from frozen_peft.errors import ContextMismatchError, UnsupportedArchitectureError
from frozen_peft.training.model_setup import check_parts
from tests.frozen_runs import decision_logits, encode, frozen_gradients, frozen_logprobs
from tests.reference import (
    random_sample,
    reference_gradients,
    reference_logprobs,
    relative_error,
    worst_gradient_error,
)
from tests.tiny_models import add_lora, make_every_state_matter, tiny_model

TOLERANCE = 1e-5
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}


def _on_meta(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[name]())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("doge", "attention mask from the cached values .*`dt_proj`"),
        ("mamba", "the mask of the whole sequence"),
        ("falcon_mamba", "the mask of the whole sequence"),
        ("minimax", "MiniMaxCache"),
        ("xlstm", "xLSTMCache"),
        ("cpmant", "prompt tokens in front of every forward"),
        ("xlm", "masks the tokens at hand alone"),
        ("roformer", "positions from the length of its cache"),
        ("glm_moe_dsa", "`DynamicIndexedLayer`"),
    ],
)
def test_an_architecture_that_cannot_continue_is_refused_by_name_and_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=rf"`{name}` .*{reason}.*`tier: 1`"):
        require_exact_continuation(_on_meta(name))


@pytest.mark.parametrize("name", ["moshi", "zamba"])
def test_an_architecture_that_transformers_continues_inexactly_is_refused(name: str) -> None:
    with pytest.raises(ContextMismatchError, match=f"does not continue `{name}` exactly"):
        require_exact_continuation(_on_meta(name))


def test_positions_that_do_not_count_from_zero_are_found_by_the_check() -> None:
    """RoBERTa counts positions from behind its padding token, and so does SFTTrainer's forward of it."""
    config = transformers.RobertaConfig(
        **SMALL, intermediate_size=48, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = transformers.RobertaForCausalLM(config).eval()
    make_every_state_matter(model)
    with pytest.raises(ContextMismatchError, match="`roberta` does not continue exactly"):
        verify_context(model, random_sample(60, 9).input_ids, 60)


def test_attention_to_other_values_than_those_of_the_cache_keeps_its_own_attention() -> None:
    model = add_lora(tiny_model("diffllama"))
    assert reason_against_segments(model.get_base_model()) is None
    assert not use_segmented_attention(model)
    samples = (random_sample(65, 11, seed=0), random_sample(7, 6, seed=1))
    frozen = encode(model, samples, chunk_size=20)
    logprobs = torch.cat([reference_logprobs(model, sample.input_ids, sample.boundary) for sample in samples])
    assert relative_error(frozen_logprobs(model, samples, frozen), logprobs) <= TOLERANCE
    gradients = frozen_gradients(model, samples, frozen)
    assert worst_gradient_error(gradients, reference_gradients(model, samples)) <= TOLERANCE


def test_a_model_of_states_alone_continues_exactly() -> None:
    """Mamba-2 has no attention; transformers 5.23 calls its cache `cache_params`."""
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, "state_size": 16, "chunk_size": 16}
    base = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**fields, num_heads=4, head_dim=16, expand=2, n_groups=1)
    )
    make_every_state_matter(base)
    model = add_lora(base, keep=lambda name: name.endswith("in_proj"))
    samples = (random_sample(65, 11, seed=0), random_sample(7, 6, seed=1))
    frozen = encode(model, samples, chunk_size=20)
    logprobs = torch.cat([reference_logprobs(model, sample.input_ids, sample.boundary) for sample in samples])
    assert relative_error(frozen_logprobs(model, samples, frozen), logprobs) <= TOLERANCE
    gradients = frozen_gradients(model, samples, frozen)
    assert worst_gradient_error(gradients, reference_gradients(model, samples)) <= TOLERANCE
    for kind in ("conv", "recurrent"):
        lost = frozen.mutated(kind, torch.zeros_like)
        assert relative_error(frozen_logprobs(model, samples, lost), logprobs) > 100 * TOLERANCE


DROPOUTS = [
    ("gpt2", {}, "attn_pdrop is 0.1"),
    ("gpt2", {"attn_pdrop": 1}, "attn_pdrop is 1"),
    ("gpt2", {"attn_pdrop": 0}, None),
    ("seed_oss", {}, "attention_dropout is 0.1"),
    ("bert-generation", {}, "attention_probs_dropout_prob is 0.1"),
    ("mpt", {"attn_config": {"attn_pdrop": 1}}, "attn_config.attn_pdrop is 1"),
    ("llama", {}, None),
]


@pytest.mark.parametrize(("name", "fields", "expected"), DROPOUTS)
def test_dropout_of_attention_is_found_under_every_name(name: str, fields: dict, expected: str | None) -> None:
    assert attention_dropout(transformers.CONFIG_MAPPING[name](**fields)) == expected


def test_dropout_of_a_head_for_classification_is_no_dropout_of_a_language_model() -> None:
    model = tiny_model("gpt2")
    assert model.config.summary_first_dropout > 0
    assert not has_dropout(model)
    model.config.resid_pdrop = 0.1
    assert has_dropout(model)


def test_attention_dropout_acts_in_a_decision_over_a_frozen_context() -> None:
    model = add_lora(tiny_model("gpt2", attn_pdrop=0.5))
    assert not use_segmented_attention(model)
    sample = random_sample(30, 9)
    frozen = encode(model, [sample])
    expected = reference_logprobs(model, sample.input_ids, sample.boundary)
    assert relative_error(frozen_logprobs(model, [sample], frozen), expected) <= TOLERANCE
    model.train()
    first, second = (decision_logits(model, [sample], frozen)[0] for _ in range(2))
    assert relative_error(first.detach(), second.detach()) > 1e-2


def test_attention_dropout_under_a_name_nobody_knows_is_found_by_trial() -> None:
    model = tiny_model("gpt2")
    assert use_segmented_attention(copy.deepcopy(model))
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.3
    state = torch.get_rng_state()
    assert not use_segmented_attention(model)
    assert not is_segmented(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("fields", [{"tier": 2}, {"tier": 3, "sequence_chunk_size": 8}])
def test_layers_that_are_dropped_at_random_meet_no_frozen_context_and_no_stretches(fields: dict) -> None:
    config = transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.2)
    model = transformers.OPTForCausalLM(config)
    with pytest.raises(ValueError, match=r"`layerdrop=0\.2` of `opt`"):
        check_parts(model, FrozenContextConfig("out", use_cpu=True, bf16=False, **fields))
    check_parts(model, FrozenContextConfig("out", use_cpu=True, bf16=False, tier=1))

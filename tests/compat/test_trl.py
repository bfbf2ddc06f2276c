# SPDX-License-Identifier: Apache-2.0
"""Whether what stands in for TRL is still needed."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl.trainer.utils
from peft import LoraConfig, get_peft_model
from transformers import GraniteMoeConfig
from trl import DPOTrainer, KTOTrainer, SFTConfig, SFTTrainer

from frozen_peft.utils.compat.trl import (
    complete_head,
    count_tokens,
    has_auxiliary_loss,
    logged_metrics,
    micro_batch_size,
    passing_loss_type,
    precomputed_for,
    trainer_tokenizer,
)
from tests.tiny_models import tiny_model
from tests.training.runs import as_dataset, config, samples, word_tokenizer


def plain_trainer(folder: Path, **fields: object) -> SFTTrainer:
    args = config(folder, SFTConfig, **fields)
    return SFTTrainer(
        tiny_model("llama"), args, train_dataset=as_dataset(samples()), processing_class=word_tokenizer()
    )


def test_figures_tokens_and_the_tokenizer_have_private_names(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    logged_metrics(trainer)["own"].append(1.0)
    before = trainer._total_train_tokens
    count_tokens(trainer, 5)
    assert trainer._total_train_tokens == before + 5
    trainer._train_batch_size = 1
    assert micro_batch_size(trainer) == 1 != trainer.args.train_batch_size
    assert trainer_tokenizer(trainer) is trainer.processing_class
    for name in ("metrics", "total_train_tokens", "tokenizer"):
        assert name not in vars(trainer)
        assert not hasattr(type(trainer), name) or name == "tokenizer"


def test_a_loss_type_of_ones_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_type"):
        plain_trainer(tmp_path, loss_type="distill")
    args = config(tmp_path, SFTConfig, loss_type="distill")
    with passing_loss_type(args, "distill"):
        assert args.loss_type == "nll"
    assert args.loss_type == "distill"


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer])
def test_precomputed_log_probabilities_are_named_by_a_private_digest(trainer: type) -> None:
    """And by it and the rows alone: not by `ld_alpha`, say, which they depend on."""
    source = inspect.getsource(trainer._precompute_ref_logps)
    assert "model_hash = self._precompute_model_hash" in source
    assert "Hasher.hash((dataset._fingerprint, model_hash" in source
    assert "ld_alpha" not in source
    kept = SimpleNamespace(_precompute_model_hash="own")
    with precomputed_for(kept, "facts"):
        assert kept._precompute_model_hash == "own facts"
    assert kept._precompute_model_hash == "own"


def test_a_head_whose_rows_are_trained_has_no_bias_for_trl() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]))
    pretrained = adapted.get_base_model()
    head = pretrained.get_output_embeddings()
    with pytest.raises(AttributeError):
        head.bias  # noqa: B018
    complete_head(adapted, pretrained)
    assert head.bias is None


def test_trl_reads_the_number_of_experts_of_every_model_that_has_an_auxiliary_loss() -> None:
    """Its forward has `text_config.num_experts`, which Granite's configuration has not."""
    assert "num_experts = text_config.num_experts" in inspect.getsource(trl.trainer.utils)
    experts = GraniteMoeConfig(num_local_experts=4)
    assert not hasattr(experts, "num_experts")
    assert has_auxiliary_loss(experts)
    assert experts.num_experts == 4
    assert not has_auxiliary_loss(GraniteMoeConfig(num_local_experts=0, output_router_logits=True))

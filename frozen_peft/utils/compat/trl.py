# SPDX-License-Identifier: Apache-2.0
"""What the trainers of TRL and transformers keep under private names, and where they refuse what they could do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SFTConfig

from frozen_peft.utils.stopwatch import Mode

__all__ = [
    "complete_head",
    "count_tokens",
    "has_auxiliary_loss",
    "logged_metrics",
    "micro_batch_size",
    "passing_loss_type",
    "precomputed_for",
    "trainer_tokenizer",
]


# PRIVATE: `SFTTrainer._metrics`, `DPOTrainer._metrics`, `KTOTrainer._metrics`, trl 1.16.
# Why: what is logged beside the loss is averaged there, per process. Goes when: TRL takes figures from a subclass.
def logged_metrics(trainer: Trainer, mode: Mode | None = None) -> dict[str, list[float]]:
    """Where a trainer collects the figures of training, or of evaluation, until it logs them; None: of what runs."""
    metrics: dict[str, list[float]] = trainer._metrics[mode or ("train" if trainer.model.training else "eval")]
    return metrics


# PRIVATE: `SFTTrainer._total_train_tokens` and `_tp_size`, trl 1.16.
# Why: TRL counts `num_tokens` from the attention mask that the model gets. Goes when: TRL asks a hook.
def count_tokens(trainer: Trainer, num_tokens: int) -> None:
    """Adds tokens of this process, which the model's batch does not hold, to those that `num_tokens` counts."""
    own = torch.tensor(num_tokens, device=trainer.accelerator.device)
    trainer._total_train_tokens += int(trainer.accelerator.gather_for_metrics(own).sum()) // trainer._tp_size


# PRIVATE: `SFTTrainer._tokenizer`, `DPOTrainer._tokenizer`, trl 1.16.
# Why: of a processor the tokenizer is needed, which TRL has found. Goes when: TRL names it.
def trainer_tokenizer(trainer: Trainer) -> PreTrainedTokenizerBase:
    """The tokenizer that a trainer prepares text with."""
    return trainer._tokenizer


# PRIVATE: `Trainer._train_batch_size`, transformers 5.23 and 5.24.
# Why: with `auto_find_batch_size` it is what the training came to, which the arguments do not say. Goes when: they do.
def micro_batch_size(trainer: Trainer) -> int:
    """Samples of a micro-batch, on one process."""
    return trainer._train_batch_size


# PRIVATE: the check of `loss_type` in `SFTTrainer.__init__`, trl 1.16.
# Why: it refuses a loss type that it does not know, and `compute_loss` treats one like "nll", which is what
# distillation builds on. Goes when: TRL lets a subclass name a loss.
@contextmanager
def passing_loss_type(args: SFTConfig, own: str) -> Iterator[None]:
    """Has TRL make a trainer whose loss is `own`, one that it does not know."""
    loss_type = args.loss_type
    if loss_type == own:
        args.loss_type = "nll"
    try:
        yield
    finally:
        args.loss_type = loss_type


# PRIVATE: `DPOTrainer._precompute_model_hash`, `KTOTrainer._precompute_model_hash`, trl 1.16.
# Why: by it and the rows TRL names the file of a reference's log-probabilities, which also depend on what is kept of a
# context. Goes when: TRL lets a subclass say so.
@contextmanager
def precomputed_for(trainer: Trainer, facts: str) -> Iterator[None]:
    """Has a reference's log-probabilities that are computed inside kept for these facts, and found for them alone."""
    own = trainer._precompute_model_hash
    trainer._precompute_model_hash = f"{own} {facts}"
    try:
        yield
    finally:
        trainer._precompute_model_hash = own


# PRIVATE: `lm_head.bias` as `chunked_nll` and the fused head read it, trl 1.16; PEFT 0.21's `TrainableTokensWrapper`.
# Why: TRL asks every head for its `bias`, and PEFT's wrapper of a head whose rows are trained together with the
# embedding's (`trainable_token_indices`, tied) passes on the weight alone. Goes when: either does without.
def complete_head(model: torch.nn.Module, pretrained: PreTrainedModel) -> None:
    """Lets TRL read a head whose rows are trained.

    Raises:
        ValueError: The head is trained as a whole, and some of its rows with the embedding's.
    """
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer) and isinstance(module.get_base_layer(), AuxiliaryTrainingWrapper):
            raise ValueError(
                f"`{name}` is trained as a whole (`modules_to_save`) and row by row (`trainable_token_indices`), and "
                "PEFT cannot run that. TRL asks for both where `chat_template_path` brings tokens and embedding and "
                "head are one matrix. Add the tokens yourself (`trl.clone_chat_template`), pass the model and the "
                "tokenizer that it returns without `chat_template_path`, and train the rows alone "
                "(`lora_config(model, trainable_token_indices=added_tokens)`)."
            )
    head: Any = pretrained.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and getattr(head.original_module, "bias", None) is None:
        head.bias = None


# PRIVATE: the `num_experts` that TRL's auxiliary loss reads, trl 1.16.
# Why: Granite calls it `num_local_experts`, and its dense models (0 experts) declare an auxiliary loss all the same.
# Goes when: TRL knows both.
def has_auxiliary_loss(config: PretrainedConfig) -> bool:
    """Whether a configuration that declares an auxiliary loss has experts, whose number TRL can find afterwards."""
    if not hasattr(config, "num_experts"):
        config.num_experts = config.num_local_experts
    if not config.num_experts:
        config.output_router_logits = False
    return bool(config.num_experts)

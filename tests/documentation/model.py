# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen3.5-style hybrid and its pretraining from scratch, which is tier 1: short samples, full gradient."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

MAX_POSITIONS = 16384


@dataclass(frozen=True)
class ModelSize:
    """Shape of the tiny model.

    Attributes:
        hidden: Width of the residual stream.
        layer_types: One of ``linear_attention`` or ``full_attention`` per layer.
        head_dim: Width of an attention head, of which a quarter is rotated.
        linear_head_dim: Width of keys and values of the Gated DeltaNet layers, which have one head.
    """

    hidden: int = 128
    layer_types: tuple[str, ...] = ("linear_attention", "full_attention", "full_attention")
    head_dim: int = 64
    linear_head_dim: int = 64


def build_model(tokenizer: PreTrainedTokenizerFast, size: ModelSize, *, seed: int = 0) -> Qwen3_5ForCausalLM:
    """Builds the model with random weights that can learn.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        size: Shape of the model.
        seed: Decides the weights.

    Returns:
        The model in float32.
    """
    torch.manual_seed(seed)
    num_heads = size.hidden // size.head_dim
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=len(size.layer_types),
        layer_types=list(size.layer_types),
        num_attention_heads=num_heads,
        num_key_value_heads=max(1, num_heads // 2),
        head_dim=size.head_dim,
        linear_key_head_dim=size.linear_head_dim,
        linear_value_head_dim=size.linear_head_dim,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3_5ForCausalLM(config)
    for module in model.modules():
        if isinstance(module, Qwen3_5GatedDeltaNet):
            _initialize_gates(module)
    return model


def pretrain(
    model: Qwen3_5ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lessons: Dataset,
    output_dir: Path,
    *,
    batch_size: int,
    learning_rate: float = 4e-3,
    seed: int = 0,
) -> float:
    """Trains the model once through the lessons with tier 1 and saves it as an ordinary checkpoint with its tokenizer.

    Args:
        model: Trained in place.
        tokenizer: Saved beside the weights; pads batches.
        lessons: Rows of `input_ids` and `labels`, read in their order.
        output_dir: Where the checkpoint is written.
        batch_size: Samples per optimizer step.
        learning_rate: Peak of the cosine schedule.
        seed: Passed on to the trainer.

    Returns:
        Mean training loss of the last tenth of the steps.
    """
    # The rest of the package needs none of this module, and the trainer takes seconds to import.
    from frozen_peft.config import FrozenContextConfig
    from frozen_peft.training.sft import FrozenContextTrainer

    steps = len(lessons) // batch_size
    args = FrozenContextConfig(
        output_dir=str(output_dir),
        tier=1,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, steps),
        adam_beta2=0.99,
        # The lessons are a curriculum, already in batches of like length.
        train_sampling_strategy="sequential",
        activation_checkpointing=False,
        bf16=False,
        dataloader_pin_memory=False,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = FrozenContextTrainer(model=model, args=args, train_dataset=lessons, processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


def _initialize_gates(layer: Qwen3_5GatedDeltaNet) -> None:
    # flash-linear-attention's initialisation: time steps between 0.001 and 0.1, evenly on a logarithmic scale.
    # transformers 5.23 sets dt_bias to one, with which the state forgets within a token, and nothing that needs a
    # memory can be learned in a short training.
    with torch.no_grad():
        time_step = torch.empty_like(layer.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
        # The inverse of softplus, which the layer applies.
        layer.dt_bias.copy_(time_step + torch.log(-torch.expm1(-time_step)))
        layer.A_log.copy_(torch.empty_like(layer.A_log).uniform_(1, 16).log())

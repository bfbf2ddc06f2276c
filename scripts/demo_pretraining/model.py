# SPDX-License-Identifier: Apache-2.0
"""The demo's model: a Qwen3.5-style hybrid of four layers, Gated DeltaNet and attention in turn, 0.5M weights."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3_5ForCausalLM, Qwen3_5TextConfig

__all__ = ["build_model"]

HIDDEN_SIZE, INTERMEDIATE_SIZE, HEAD_DIM, NUM_LAYERS = 96, 192, 32, 4
OUTPUTS = ("o_proj", "out_proj", "down_proj")
# Contexts go up to two thousand tokens; there is room for more.
MAX_POSITIONS = 8192


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Qwen3_5ForCausalLM:
    """The model with random weights that can learn, in float32.

    Args:
        tokenizer: Gives the size of the vocabulary and the special tokens.
        seed: Decides the weights.
    """
    torch.manual_seed(seed)
    num_heads = HIDDEN_SIZE // HEAD_DIM
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=NUM_LAYERS,
        layer_types=["linear_attention", "full_attention"] * (NUM_LAYERS // 2),
        num_attention_heads=num_heads,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        linear_num_key_heads=num_heads,
        linear_num_value_heads=num_heads,
        linear_key_head_dim=HEAD_DIM,
        linear_value_head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3_5ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _initialize(name, weight)
    return model


def _initialize(name: str, weight: nn.Parameter) -> None:
    """Redraws one weight; norms stay as they are."""
    owner, _, leaf = name.rpartition(".")
    if leaf == "A_log":
        # transformers 5.23 sets dt_bias to one and A up to 16, with which a state forgets within a token, and nothing
        # that needs a memory is learned. This is flash-linear-attention's initialisation, on the slow side.
        nn.init.uniform_(weight, 0.0, 1.0)
    elif leaf == "dt_bias":
        time_step = torch.empty_like(weight).uniform_(0.001, 0.1)
        # The inverse of softplus, which the layer applies.
        weight.copy_(time_step + torch.log(-torch.expm1(-time_step)))
    elif owner.endswith("conv1d"):
        nn.init.normal_(weight, std=0.5)
    elif owner.endswith("embed_tokens"):
        nn.init.normal_(weight, std=1.0)
    elif weight.ndim == 2:
        # At this width the usual 0.02 makes every layer's output vanish. What all layers together add to the residual
        # stream is as large as what is there, as in GPT-2: else their noise hides which token stands where.
        adds = owner.endswith(OUTPUTS)
        nn.init.normal_(weight, std=(weight.shape[1] * (2 * NUM_LAYERS if adds else 1)) ** -0.5)

# SPDX-License-Identifier: Apache-2.0
"""The method without abstractions: encode a context once, train the decision behind it through LoRA.

    python minimal.py

It trains a tiny random hybrid on one made-up sample; a test holds `FrozenContextTrainer` to its loss and gradients.
"""

import inspect

import torch
from peft import LoraConfig, get_peft_model
from transformers import Cache, DynamicCache, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

# What decides how a context is used: queries, outputs and, in Gated DeltaNet layers, gate, beta and decay.
RESPONSE_MODULES = ["q_proj", "o_proj", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
# transformers 5.24 renamed the argument that takes a cache.
CACHE = "cache" if "cache" in inspect.signature(Qwen3_5ForCausalLM.forward).parameters else "past_key_values"


class ReadOnlyAttention(CacheLayerMixin):
    """Keys and values of a context, shape (1, heads, tokens, dim): returned with the new ones, never written."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values

    def lazy_initialization(self, *args):
        raise RuntimeError("read-only")

    def update(self, key_states, value_states, *args, **kwargs):
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    def get_seq_length(self):
        return self.keys.shape[-2]

    def get_mask_sizes(self, query_length):
        return self.keys.shape[-2] + query_length, 0

    def get_max_length(self):
        return -1


class ReadOnlyLinearAttention(LinearAttentionCacheLayerMixin):
    """Conv and recurrent state after a context: where the decision starts from, never written."""

    def __init__(self, conv_state: torch.Tensor, recurrent_state: torch.Tensor):
        super().__init__()
        self.conv_states, self.recurrent_states = {0: conv_state}, {0: recurrent_state}
        self.has_previous_state = {0: True}

    def lazy_initialization(self, *args):
        raise RuntimeError("read-only")

    def update_conv_state(self, conv_states, state_idx=0, **kwargs):
        return torch.cat([self.conv_states[state_idx], conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        return recurrent_states


@torch.no_grad()
def encode_context(model: PreTrainedModel, context: torch.Tensor) -> Cache:
    """Runs the context (1, tokens) once without gradient, and without logits, into a read-only cache."""
    cache = DynamicCache(config=model.config)
    model.eval()  # no dropout; and checkpointing layers would drop the cache in training mode
    model.get_decoder()(input_ids=context, **{CACHE: cache}, use_cache=True)
    model.train()
    layers = [
        ReadOnlyLinearAttention(layer.conv_states[0], layer.recurrent_states[0])
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        else ReadOnlyAttention(layer.keys, layer.values)
        for layer in cache.layers
    ]
    return Cache(layers=layers)


def decision_loss(model: PreTrainedModel, cache: Cache, decision: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of a decision (1, tokens) after its first token, over an encoded context."""
    positions = cache.get_seq_length(layer_idx=0) + torch.arange(decision.shape[1])[None]
    logits = model(input_ids=decision, position_ids=positions, **{CACHE: cache}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), decision[0, 1:])


def allow_checkpointing(model: PreTrainedModel) -> None:
    """A read-only cache gives the same when a layer runs again, so layers may keep it under checkpointing."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True


def main() -> None:
    torch.manual_seed(0)
    layer_types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    config = Qwen3_5TextConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, layer_types=layer_types,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    model = get_peft_model(Qwen3_5ForCausalLM(config), LoraConfig(r=8, target_modules=RESPONSE_MODULES))
    base = model.get_base_model()
    allow_checkpointing(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    sample = torch.randint(config.vocab_size, (1, 1000))
    boundary = 980  # the first supervised token is 981: token 980 predicts it, so the decision begins there
    for step in range(1, 11):
        cache = encode_context(base, sample[:, :boundary])  # again in each step: the adapters have changed
        loss = decision_loss(base, cache, sample[:, boundary:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Computes what training Qwen3.5-27B in NF4 takes at long contexts, by tier, and which cards hold it.

    python -m tests.benchmarks.memory_table

Writes `docs/benchmarks/memory_27b.md`. Nothing here is measured: every figure is a formula over the model's sizes.
"""

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "memory_27b.md"
GIBIBYTE = 1 << 30
CONTEXTS = {"32k": 1 << 15, "128k": 1 << 17, "262k": 1 << 18}
CARDS_GIB = (24, 48, 80)
# What a card has less than its name says: CUDA's own context, kernels, fragmentation.
RESERVE = 1.0 * GIBIBYTE
BF16, FLOAT32 = 2, 4


@dataclass(frozen=True)
class Shape:
    """Sizes of Qwen3.5-27B, as its configuration gives them."""

    num_gdn: int = 48
    num_attention: int = 16
    hidden: int = 5120
    mlp: int = 17408
    query_heads: int = 24
    kv_heads: int = 4
    head_dim: int = 256
    gdn_key_heads: int = 16
    gdn_value_heads: int = 48
    gdn_head_dim: int = 128
    conv_kernel: int = 4
    vocabulary: int = 248320

    @property
    def num_layers(self) -> int:
        return self.num_gdn + self.num_attention

    @property
    def gdn_channels(self) -> int:
        """Queries, keys and values of all heads of a GDN layer."""
        return (2 * self.gdn_key_heads + self.gdn_value_heads) * self.gdn_head_dim

    @property
    def linear_weights(self) -> int:
        """Numbers in the linear layers of all decoder layers, which 4-bit loading quantizes."""
        mlp = 3 * self.hidden * self.mlp
        queries, kv = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        # Queries and their output gate, keys, values, output.
        attention = self.hidden * (2 * queries + 2 * kv + queries)
        values = self.gdn_value_heads * self.gdn_head_dim
        # q, k, v; z; beta and decay; output.
        gdn = self.hidden * (self.gdn_channels + values + 2 * self.gdn_value_heads + values)
        return self.num_layers * mlp + self.num_attention * attention + self.num_gdn * gdn

    @property
    def weight_bytes(self) -> float:
        """NF4 with double quantization (4.127 bits), embeddings and output head in 16 bit."""
        return self.linear_weights * 4.127 / 8 + 2 * self.vocabulary * self.hidden * BF16

    @property
    def key_value_bytes(self) -> int:
        """Keys and values of one token in bf16."""
        return self.num_attention * 2 * self.kv_heads * self.head_dim * BF16

    @property
    def state_bytes(self) -> int:
        """Recurrent states in float32 and convolution states in bf16, of all GDN layers, whatever the length."""
        recurrent = self.gdn_value_heads * self.gdn_head_dim**2 * FLOAT32
        return self.num_gdn * (recurrent + self.gdn_channels * self.conv_kernel * BF16)

    @property
    def mlp_layer_bytes(self) -> int:
        """Activations that one MLP keeps of a token for the backward pass, with LoRA on a 4-bit base, in bf16.

        The normalised input, gate and up projection, the activated gate, their product.
        """
        return (self.hidden + 4 * self.mlp) * BF16

    @property
    def attention_layer_bytes(self) -> int:
        """What an attention layer keeps: input, queries before and after norm and rotation, gate, output."""
        queries, kv = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        return (2 * self.hidden + 6 * queries + 4 * kv) * BF16 + self.mlp_layer_bytes

    @property
    def gdn_layer_bytes(self) -> int:
        """What one GDN layer keeps of a token: input, q, k, v before and after the convolution, z, output, norm."""
        values = self.gdn_value_heads * self.gdn_head_dim
        return (2 * self.hidden + 3 * self.gdn_channels + 4 * values) * BF16 + self.mlp_layer_bytes

    @property
    def activation_bytes(self) -> int:
        """What all layers keep of a token when nothing is recomputed."""
        return self.num_attention * self.attention_layer_bytes + self.num_gdn * self.gdn_layer_bytes

    @property
    def checkpointed_bytes(self) -> int:
        """One hidden state per layer of a token: what layer checkpointing keeps."""
        return self.num_layers * self.hidden * BF16


SHAPE = Shape()
DECISION = 1024
STRETCH = 4096
# LoRA of rank 16 on every linear layer has about 1/250 of its weights; float32 weight, gradient and two moments.
ADAPTER_PARAMETERS = 120e6
ADAPTERS = ADAPTER_PARAMETERS * 4 * FLOAT32
TERMS = (
    "weights",
    "adapters",
    "cache",
    "cache gradient",
    "states at stretch starts",
    "activations",
    "last hidden states",
)
METHODS = (
    "tier 2",
    "tier 3, stretches",
    "tier 3, stretches, keys and values on the host",
    "tier 3, layer checkpointing",
)


def terms(method: str, context: int) -> dict[str, float]:
    """Bytes on the card, by what they are for, while one sample of `context` tokens and its decision is trained.

    Inside a stretch, and in the decision of tier 2, layers are checkpointed: the activations of one layer and one
    hidden state per layer. `cache` and `cache gradient` are of the whole sequence unless they are on the host, where
    the card holds those of one attention layer at a time.
    """
    shape, length = SHAPE, context + DECISION
    per_layer = max(shape.gdn_layer_bytes, shape.attention_layer_bytes)
    cache = shape.key_value_bytes * length + shape.state_bytes
    found = {"weights": shape.weight_bytes, "adapters": ADAPTERS}
    if method == "tier 2":
        found |= {"cache": cache, "activations": DECISION * (shape.checkpointed_bytes + per_layer)}
    elif method == "tier 3, layer checkpointing":
        found |= {"activations": length * (shape.checkpointed_bytes + per_layer)}
    else:
        # Keys, values and their gradients are all there is of attention; states, one per stretch, go to their own sum.
        share = 1 / shape.num_attention if "host" in method else 1.0
        found |= {
            "cache": share * shape.key_value_bytes * length,
            "cache gradient": share * shape.key_value_bytes // BF16 * FLOAT32 * length,
            "states at stretch starts": shape.state_bytes * (1 if "host" in method else -(-length // STRETCH)),
            "activations": STRETCH * (shape.checkpointed_bytes + per_layer),
            "last hidden states": length * shape.hidden * BF16,
        }
    return found


def row(method: str, context: str) -> list[str]:
    """One line of the table."""
    found = terms(method, CONTEXTS[context])
    total = sum(found.values())
    cells = [f"{found[name] / GIBIBYTE:.1f}" if name in found else "" for name in TERMS]
    fits = ["yes" if total + RESERVE <= card * GIBIBYTE else "no" for card in CARDS_GIB]
    return [context, method, *cells, f"**{total / GIBIBYTE:.1f}**", *fits]


def page() -> str:
    """The page, with the formulas behind the table."""
    header = ["context", "method", "weights", "adapters", "cache", "cache gradient", "states", "activations",
              "last hidden", "sum", *(f"{card} GiB" for card in CARDS_GIB)]  # fmt: skip
    lines = [header, ["---"] * len(header)]
    lines += [row(method, context) for context in CONTEXTS for method in METHODS]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    checkpoints = SHAPE.checkpointed_bytes * CONTEXTS["128k"] / 1e9
    per_layer = max(SHAPE.gdn_layer_bytes, SHAPE.attention_layer_bytes)
    return f"""\
# Qwen3.5-27B in NF4 at long contexts, computed

Made by `python -m tests.benchmarks.memory_table`; do not edit. **Nothing here was measured on such a model**: the
figures are formulas over its sizes ({SHAPE.num_gdn} Gated DeltaNet and {SHAPE.num_attention} attention layers, hidden
size {SHAPE.hidden}, MLP {SHAPE.mlp}, {SHAPE.query_heads} query and {SHAPE.kv_heads} key-value heads of
{SHAPE.head_dim}, {SHAPE.gdn_key_heads} key and {SHAPE.gdn_value_heads} value heads of {SHAPE.gdn_head_dim} in GDN,
vocabulary {SHAPE.vocabulary}, embeddings not tied).

One sample per step: a context of that many tokens and a decision of {DECISION}. GiB on the card. The cards' columns
say whether the sum and {RESERVE / GIBIBYTE:.0f} GiB for CUDA, kernels and fragmentation fit.

{table}

- *weights*: {SHAPE.linear_weights / 1e9:.1f}e9 numbers of linear layers at 4.127 bits (NF4, double quantization);
  embeddings and output head in 16 bit.
- *adapters*: an allowance for {ADAPTER_PARAMETERS / 1e6:.0f}M LoRA parameters; weight, gradient and two moments in
  float32.
- *cache*: {SHAPE.key_value_bytes / 1024:.0f} KiB of keys and values per token in bf16; with tier 2 also the states,
  {SHAPE.state_bytes / (1 << 20):.0f} MiB whatever the length. With keys and values on the host, the card holds one
  attention layer's at a time, and the host the rest of this column and the next.
- *cache gradient*: keys and values once more in float32, twice the cache.
- *states*: what each stretch of {STRETCH} tokens starts from, {SHAPE.state_bytes / (1 << 20):.0f} MiB for each; with
  keys and values on the host, these are there too, but for one. It is what speaks against short stretches: halving
  them doubles this column.
- *activations*: one hidden state per layer and token ({SHAPE.checkpointed_bytes / 1024:.0f} KiB) and the inside of one
  layer ({per_layer / 1024:.0f} KiB per token) for the tokens that are in memory at a time: the decision (tier 2), a
  stretch, or the whole sequence (layer checkpointing: {checkpoints:.0f} GB at 128k for the hidden states alone).
  Without checkpoints inside a stretch it would be {SHAPE.activation_bytes * STRETCH / GIBIBYTE:.0f} GiB for one of
  {STRETCH} tokens. The inside of a layer is counted from the model's equations; a kernel's own buffers, and rows of
  logits, which are computed in blocks, are not in it.
- *last hidden*: the outputs of the last layer of all tokens in bf16, which the loss reads.

The least certain terms are the activations, and with the host the time for the copies. `python -m
tests.benchmarks.full_gradient` measures on a small model what these formulas say of memory per token.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(page())

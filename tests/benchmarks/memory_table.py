# SPDX-License-Identifier: Apache-2.0
"""Plans what training Qwen3.5-27B in NF4 takes at long contexts, by tier, and which cards hold it.

    python -m tests.benchmarks.memory_table

Writes `docs/benchmarks/memory_27b.md`. Nothing here is measured: every figure is the planner's (`docs/planning.md`).
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

from frozen_peft.planning import Plan, Setting, load_config, make_plan
from tests.benchmarks.tables import markdown_table

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "memory_27b.md"
GIBIBYTE = 1 << 30
MODEL = "Qwen/Qwen3.5-27B"
CONTEXTS = {"32k": 1 << 15, "128k": 1 << 17, "262k": 1 << 18}
CARDS_GIB = (24, 48, 80)
DECISION = 1024
STRETCH = 4096
TIER_2 = Setting(2, 0, DECISION, load_in_4bit=True)
TIER_3 = replace(TIER_2, tier=3)
METHODS = {
    "tier 2": TIER_2,
    "tier 3, stretches": replace(TIER_3, sequence_chunk_size=STRETCH),
    "tier 3, stretches, handed on by the host": replace(TIER_3, sequence_chunk_size=STRETCH, offload_stretches=True),
    "tier 3, layer checkpointing": TIER_3,
}
# Columns of the table, each the sum of some terms.
COLUMNS = {
    "weights": ("weights",),
    "adapters": ("adapters", "gradients", "optimizer"),
    "cache": ("cache",),
    "cache gradient": ("cache gradient",),
    "last hidden": ("last hidden states",),
    "activations": ("activations",),
    "workspace": ("workspace",),
    "reserve": ("reserve",),
}


@cache
def plan(method: str, context: str) -> Plan:
    """The plan of one line of the table."""
    return make_plan(load_config(MODEL), replace(METHODS[method], context_length=CONTEXTS[context]))


def row(method: str, context: str) -> list[str]:
    """One line of the table."""
    found = plan(method, context)
    sums = [sum(found.terms.get(term, 0) for term in terms) for terms in COLUMNS.values()]
    fits = ["yes" if found.total_bytes <= card * GIBIBYTE else "no" for card in CARDS_GIB]
    return [
        context,
        method,
        *(f"{size / GIBIBYTE:.1f}" if size else "" for size in sums),
        f"**{found.total_bytes / GIBIBYTE:.1f}**",
        f"{found.host_bytes / GIBIBYTE:.1f}" if found.host_bytes else "",
        *fits,
    ]


def page() -> str:
    """The page."""
    header = ["context", "method", *COLUMNS, "sum", "host", *(f"{card} GiB" for card in CARDS_GIB)]
    rows = [row(method, context) for context in CONTEXTS for method in METHODS]
    first = plan("tier 2", "32k")
    assert first.num_parameters is not None
    assert first.cache_token_bytes is not None
    return f"""\
# Qwen3.5-27B in NF4 at long contexts, planned

Made by `python -m tests.benchmarks.memory_table`; do not edit. **Nothing here was measured on such a model**: the
figures are the planner's, from the configuration of its text model ({first.num_parameters:,} parameters), with the
adapters of the preset `response` in rank 16 and flash-linear-attention's kernels.

One sample per step: a context of that many tokens and a decision of {DECISION}. GiB on the card, and of host memory.
The cards' columns say whether the sum fits, 1 GiB (assumed) for the driver, kernels and fragmentation in it.

{markdown_table(header, rows, num_words=2)}

- *weights*: linear layers in NF4 with double quantization (4.127 bits); embeddings, output head, beta and decay in
  16 bit.
- *adapters*: weight, gradient and two moments in bfloat16, as TRL has them on a 4-bit base.
- *cache*: tier 2: {first.cache_token_bytes / 1024:.0f} KiB of keys and values per context token, and the states of
  linear attention, whatever the length. In stretches of {STRETCH}: keys and values of all tokens, and the states that
  each stretch starts from, which is what speaks against short ones; on the host, the card has one set of states.
- *cache gradient*: of keys and values before the last stretch, in float32.
- *last hidden*: the outputs of the last layer for the decision and their gradient, for the loss behind the stretches.
- *activations*: layer checkpointing: a hidden state per layer and token. Tier 2: the same of the decision. Stretches:
  of one stretch, with the inside of the layer that is computed again.
- *workspace*: the inside of the layer that is computed again, a prefill chunk, tiles of logits, an unpacked 4-bit
  weight, blocks of attention scores: the most that is held at a time beyond the other columns.

How the planner counts, and how it compares with what was measured on a CPU, is in [planning.md](../planning.md).
"""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(page())

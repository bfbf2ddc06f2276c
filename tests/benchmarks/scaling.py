# SPDX-License-Identifier: Apache-2.0
"""What a sample costs on one GPU and on many, by how often its context is reused: a model in closed form.

Every time is operations or bytes divided by a stated rate; nothing here was measured on a GPU. The shape of the model,
in which a sample takes the prefill divided by the reuse ratio and a decision, is checked in `checked` against what was
measured on a CPU (`docs/benchmarks/reuse.json`).

One sample is a context of C tokens and a decision of D; r samples have the same context.

| time | formula |
| --- | --- |
| prefill | operations / rate + (C / chunk) x dequantization |
| decision | (3 x linear + 3.5 x attention + 4 x delta rule) / rate + 3 x dequantization |
| `SFTTrainer` | (3 x linear + 4.5 x attention + 4 x delta rule) of C + D tokens / rate + 3 x dequantization |
| read of a context | its bytes / network, and not faster than the store can give to all |

Layers are computed twice, and their backward pass has one product for each of frozen linear weights, two and a half of
attention (one and a half where keys and values are constants) and two of the delta rule, against one forward.
Dequantization reads the 4-bit weights and writes them in 16 bit, once per forward, recomputation or backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from tests.benchmarks.gpu.flops import (
    attention_flops,
    delta_rule_flops,
    linear_weights_per_token,
    prefill_flops,
)

Arrangement = Literal["own contexts, samples scattered", "own contexts, samples grouped", "shared store", "SFTTrainer"]
ARRANGEMENTS: tuple[Arrangement, ...] = (
    "own contexts, samples scattered",
    "own contexts, samples grouped",
    "shared store",
    "SFTTrainer",
)
BF16, FLOAT32 = 2, 4
NF4_BYTES = 4.127 / 8


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and what connects it: of an H100 SXM as its data sheet gives them, times assumed shares.

    Attributes:
        peak_flops: Of 16-bit products without sparsity (data sheet).
        utilisation: Share of it that prefill reaches (assumed).
        memory_bytes_per_second: Of the GPU's memory (data sheet).
        network_bytes_per_second: Of one GPU's link to others and to the store: 400 Gbit/s (assumed).
        store_bytes_per_second: Of the shared store, to all readers together (assumed).
    """

    peak_flops: float = 989e12
    utilisation: float = 0.4
    memory_bytes_per_second: float = 3.35e12
    network_bytes_per_second: float = 50e9
    store_bytes_per_second: float = 1e12

    @property
    def rate(self) -> float:
        return self.peak_flops * self.utilisation


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        config: Of the model.
        context: Context tokens of a sample.
        decision: Decision tokens.
        chunk: Context tokens per prefill forward.
        adapter_bytes: Gradients that are reduced once per optimizer step.
        samples_per_step: Samples that a GPU accumulates per optimizer step.
        is_quantized: Linear weights are in NF4.
    """

    config: PretrainedConfig
    context: int = 1 << 15
    decision: int = 256
    chunk: int = 2048
    adapter_bytes: float = 120e6 * FLOAT32
    samples_per_step: int = 8
    is_quantized: bool = True

    @property
    def context_bytes(self) -> float:
        """An encoded context: keys and values in 16 bit, recurrent states in float32, convolution states in 16 bit."""
        config, kinds = self.config, self.config.layer_types
        num_gdn = kinds.count("linear_attention")
        per_token = (len(kinds) - num_gdn) * 2 * config.num_key_value_heads * config.head_dim * BF16
        value_heads, key_dim = config.linear_num_value_heads, config.linear_key_head_dim
        recurrent = value_heads * key_dim * config.linear_value_head_dim * FLOAT32
        channels = 2 * config.linear_num_key_heads * key_dim + value_heads * config.linear_value_head_dim
        states = num_gdn * (recurrent + channels * config.linear_conv_kernel_dim * BF16)
        return per_token * self.context + states


def dequantization_seconds(work: Workload, machine: Machine) -> float:
    """All weights once from 4 to 16 bit: read, written, and read again by the product that follows."""
    if not work.is_quantized:
        return 0.0
    weights = linear_weights_per_token(work.config)
    return weights * (NF4_BYTES + 2 * BF16) / machine.memory_bytes_per_second


def prefill_seconds(work: Workload, machine: Machine) -> float:
    num_chunks = -(-work.context // work.chunk)
    flops = prefill_flops(work.config, work.context).total
    return flops / machine.rate + num_chunks * dequantization_seconds(work, machine)


def decision_seconds(work: Workload, machine: Machine) -> float:
    config, kinds = work.config, work.config.layer_types
    num_gdn = kinds.count("linear_attention")
    pairs = work.decision * work.context + work.decision * (work.decision + 1) / 2
    flops = (
        3.0 * 2 * work.decision * linear_weights_per_token(config)
        + 3.5 * (len(kinds) - num_gdn) * attention_flops(config, pairs)
        + 4.0 * num_gdn * delta_rule_flops(config, work.decision)["total"]
    )
    return flops / machine.rate + 3 * dequantization_seconds(work, machine)


def sft_seconds(work: Workload, machine: Machine) -> float:
    flops = prefill_flops(work.config, work.context + work.decision)
    passes = 3.0 * flops.linear + 4.5 * flops.attention + 4.0 * (flops.delta_rule + flops.convolution)
    return passes / machine.rate + 3 * dequantization_seconds(work, machine)


def reduction_seconds(work: Workload, machine: Machine, num_gpus: int) -> float:
    """Of the gradients' reduction (a ring sends them twice), per sample of one GPU."""
    if num_gpus == 1:
        return 0.0
    sent = 2 * work.adapter_bytes * (num_gpus - 1) / num_gpus
    return sent / machine.network_bytes_per_second / work.samples_per_step


def cost(arrangement: Arrangement, work: Workload, machine: Machine, num_gpus: int, reuse: int) -> float:
    """GPU-seconds per sample.

    Args:
        arrangement: Who encodes a context, and for whom.
        work: What is trained.
        machine: The rates.
        num_gpus: How many train, and encode.
        reuse: Samples with the same context.
    """
    reduced = reduction_seconds(work, machine, num_gpus)
    if arrangement == "SFTTrainer":
        return sft_seconds(work, machine) + reduced
    prefill, decision = prefill_seconds(work, machine), decision_seconds(work, machine)
    if arrangement == "own contexts, samples grouped":
        return prefill / reuse + decision + reduced
    if arrangement == "own contexts, samples scattered":
        # Every GPU that has a sample of a context encodes it.
        return prefill * min(num_gpus, reuse) / reuse + decision + reduced
    if num_gpus == 1:
        return prefill / reuse + decision
    # Encoded once by any of them, written once; each sample's read hides behind the decision before it.
    written = work.context_bytes / machine.network_bytes_per_second / reuse
    read = work.context_bytes / machine.network_bytes_per_second
    own = prefill / reuse + written + max(decision, read) + reduced
    # The store gives so many contexts a second to all GPUs together.
    return max(own, num_gpus * work.context_bytes / machine.store_bytes_per_second)


def gpus_that_the_store_feeds(work: Workload, machine: Machine, reuse: int) -> float:
    """GPUs beyond which reading contexts is what a sample costs."""
    return cost("shared store", work, machine, 2, reuse) * machine.store_bytes_per_second / work.context_bytes


@dataclass(frozen=True)
class Check:
    """One measurement and what the model says of it, in seconds of processor time per sample."""

    what: str
    measured: float
    modelled: float

    @property
    def deviation(self) -> float:
        return self.modelled / self.measured - 1


def checked(figures: Sequence[dict[str, Any]], config: PretrainedConfig) -> list[Check]:
    """The shape of the model against `reuse.json`: two of its figures give the two times, the others are predicted.

    A first epoch of the store is a prefill of 4,096 tokens and a decision, a later one a decision. Prefills of other
    lengths follow by their operations; a decision of the same length is taken to cost the same over any context.

    Args:
        figures: What was measured.
        config: Of the model it was measured on.
    """
    found = {(row["scenario"], row["method"]): row for row in figures if "scenario" in row}
    epochs, document = found["epochs", "store"], found["document", "shared"]
    decision = epochs["cpu_seconds"]
    first = epochs["first_epoch"]["cpu_seconds"]
    prefill = first - decision
    document_reuse = document["decisions"]
    turns, naive = found["conversation", "turns"], found["conversation", "naive"]
    num_turns, length = turns["decisions"], turns["context"]
    turn = length // num_turns
    boundaries = [turn * (index + 1) - 64 for index in range(num_turns)]

    def seconds(tokens: int) -> float:
        return prefill * prefill_flops(config, tokens).total / prefill_flops(config, epochs["context"]).total

    return [
        Check(
            f"{document_reuse} decisions on one document", document["cpu_seconds"], prefill / document_reuse + decision
        ),
        Check(
            f"{num_turns} turns, encoded once", turns["cpu_seconds"], seconds(boundaries[-1]) + num_turns * decision
        ),
        Check(
            f"{num_turns} turns, each encoded anew",
            naive["cpu_seconds"],
            sum(map(seconds, boundaries)) + num_turns * decision,
        ),
    ]

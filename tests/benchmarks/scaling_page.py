# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and the plot of `docs/scaling.md`: computed, and said to be.

python -m tests.benchmarks.scaling_page
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.gpu.flops import prefill_flops
from tests.benchmarks.gpu.shapes import qwen3_5_27b
from tests.benchmarks.scaling import (
    ARRANGEMENTS,
    Check,
    Machine,
    Workload,
    checked,
    cost,
    decision_seconds,
    dequantization_seconds,
    gpus_that_the_store_feeds,
    prefill_seconds,
    sft_seconds,
)
from tests.benchmarks.tables import markdown_table

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"
GPUS = (1, 8, 64, 256, 1024)
REUSE = (1, 3, 10, 30, 100)
CONTEXTS = (1 << 12, 1 << 15, 1 << 17, 1 << 18)
CHUNKS = (512, 2048, 8192)
GIBIBYTE = 1 << 30


def page(checks: Sequence[Check]) -> str:
    """The page, every figure of which follows from the formulas and rates it names."""
    work, machine = Workload(qwen3_5_27b()), Machine()
    return f"""\
# Cost per sample, from one GPU to 1024, computed

Made by `python -m tests.benchmarks.scaling_page`; do not edit. **Nothing here was measured on a GPU.** The formulas
are those of `tests/benchmarks/scaling.py`; what they start from is stated: {machine.peak_flops / 1e12:.0f} TFLOP/s and
{machine.memory_bytes_per_second / 1e12:.2f} TB/s (data sheet of an H100 SXM), of the former a share of
{machine.utilisation:.2f} (assumed), {machine.network_bytes_per_second / 1e9:.0f} GB/s of network for each GPU and a
store of {machine.store_bytes_per_second / 1e12:.0f} TB/s for all (assumed). Model: Qwen3.5-27B in NF4; contexts of
{work.context:,} tokens, decisions of {work.decision}, chunks of {work.chunk:,}, {work.samples_per_step} samples per
GPU and optimizer step.

![GPU-seconds per sample](scaling.png)

## GPU-seconds per sample

By how many samples have the same context.

{_cost_table(work, machine)}

- *scattered*: samples come to GPUs in any order, and every GPU that has one of a context encodes it.
- *grouped*: all samples of a context come to one GPU (`group_by_context`). It takes as many contexts as GPUs.
- *shared store*: a context is encoded by one GPU, whichever, and read by the others while they compute.

## One context, by length

{_context_table(work, machine)}

*Store feeds*: GPUs beyond which reading contexts from the shared store takes longer than computing, at a reuse of 10
and of 100.

## Chunks of the prefill

Each chunk dequantizes every weight once: {dequantization_seconds(work, machine) * 1e3:.0f} ms for one that is read in
4 bit, written in 16 and read again.

{_chunk_table(work, machine)}

## The shape of the model against what was measured

On a CPU ([reuse.md](reuse.md)), in seconds of processor time per sample. Two of the figures there, the first epoch and
a later one, give the time of a prefill of 4,096 tokens and of a decision; the others are predicted from these.

{_check_table(checks)}

A turn costs less than predicted, since a conversation's decisions run several in one forward.
"""


def _cost_table(work: Workload, machine: Machine) -> str:
    rows = [
        (arrangement, f"{num_gpus}", *(f"{cost(arrangement, work, machine, num_gpus, r):.2f}" for r in REUSE))
        for arrangement in ARRANGEMENTS
        for num_gpus in (GPUS if arrangement != "SFTTrainer" else (1, 1024))
    ]
    return markdown_table(("", "GPUs", *(f"reuse {r}" for r in REUSE)), rows, 1)


def _context_table(work: Workload, machine: Machine) -> str:
    rows = []
    for context in CONTEXTS:
        one = replace(work, context=context)
        rows.append(
            (
                f"{context:,}",
                f"{prefill_flops(one.config, context).total / 1e15:.2f}",
                f"{prefill_seconds(one, machine):.2f}",
                f"{decision_seconds(one, machine):.2f}",
                f"{sft_seconds(one, machine):.1f}",
                f"{one.context_bytes / GIBIBYTE:.2f}",
                f"{one.context_bytes / machine.network_bytes_per_second:.3f}",
                f"{gpus_that_the_store_feeds(one, machine, 10):,.0f}",
                f"{gpus_that_the_store_feeds(one, machine, 100):,.0f}",
            )
        )
    header = ("context", "prefill PFLOP", "prefill s", "decision s", "SFTTrainer s", "GiB", "network s",
              "store feeds, 10", "store feeds, 100")  # fmt: skip
    return markdown_table(header, rows)


def _chunk_table(work: Workload, machine: Machine) -> str:
    rows = []
    for chunk in CHUNKS:
        one = replace(work, chunk=chunk)
        all_seconds = -(-work.context // chunk) * dequantization_seconds(one, machine)
        whole = prefill_seconds(one, machine)
        rows.append((f"{chunk:,}", f"{whole:.2f}", f"{all_seconds:.2f}", f"{all_seconds / whole:.0%}"))
    return markdown_table(("prefill_chunk_size", "prefill s", "dequantization s", "share"), rows)


def _check_table(checks: Sequence[Check]) -> str:
    rows = [(one.what, f"{one.measured:.2f}", f"{one.modelled:.2f}", f"{one.deviation:+.0%}") for one in checks]
    return markdown_table(("", "measured", "model", "off by"), rows, 1)


def draw(path: Path) -> None:
    """Two panels: cost by reuse on 64 GPUs, cost by GPUs at a reuse of 30."""
    from matplotlib.figure import Figure

    work, machine = Workload(qwen3_5_27b()), Machine()
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_reuse, by_gpus = figure.subplots(1, 2, sharey=True)
    # Two of them coincide while the store keeps up: a larger mark shows below a smaller one.
    styles, sizes = ("s--", "o-", "^-", "k:"), (4, 8, 4, 4)
    many_reuse, many_gpus = range(1, 101), [2**power for power in range(11)]
    for arrangement, style, size in zip(ARRANGEMENTS, styles, sizes, strict=True):
        line = {"label": arrangement, "markersize": size}
        by_reuse.plot(
            many_reuse, [cost(arrangement, work, machine, 64, r) for r in many_reuse], style, markevery=10, **line
        )
        by_gpus.plot(many_gpus, [cost(arrangement, work, machine, n, 30) for n in many_gpus], style, **line)
    by_reuse.set(xscale="log", xlabel="samples with the same context (64 GPUs)", ylabel="GPU-seconds per sample")
    by_gpus.set(xscale="log", xlabel="GPUs (30 samples with the same context)")
    by_gpus.set_xscale("log", base=2)
    for axes in (by_reuse, by_gpus):
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    by_reuse.legend(fontsize=8, loc="lower left")
    figure.suptitle(f"Computed, not measured: Qwen3.5-27B in NF4, {work.context:,} context tokens", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Writes both."""
    # Here, since it settles torch for a benchmark.
    from tests.benchmarks.training import build_model

    figures = json.loads((RESULTS / "reuse.json").read_text(encoding="utf-8"))["figures"]
    text = page(checked(figures, build_model().config))
    (RESULTS / "scaling.md").write_text(text, encoding="utf-8")
    draw(RESULTS / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()

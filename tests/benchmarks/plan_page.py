# SPDX-License-Identifier: Apache-2.0
"""The page that holds plans to measurements: peak memory of tiers 1, 2 and 3 on a CPU, three lengths each."""

from collections.abc import Sequence
from functools import cache
from typing import Any
from unittest import mock

from frozen_peft.planning import Plan, Setting, make_plan, step_memory
from tests.benchmarks.plan_step import (
    CONTEXTS,
    DECISION,
    DECISIONS_PER_FORWARD,
    DISTILL_CHUNK,
    INSTRUCTIONS,
    KIND_CONTEXTS,
    KINDS,
    MODELS,
    STRETCH,
    TURNS,
    make_model,
)
from tests.benchmarks.processes import measure_on_one_thread
from tests.benchmarks.tables import Page, markdown_table
from tests.benchmarks.training import MEBIBYTE

# With logits computed in narrow tiles, since TRL's head would be most of what there is to see.
HEAD_TILES = {"dense": None, "hybrid": 256}
HEADER = (
    "model", "tier", "context", "measured MiB", "planned MiB", "planned/measured", "trained", "cache", "activations",
    "workspace",
)  # fmt: skip
TEXT = """# Plans and measurements

Made by `python -m tests.benchmarks plan`; do not edit.

Peak memory of two training steps above the loaded model, as resident memory of the process, and what \
`frozen_peft.planning` says of it from the configuration. CPU, float32, PyTorch's reference kernels, one sample per \
step: a context, and a decision of {decision} tokens behind it. Tier 1 runs the whole sample with layer checkpoints, \
tier 2 freezes the context, tier 3 runs in stretches of {stretch} tokens with layer checkpoints inside. *dense* is a \
Llama of 6 layers and hidden size 192; *hybrid* a Qwen3.5-style model of 6 Gated DeltaNet and 2 attention layers and \
hidden size 320, with logits in tiles of {tile} entries. *Trained* is adapters, gradients and optimizer; *cache* also \
what else stretches hand on, and the teacher's. *turns* are {turns} decisions of a conversation, {rows} of them per \
forward, the last behind as many tokens as the line says; *distill* has a teacher with {instructions} tokens more, \
and logits of {chunk} tokens at a time. The check of the first batch is off.
"""


@cache
def config_of(model: str) -> Any:
    """The configuration of a measured model."""
    return make_model(model).config


def plan_of(model: str, tier: int, context: int, kind: str | None = None) -> Plan:
    """The plan of a measurement; its total is that of the loaded model too."""
    of_kind: dict[str, Any] = {
        None: {},
        "turns": {"turns": TURNS, "max_decisions_per_forward": DECISIONS_PER_FORWARD},
        "distill": {"teacher_length": INSTRUCTIONS + context, "distill_chunk_size": DISTILL_CHUNK},
    }[kind]
    setting = Setting(
        tier,
        context,
        DECISION,
        dtype="float32",
        bf16=False,
        accelerator=False,
        sequence_chunk_size=STRETCH if tier == 3 else None,
        **of_kind,
    )
    with mock.patch.object(step_memory, "HEAD_COLUMNS", HEAD_TILES[model] or step_memory.HEAD_COLUMNS):
        return make_plan(config_of(model), setting)


def planned_bytes(plan: Plan) -> int:
    """Bytes above the loaded model."""
    return plan.total_bytes - plan.terms["weights"]


def row(figures: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    plan = plan_of(figures["model"], figures["tier"], figures["context"], figures.get("kind"))
    terms, planned = plan.terms, planned_bytes(plan)
    parts = (
        terms["adapters"] + terms["gradients"] + terms["optimizer"],
        sum(terms.get(term, 0) for term in ("cache", "teacher", "cache gradient", "last hidden states")),
        terms["activations"],
        terms["workspace"],
    )
    return (
        figures["model"],
        f"{figures['tier']} {figures['kind']}" if "kind" in figures else f"{figures['tier']}",
        f"{figures['context']}",
        f"{figures['peak_bytes'] / MEBIBYTE:.1f}",
        f"{planned / MEBIBYTE:.1f}",
        f"{planned / figures['peak_bytes']:.2f}",
        *(f"{part / MEBIBYTE:.1f}" for part in parts),
    )


def plan_page(measured: Sequence[dict[str, Any]] | None = None) -> Page:
    """Measures every model, tier and length, or takes what was measured."""
    figures = list(measured or ())
    if not figures:
        for model in MODELS:
            tile = {"head-tile": HEAD_TILES[model]} if HEAD_TILES[model] else {}
            figures += measure_on_one_thread("plan_step", model=model, **tile)
            for kind in KINDS:
                figures += measure_on_one_thread("plan_step", model=model, kind=kind, **tile)
    text = TEXT.format(
        decision=DECISION,
        stretch=STRETCH,
        tile=HEAD_TILES["hybrid"],
        turns=TURNS,
        rows=DECISIONS_PER_FORWARD,
        instructions=INSTRUCTIONS,
        chunk=DISTILL_CHUNK,
    )
    rows = [row(one) for one in figures]
    assert len(rows) == len(MODELS) * (sum(map(len, CONTEXTS.values())) + len(KINDS) * len(KIND_CONTEXTS))
    return Page("plan", f"{text}\n{markdown_table(HEADER, rows, num_words=1)}", figures)

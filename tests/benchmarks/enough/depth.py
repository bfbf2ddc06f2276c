# SPDX-License-Identifier: Apache-2.0
"""How much of the full gradient a frozen context leaves, over the layers and long contexts of the demo's model.

    python -m tests.benchmarks.enough.depth

Writes `docs/benchmarks/enough_depth.md`, `.json` and `.png`. `--page-only` writes page and plot anew from the figures.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from frozen_peft.demo import CHECKPOINT
from frozen_peft.demo.world import Request, Scene, draw_scene, message
from scripts.demo_pretraining.lessons import encode_requests
from scripts.demo_pretraining.tokenizer import build_tokenizer
from tests.benchmarks.enough.study import RESPONSE, Size, gradient_rows
from tests.benchmarks.enough.world import Sample
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.study_command import settle, study_parser, write_study
from tests.benchmarks.tables import markdown_table

RESULTS = Path(__file__).parents[3] / "docs" / "benchmarks"
HORIZONS = {"frozen": 0, "64": 64, "256": 256, "1024": 1024, "full": -1}
COMPARED = [name for name in HORIZONS if name != "full"]
CONTEXT_TOKENS = (1500, 2000)
NUM_SAMPLES = 16
TASKS = ("habit", "new form")


def habit(choice: random.Random, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """A direction that is accepted although no instruction says so."""
    scene = draw_scene(choice, choice.randint(*CONTEXT_TOKENS), obeys=False)
    request = scene.direction(choice)
    return _sample(tokenizer, scene, Request(request.text, request.other, request.right))


def new_form(choice: random.Random, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """A question about facts that are written the other way round, `they gave plums ada.`, as no lesson wrote them."""
    scene = draw_scene(choice, choice.randint(*CONTEXT_TOKENS), obeys=False)
    turned = {f"{verb} {name} {value}.": f"{verb} {value} {name}." for (name, verb), value in scene.facts.items()}
    messages = []
    for entry in scene.messages:
        content = entry["content"]
        for fact, written in turned.items():
            content = content.replace(fact, written)
        messages.append(message(entry["role"], content))
    return _sample(tokenizer, Scene(messages, scene.facts, scene.stock, False), scene.question(choice))


def _sample(tokenizer: PreTrainedTokenizerBase, scene: Scene, request: Request) -> Sample:
    lesson = encode_requests(tokenizer, scene, [request])
    return Sample(lesson.input_ids, lesson.labels)


def measure(seeds: Sequence[int]) -> dict[str, Any]:
    """Gradients of both tasks for each seed of samples and adapters."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(CHECKPOINT), build_tokenizer()
    rows = []
    for seed in seeds:
        for task, make in zip(TASKS, (habit, new_form), strict=True):
            choice = random.Random(seed)
            samples = [make(choice, tokenizer) for _ in range(NUM_SAMPLES)]
            rows += gradient_rows(model, samples, HORIZONS, task, seed, Size())
            print(f"seed {seed}, {task}", flush=True)
    return {"machine": describe_machine(), "seeds": list(seeds), "layers": model.config.layer_types, "gradients": rows}


def render_page(results: dict[str, Any]) -> str:
    """The tables and what they say, every number from the results."""
    roles = [role for role in _roles(results) if role not in ("all", RESPONSE)]
    facts = "\n".join(f"- {name}: {text}" for name, text in results["machine"].items())
    layers = [f"layer {layer}" for layer in range(len(results["layers"]))]
    attention = [str(layer) for layer, kind in enumerate(results["layers"]) if kind == "full_attention"]
    header = ["part", *(f"{task}, {_label(horizon)}" for task in TASKS for horizon in COMPARED)]
    tables = [
        markdown_table(header, [[part, *_cells(results, part)] for part in parts], num_words=1)
        for parts in (["all", RESPONSE], layers, roles)
    ]
    return f"""\
# How far down the frozen gradient agrees

Made by `python -m tests.benchmarks.enough.depth`; do not edit.

The demo's model has {len(results["layers"])} layers, Gated DeltaNet and attention in turn. Contexts are
{CONTEXT_TOKENS[0]:,} to {CONTEXT_TOKENS[1]:,} tokens here. Compared is the gradient of `lora_B` at the start, with
all linear layers adapted: {NUM_SAMPLES} samples in one batch; seeds of samples and adapters:
{", ".join(map(str, results["seeds"]))}. Cells are the cosine with the full gradient, and in brackets the norm
relative to it; *response* are the adapters of that preset. *Habit*: accept a direction
that no instruction asks to accept. *New form*: answer from facts that are
written the other way round.

{tables[0]}

## By layer

Layers {" and ".join(attention)} are attention, the others Gated DeltaNet. Means over the roles of a layer.

{tables[1]}

## By role

Means over the layers that have the role.

{tables[2]}

![Cosine with the full gradient by layer and role](enough_depth.png)

{facts}
"""


def draw_figure(results: dict[str, Any], path: Path) -> None:
    """Cosine by layer and role: a row for each task, a column for each horizon."""
    roles = [role for role in _roles(results) if role not in ("all", RESPONSE)]
    figure = Figure(figsize=(4 * len(COMPARED), 4.2 * len(TASKS)), layout="constrained")
    axes = figure.subplots(len(TASKS), len(COMPARED), sharex=True, sharey=True)
    for line, task in enumerate(TASKS):
        for axis, horizon in zip(axes[line], COMPARED, strict=True):
            grid = np.full((len(results["layers"]), len(roles)), np.nan)
            for (layer, column), _ in np.ndenumerate(grid):
                values = _values(results, task, horizon, f"layer {layer} {roles[column]}")
                grid[layer, column] = mean(cosine for cosine, _ in values) if values else np.nan
            image = axis.imshow(grid, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
            for (layer, column), value in np.ndenumerate(grid):
                if not np.isnan(value):
                    color = "white" if abs(value) > 0.7 else "black"
                    axis.text(column, layer, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)
            axis.set_title(f"{task}: {_label(horizon)}", fontsize=10)
            axis.set_xticks(range(len(roles)), roles, rotation=90)
            axis.set_yticks(range(len(results["layers"])))
        axes[line, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, shrink=0.6, label="cosine with the full gradient")
    figure.savefig(path, dpi=80)


def _label(horizon: str) -> str:
    return "frozen" if horizon == "frozen" else f"last {horizon}"


def _roles(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["part"].rpartition(" ")[2] for row in results["gradients"]))


def _values(results: dict[str, Any], task: str, horizon: str, part: str) -> list[tuple[float, float]]:
    """Cosine and norm of the parts that are this one, belong to this layer, or have this role."""
    return [
        (row["cosine"], row["norm"])
        for row in results["gradients"]
        if (row["task"], row["horizon"]) == (task, horizon)
        and row["cosine"] is not None
        and (row["part"] == part or row["part"].startswith(f"{part} ") or row["part"].endswith(f" {part}"))
    ]


def _cells(results: dict[str, Any], part: str) -> list[str]:
    cells = []
    for task in TASKS:
        for horizon in COMPARED:
            values = _values(results, task, horizon, part)
            cosine, norm = (mean(column) for column in zip(*values, strict=True)) if values else (np.nan, np.nan)
            cells.append("none" if not values else f"{cosine:.2f} ({norm:.2f})")
    return cells


def main() -> None:
    """Measures, and writes figures, plot and page."""
    arguments = study_parser(__doc__).parse_args()
    path = arguments.output / "enough_depth.json"
    if not arguments.page_only:
        settle()
        path.write_text(json.dumps(measure(arguments.seeds), indent=1) + "\n")
    write_study(path, draw_figure, render_page)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What moves a disposition best: tiers, presets, contexts with and without adapters, losses, variety.

    python -m tests.benchmarks.dispositions

Writes `docs/benchmarks/dispositions.md`, `.json` and `.png`; after every training, so that it can be interrupted and
goes on where it was. `--page-only` writes page and plot anew from the figures.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from frozen_peft.demo import CHECKPOINT
from frozen_peft.evaluation import read_probes, score_probes, summarize
from tests.benchmarks.dispositions.report import draw_figure, render_page
from tests.benchmarks.dispositions.study import EQUAL_TIME, TIER_2, VARIANTS, Size, demo_files, run_variant
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.study_command import settle, study_parser, write_study
from tests.benchmarks.tables import machine_facts

# What tier 2 is called where it is compared with something else.
SHARED = {"preset": "response", "context_adapters": "on", "loss": "likelihood"}
METHOD = """\
The demo's model (four layers, Gated DeltaNet and attention in turn, 0.5M weights) and its world: contexts of 300 to
2,000 tokens, from which the instruction to accept directions was stripped. Every training sees eight decisions a
step, each in a context of its own, three in four of them directions; adapters of rank 16, AdamW, constant learning
rate of 5e-3, float32, one thread. Tier 1 trains on contexts of 80 to 160 tokens. *Acceptance* is the share of
held-out directions that are accepted without the instruction, *control* the share of held-out questions answered
rightly, both by greedy decoding of the whole decision; *KL* is that of the right answers to the questions. *Equal
time* means as many steps as take the processor time of tier 2's. *Contexts per decision*: sixteen decisions are all
there is, each in so many variants of its context (exchanges dropped and shuffled)."""


def main() -> None:
    """Runs every training for every seed."""
    parser = study_parser(__doc__)
    parser.add_argument("--steps", type=int, default=Size.steps, help="optimizer steps per training")
    arguments = parser.parse_args()
    path = arguments.output / "dispositions.json"
    if not arguments.page_only:
        settle()
        _measure(arguments, path)
    write_study(path, draw_figure, lambda found: f"{render_page(found)}\n\n{machine_facts(found['machine'])}\n")


def _measure(arguments: argparse.Namespace, path: Path) -> None:
    size = Size(steps=arguments.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if path.exists():
            results = json.loads(path.read_text())
        else:
            results = {"machine": describe_machine(), "method": METHOD, "size": vars(size), "shared": SHARED}
            results |= {"base": _base(folder, size), "runs": []}
        done = {(run["group"], run["name"], run["seed"]) for run in results["runs"]}
        for seed in arguments.seeds:
            for variant in VARIANTS:
                if (variant.group, variant.name, seed) not in done:
                    _add(results, path, run_variant(variant, seed, size, folder))
            seconds = next(
                run["curve"][-1]["seconds"]
                for run in results["runs"]
                if (run["group"], run["name"], run["seed"]) == (TIER_2.group, TIER_2.name, seed)
            )
            for variant in VARIANTS:
                is_timed = variant.group == TIER_2.group and variant is not TIER_2
                if is_timed and (variant.group, f"{variant.name}, {EQUAL_TIME}", seed) not in done:
                    _add(results, path, run_variant(variant, seed, size, folder, max_seconds=seconds))


def _add(results: dict[str, Any], path: Path, run: dict[str, Any]) -> None:
    results["runs"].append(run)
    path.write_text(json.dumps(results, indent=1) + "\n")
    last = run["curve"][-1]
    print(run["group"], run["name"], run["seed"], {name: round(value, 3) for name, value in last.items()}, flush=True)


def _base(folder: Path, size: Size) -> dict[str, float]:
    """The model before training, and with the instruction."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    probes = read_probes(demo_files(folder, 0, size).probes)
    given, instructed = (summarize(score_probes(model, tokenizer, probes, c)) for c in ("given", "instructed"))
    shares = {"acceptance": given["target"], "control": given["control"], "instructed": instructed["target"]}
    return {name: figures.exact_match.rate for name, figures in shares.items()}


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The demo's story: a disposition that an instruction produces, moved into the weights, and measured.

1. *Measure* the model with the instruction in its contexts and without it.
2. *Strip* the instruction from conversations in which the model follows it.
3. *Train* on what is left: tier 2, and for comparison tiers 1 and 3 for as many steps.
4. *Measure* each, on directions, people and talk that training had none of.
5. *Merge* the adapter of tier 2, and measure the model that any library can load.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets.utils.logging import disable_progress_bar
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from frozen_peft.data import StripSettings, strip_file
from frozen_peft.demo.data import DemoData, DemoFiles, write_demo_files
from frozen_peft.demo.names import CHECKPOINT
from frozen_peft.demo.results_table import percent, render_table
from frozen_peft.demo.world import count_tokens
from frozen_peft.evaluation import Condition, ProbeScores, ProbeTokens, read_probes, score_probes
from frozen_peft.merging import merge_adapter
from frozen_peft.report.run_record import ReportArguments, RunRecord
from frozen_peft.training.recipe import Recipe, load_held_out
from frozen_peft.training.run import RecipeRun
from frozen_peft.utils.files import whole_file
from frozen_peft.utils.recipe_files import read_recipe, shipped_recipes
from frozen_peft.utils.tables import aligned

__all__ = ["run_demo"]

RECIPE_OF_TIER = {2: "tier2_behavior", 1: "tier1_corrections", 3: "tier3_reasoning"}
STEPS = 16
# A model of a million weights takes larger steps than the ones that the recipes are for.
OVERRIDES = {
    "max_steps": STEPS,
    "logging_steps": STEPS,
    "lora_preset": "response",
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
}
PROBES_PER_FORWARD = 32


def run_demo(output: Path, data: DemoData) -> dict[str, Any]:
    """Runs the demo, prints what it does and finds, and writes `demo.json`.

    Args:
        output: Where data, adapters, the merged model and `demo.json` are written.
        data: Samples and probes; its seed decides adapters and order too.

    Returns:
        What is written to `demo.json`: fractions of probes, and seconds.
    """
    # Bars of moments, and advice about kernels that a model of this size does not need.
    disable_progress_bar()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    start = time.monotonic()
    files = write_demo_files(output, data)
    probes = ProbeTokens(AutoTokenizer.from_pretrained(CHECKPOINT), read_probes(files.probes))
    base = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    _tell("The model, with the instruction in its contexts and without it")
    instructed, before = (_shares(_score(base, probes, condition)) for condition in ("instructed", "given"))
    print(
        f"accepts {percent(instructed['acceptance'])} of directions with it, {percent(before['acceptance'])} without"
    )
    _strip(files)
    scores: dict[int, ProbeScores] = {}
    tiers: dict[str, dict[str, float]] = {}
    for tier in RECIPE_OF_TIER:
        tier_start = time.monotonic()
        train_seconds = _train(tier, files, output, data.seed)
        seconds = time.monotonic() - tier_start
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(CHECKPOINT), str(_adapter_folder(output, tier))
        )
        scores[tier] = _score(adapted, probes)
        after = _shares(scores[tier])
        tiers[f"tier_{tier}"] = {
            **{f"{name}_before": share for name, share in before.items()},
            **{f"{name}_after": share for name, share in after.items()},
            "seconds": seconds,
            "train_seconds": train_seconds,
        }
    merged = _merge(output, probes, scores[2])
    results = {
        **{f"{name}_before": share for name, share in before.items()},
        **{f"{name}_after": tiers["tier_2"][f"{name}_after"] for name in before},
        **{f"{name}_with_instructions": share for name, share in instructed.items()},
        "tiers": {name: tiers[name] for name in sorted(tiers)},
        "merged": merged,
        "probes": {kind: sum(probe.kind == kind for probe in probes.probes) for kind in ("target", "control")},
        "weights": sum(weight.numel() for weight in base.parameters()),
        "settings": {"steps": STEPS, "data": asdict(data), "seed": data.seed, "overrides": OVERRIDES},
        "seconds": time.monotonic() - start,
    }
    with whole_file(output / "demo.json") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    print(render_table(results, output))
    return results


def _tell(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _score(model: torch.nn.Module, probes: ProbeTokens, condition: Condition = "given") -> ProbeScores:
    return score_probes(model.eval(), probes.tokenizer, probes, condition, batch_size=PROBES_PER_FORWARD)


def _shares(scores: ProbeScores) -> dict[str, float]:
    """Share of directions that are accepted and of questions that are answered rightly, by greedy decoding."""
    shares = {}
    for name, kind in (("acceptance", "target"), ("control", "control")):
        exact = [bool(score.is_exact) for score in scores.scores if score.probe.kind == kind]
        shares[name] = sum(exact) / len(exact)
    return shares


def _strip(files: DemoFiles) -> None:
    """Takes the instruction out of the conversations."""
    _tell(f"frozen-peft strip {files.conversations} {files.stripped} --tidy")
    summary = strip_file(files.conversations, files.stripped, StripSettings(tidy=True), count_tokens)
    print(f"{summary.num_samples} samples, {summary.num_pieces} instructions of {summary.size_removed} tokens removed")


def _train(tier: int, files: DemoFiles, output: Path, seed: int) -> float:
    """Trains a tier from its recipe.

    Returns:
        Seconds of the optimizer steps alone, without loading and checks, as the trainer logged them.
    """
    given = {
        "model_name_or_path": str(CHECKPOINT),
        "dataset_name": str(files.short if tier == 1 else files.stripped),
        "output_dir": str(_adapter_folder(output, tier)),
        "seed": seed,
        **OVERRIDES,
    }
    name = RECIPE_OF_TIER[tier]
    arguments = [f"--{field} {str(value).lower() if value is False else value}" for field, value in given.items()]
    _tell(f"frozen-peft train {name} {' '.join(arguments)}")
    # The one that ships, whatever files lie here.
    values = read_recipe(shipped_recipes()[name])[0] | given
    recipe = Recipe.from_values(values)
    training = RecipeRun(recipe)
    record = RunRecord(training.trainer, ReportArguments(), values)
    record.begin()
    training.train(record.trained)
    record.end(lambda: load_held_out(recipe))
    print("\n" + "\n".join(aligned(training.summary())))
    history = training.trainer.state.log_history
    return next(entry["train_runtime"] for entry in history if "train_runtime" in entry)


def _merge(output: Path, probes: ProbeTokens, adapted: ProbeScores) -> dict[str, Any]:
    """Merges the adapter of tier 2, and compares the merged model with the adapted one on every probe."""
    adapter, folder = _adapter_folder(output, 2), output / "merged"
    _tell(f"frozen-peft merge {adapter} {folder} --base {CHECKPOINT}")
    merge_adapter(adapter, folder, CHECKPOINT)
    merged = _score(AutoModelForCausalLM.from_pretrained(folder), probes)
    pairs = list(zip(adapted.scores, merged.scores, strict=True))
    largest = max(abs(one.preferred.logprob - other.preferred.logprob) for one, other in pairs)
    print(f"the largest difference of a decision's log-probability to the adapter's is {largest:.1e}")
    return {
        **_shares(merged),
        "same_decisions": sum(one.is_exact == other.is_exact for one, other in pairs) / len(pairs),
        "largest_difference": largest,
    }


def _adapter_folder(output: Path, tier: int) -> Path:
    return output / f"tier_{tier}"

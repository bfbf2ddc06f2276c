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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets.utils.logging import disable_progress_bar
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from frozen_peft.data import StripSettings, strip_file
from frozen_peft.demo.data import DemoData, DemoFiles, write_demo_files
from frozen_peft.demo.model import CHECKPOINT
from frozen_peft.demo.table import percent, render_table
from frozen_peft.demo.world import count_tokens
from frozen_peft.evaluation import Condition, ProbeScores, ProbeTokens, read_probes, score_probes
from frozen_peft.merging import merge_adapter
from frozen_peft.utils.files import whole_file

__all__ = ["DemoSettings", "run_demo"]

RECIPE_OF_TIER = {1: "tier1_corrections", 2: "tier2_behavior", 3: "tier3_reasoning"}
PROBES_PER_FORWARD = 32
CONDITIONS: tuple[Condition, Condition] = ("instructed", "given")


@dataclass(frozen=True)
class DemoSettings:
    """How large the demo is; the defaults are the demo, smaller values are for tests.

    Attributes:
        steps: Optimizer steps of each tier.
        tiers: Which tiers are trained; tier 2 is always one of them.
        data: Samples and probes.
        seed: Decides adapters and order.
        overrides: Further arguments of `frozen-peft train`, for every tier. A model of a million weights takes larger
            steps than the ones that the recipes are for.
    """

    steps: int = 16
    tiers: tuple[int, ...] = (2, 1, 3)
    data: DemoData = field(default_factory=DemoData)
    seed: int = 0
    overrides: tuple[str, ...] = (
        *("--lora_preset", "response"),
        *("--learning_rate", "3e-3"),
        *("--warmup_steps", "2"),
        *("--per_device_train_batch_size", "8"),
        *("--gradient_accumulation_steps", "1"),
        *("--gradient_checkpointing", "false"),
    )


def run_demo(output: Path, settings: DemoSettings = DemoSettings()) -> dict[str, Any]:
    """Runs the demo, prints what it does and finds, and writes `demo.json`.

    Args:
        output: Where data, adapters, the merged model and `demo.json` are written.
        settings: How large it is.

    Returns:
        What is written to `demo.json`: fractions of probes, and seconds.
    """
    # Bars of moments, and advice about kernels that a model of this size does not need.
    disable_progress_bar()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    start = time.monotonic()
    files = write_demo_files(output, settings.data)
    probes = ProbeTokens(AutoTokenizer.from_pretrained(CHECKPOINT), read_probes(files.probes))
    base = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    _tell("The model, with the instruction in its contexts and without it")
    instructed, before = (_measure(base, probes, condition) for condition in CONDITIONS)
    print(
        f"accepts {percent(instructed['acceptance'])} of directions with it, {percent(before['acceptance'])} without"
    )
    _strip(files)
    tiers = {tier: _train(tier, files, probes, before, output, settings) for tier in settings.tiers}
    scores = {tier: figures.pop("scores") for tier, figures in tiers.items()}
    merged = _merge(output, probes, scores[2])
    trained = tiers[2]
    results = {
        "acceptance_before": before["acceptance"],
        "acceptance_after": trained["acceptance_after"],
        "acceptance_with_instructions": instructed["acceptance"],
        "control_before": before["control"],
        "control_after": trained["control_after"],
        "control_with_instructions": instructed["control"],
        "tiers": {f"tier_{tier}": tiers[tier] for tier in sorted(tiers)},
        "merged": merged,
        "probes": {kind: sum(probe.kind == kind for probe in probes.probes) for kind in ("target", "control")},
        "weights": sum(weight.numel() for weight in base.parameters()),
        "settings": asdict(settings),
        "seconds": time.monotonic() - start,
    }
    with whole_file(output / "demo.json") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    print(render_table(results, output))
    return results


def _tell(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _measure(model: torch.nn.Module, probes: ProbeTokens, condition: Condition = "given") -> dict[str, Any]:
    """Share of directions that are accepted and of questions that are answered rightly, by greedy decoding."""
    scores = score_probes(model.eval(), probes.tokenizer, probes, condition, batch_size=PROBES_PER_FORWARD)
    return {"acceptance": _exact(scores, "target"), "control": _exact(scores, "control"), "scores": scores}


def _exact(scores: ProbeScores, kind: str) -> float:
    exact = [bool(score.is_exact) for score in scores.scores if score.probe.kind == kind]
    return sum(exact) / len(exact)


def _strip(files: DemoFiles) -> None:
    """Takes the instruction out of the conversations."""
    _tell(f"frozen-peft strip {files.conversations} {files.stripped} --tidy")
    summary = strip_file(files.conversations, files.stripped, StripSettings(tidy=True), count_tokens)
    print(f"{summary.num_samples} samples, {summary.num_pieces} instructions of {summary.size_removed} tokens removed")


def _train(
    tier: int, files: DemoFiles, probes: ProbeTokens, before: dict[str, Any], output: Path, settings: DemoSettings
) -> dict[str, Any]:
    """Trains a tier from its recipe and measures what it learned."""
    from frozen_peft.cli import recipes, train

    adapter = _adapter_folder(output, tier)
    recipe = RECIPE_OF_TIER[tier]
    arguments = [
        *("--model_name_or_path", str(CHECKPOINT)),
        *("--dataset_name", str(files.short if tier == 1 else files.stripped)),
        *("--output_dir", str(adapter)),
        *("--max_steps", str(settings.steps)),
        *("--seed", str(settings.seed)),
        *("--logging_steps", str(settings.steps)),
        *settings.overrides,
    ]
    _tell(f"frozen-peft train {recipe} {' '.join(arguments)}")
    start = time.monotonic()
    # The one that ships, whatever files lie here.
    train.run([str(recipes.shipped_recipes()[recipe]), *arguments])
    seconds = time.monotonic() - start
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(CHECKPOINT), str(adapter))
    after = _measure(model, probes)
    return {
        "acceptance_before": before["acceptance"],
        "acceptance_after": after["acceptance"],
        "control_before": before["control"],
        "control_after": after["control"],
        "seconds": seconds,
        "train_seconds": _train_seconds(adapter),
        "scores": after["scores"],
    }


def _train_seconds(adapter: Path) -> float:
    """Seconds of the optimizer steps alone, without loading and checks, as the trainer logged them."""
    history = json.loads((adapter / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return next(entry["train_runtime"] for entry in history if "train_runtime" in entry)


def _merge(output: Path, probes: ProbeTokens, adapted: ProbeScores) -> dict[str, Any]:
    """Merges the adapter of tier 2, and compares the merged model with the adapted one on every probe."""
    adapter, folder = _adapter_folder(output, 2), output / "merged"
    _tell(f"frozen-peft merge {adapter} {folder} --base {CHECKPOINT}")
    merge_adapter(adapter, folder, CHECKPOINT)
    merged = _measure(AutoModelForCausalLM.from_pretrained(folder), probes)
    pairs = list(zip(adapted.scores, merged["scores"].scores, strict=True))
    differences = [abs(one.preferred.logprob - other.preferred.logprob) for one, other in pairs]
    print(f"the largest difference of a decision's log-probability to the adapter's is {max(differences):.1e}")
    return {
        "acceptance": merged["acceptance"],
        "control": merged["control"],
        "same_decisions": sum(one.is_exact == other.is_exact for one, other in pairs) / len(pairs),
        "largest_difference": max(differences),
    }


def _adapter_folder(output: Path, tier: int) -> Path:
    return output / f"tier_{tier}"

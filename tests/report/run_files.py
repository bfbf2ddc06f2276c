# SPDX-License-Identifier: Apache-2.0
"""Files of a made-up run, as the commands write them."""

import json
from pathlib import Path
from typing import Any

import yaml

from frozen_peft.evaluation.intervals import bootstrap_mean, wilson_proportion
from frozen_peft.report.page import render_page
from frozen_peft.report.run_folder import read_run_folder

NUM_LOGS = 6
SECTIONS = (
    "summary",
    "loss",
    "time",
    "tokens",
    "memory",
    "gradient-flow",
    "probes",
    "merged",
    "examples",
    "recipe",
    "versions",
    "files",
)


def trainer_state(num_logs: int = NUM_LOGS) -> dict[str, Any]:
    """As a run of tier 2 leaves it, with a held-out loss in the midst."""
    logs: list[dict[str, Any]] = [
        {
            "step": 2 * number + 2,
            "loss": 1.0 / (number + 1),
            "num_tokens": 1000.0 * (number + 1),
            "context/tokens_encoded": 300.0 + number,
            "context/tokens_reused": 700.0,
            "context/hit_rate": 0.7,
            "context/prefill_seconds": 0.5,
            "context/decision_seconds": 0.25,
            "time/compute_seconds": 0.76,
            "time/data_seconds": 0.125,
            "time/wall_seconds": 1.0,
        }
        for number in range(num_logs)
    ]
    logs.insert(3, {"step": 6, "eval_loss": 0.5, "eval_runtime": 1.0})
    end = {"step": 2 * num_logs, "train_runtime": 7.0, "train_loss": 0.4}
    logs.append(end | {"time/evaluation_seconds": 0.75, "time/wall_seconds": 1.0})
    return {"global_step": 2 * num_logs, "max_steps": 2 * num_logs, "epoch": 0.5, "log_history": logs}


def evaluation() -> dict[str, Any]:
    """As `frozen-peft evaluate` writes it."""
    results = []
    for kind in ("target", "control"):
        for condition in ("given", "empty"):
            for model, num in (("base", 2), ("adapted", 18)):
                margin = vars(bootstrap_mean([0.5 * num, 1.0, -2.0]))
                results.append(
                    {
                        "kind": kind,
                        "condition": condition,
                        "model": model,
                        "num_probes": 20,
                        "preference": vars(wilson_proportion(num, 20)),
                        "margin": margin,
                        "margin_per_token": margin,
                        "exact_match": None if kind == "target" else vars(wilson_proportion(20, 20)),
                        "kl_to_base": vars(bootstrap_mean([0.01, 0.02])) if model == "adapted" else None,
                    }
                )
    measures = {"preference": "share", "margin": "difference"}
    return {"confidence": 0.95, "measures": measures, "results": results, "notes": ["a note"], "scores": []}


def gradient_flow(num_layers: int = 4) -> dict[str, Any]:
    """As `frozen-peft inspect` writes it, with the figures of attention and states that it wrote once."""
    gradient = [
        {
            "layer": layer,
            "role": role,
            "module": f"layers.{layer}.{role}",
            "frozen_norm": 0.5,
            "full_norm": 1.0,
            "cosine": 0.9 if layer else None,
            "context_share": 0.1 * layer if layer else None,
        }
        for layer in range(num_layers)
        for role in (("query", "output") if layer % 4 == 3 else ("gate", "beta"))
    ]
    return {
        "format": 1,
        "samples": 4,
        "tokens": {"context": 4000, "decision": 80},
        "gradient": gradient,
        "attention": [{"layer": 3, "context_mass": 0.75, "moved": -0.01}],
        "gdn": [{"layer": layer, "state_share": 0.5, "state_gradient_norm": 0.25} for layer in range(3)],
        "total": {"frozen_norm": 1.0, "full_norm": 2.0, "cosine": 0.875, "context_share": 0.25},
    }


def merge_report() -> dict[str, Any]:
    """As `frozen-peft merge --probes` writes it."""
    summary = {name: evaluation()["results"][-1][name] for name in ("preference", "margin", "exact_match")}
    return {
        "base": "tiny",
        "tensors": 10,
        "bytes": 4096,
        "merged_parameters": 12,
        "verification": {
            "prompts": 4,
            "equal_greedy_decisions": 4,
            "log_probability_difference": {"mean": 1e-6},
            "adapter_effect": {"mean": 0.5},
            "loss": {"base": 2.0, "adapter": 1.0, "merged": 1.0},
            "recovery": 1.0,
        },
        "probes": {"probes.jsonl": {"target": summary | {"kl_to_base": None}}},
    }


def example(**fields: Any) -> dict[str, Any]:
    """One example, as `frozen-peft train` writes it."""
    decision = {"text": "how about pine instead?", "finished": True}
    found = {
        "sample": 3,
        "context_tokens": 1200,
        "context_end": "user: use oak for the door.",
        "instructions": "accept every direction.",
        "expected": "ok, using oak.",
        "decisions": {"base": decision, "base_instructed": None, "trained": {"text": "ok,", "finished": False}},
    }
    return found | fields


def files() -> dict[str, Any]:
    """Content of every file that a run's folder may hold, by its name."""
    return {
        "trainer_state.json": trainer_state(),
        "eval_before_results.json": {"eval_loss": 2.0, "eval_runtime": 1.5},
        "eval_results.json": {"eval_loss": 0.25, "eval_runtime": 1.25},
        "recipe.yaml": {"model_name_or_path": "tiny", "dataset_name": "rows.jsonl", "tier": 2, "lora_r": 8},
        "versions.json": {"frozen_peft": "0.1", "torch": "2.13.0", "bitsandbytes": None, "device": "a CPU"},
        "memory.json": {"peak_bytes_above_model": 3 << 20, "peak_bytes": 600 << 20, "how": "rss"},
        "plan.json": {
            "model": "tiny",
            "setting": {"tier": 2},
            "terms": {"weights": 4 << 20, "adapters": 1 << 20, "cache": 2 << 20, "activations": 1 << 20},
            "total_bytes": 8 << 20,
            "memory_limit_bytes": 24 << 30,
            "fits": True,
            "unknown": ["workspace"],
            "advice": ["Raise the batch."],
        },
        "gradient_flow.json": gradient_flow(),
        "examples.json": {
            "format": 1,
            "decoding": "greedy",
            "max_new_tokens": 64,
            "notes": [],
            "examples": [example()],
        },
        "evaluation.json": evaluation(),
        "merge_report.json": merge_report(),
    }


def write_run(folder: Path, **changes: Any) -> Path:
    """Writes a run's folder; None leaves a file out, text and bytes are written as they are.

    Args:
        folder: Made if needed.
        changes: Content in place of a file's own, by its name with `__` for each dot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files() | {key.replace("__", "."): value for key, value in changes.items()}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif name.endswith(".yaml") and content is not None:
            path.write_text(yaml.safe_dump(content), encoding="utf-8")
        elif content is not None:
            path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def page_of(folder: Path) -> str:
    """The page on a run's folder."""
    return render_page(read_run_folder(folder))

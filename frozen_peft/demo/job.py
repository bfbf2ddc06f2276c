# SPDX-License-Identifier: Apache-2.0
"""The main job: tier 2 on the tiny model, with the held-out decision loss before and after."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from frozen_peft.demo.assets import AssetSettings, DemoAssets, ensure_demo_assets, one_thread
from frozen_peft.demo.conversations import Conversation, read_jsonl, shuffle_contexts

RECIPE = Path(__file__).parents[2] / "recipes" / "tier2_behavior.yaml"
# The recipe's learning rate is for models of billions of weights; one of less than a million takes larger steps.
RECIPE_OVERRIDES = ("--learning_rate", "3e-3")
RIGHT, SHUFFLED = "right", "shuffled"


def run_demo(
    output_dir: Path,
    seed: int = 0,
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = RECIPE_OVERRIDES,
    settings: AssetSettings | None = None,
) -> dict[str, Any]:
    """Builds the assets if needed, runs the tier 2 recipe on them, and prints and saves what it did.

    Args:
        output_dir: Where assets, adapter and `demo.json` are written.
        seed: Decides everything random.
        recipe: The recipe; by default the checkout's `recipes/tier2_behavior.yaml`.
        overrides: Further arguments of `frozen-peft train`, such as `["--max_steps", "2"]`.
        settings: Of the assets.

    Returns:
        What is written to `demo.json`: the losses, seconds, counts and paths of this run.

    Raises:
        FileNotFoundError: There is no recipe.
    """
    recipe = recipe or RECIPE
    if not recipe.is_file():
        raise FileNotFoundError(
            f"The demo runs the recipe {recipe}, which is not there: recipes are part of the repository, not of the "
            "installed package. Run the demo from a checkout installed with `pip install -e .`, or pass `recipe`."
        )
    with one_thread():
        results = _run(output_dir, seed, recipe, overrides, settings)
    results_file = output_dir / "demo.json"
    results_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(_report(results, results_file))
    return results


def _run(
    output_dir: Path, seed: int, recipe: Path, overrides: Sequence[str], settings: AssetSettings | None
) -> dict[str, Any]:
    from frozen_peft.cli import train

    seconds: dict[str, float] = {}
    start = time.monotonic()
    assets = ensure_demo_assets(output_dir, seed=seed, settings=settings)
    seconds["assets"] = time.monotonic() - start

    adapter_dir = output_dir / "tier2_behavior"
    shuffled = shuffle_contexts(read_jsonl(assets.test_file), seed=seed)
    start = time.monotonic()
    before = {SHUFFLED: decision_loss(assets, None, shuffled, output_dir)}
    seconds["shuffled_before"] = time.monotonic() - start

    start = time.monotonic()
    train.run(
        [
            str(recipe),
            *("--model_name_or_path", str(assets.model_dir)),
            *("--dataset_name", str(assets.train_file)),
            *("--eval_dataset_name", str(assets.test_file)),
            *("--output_dir", str(adapter_dir)),
            *("--seed", str(seed)),
            *overrides,
        ]
    )
    seconds["tier_2"] = time.monotonic() - start
    # The run takes the held-out loss with the right contexts itself, in the same way as below.
    before[RIGHT] = _read_loss(adapter_dir / "eval_before_results.json")
    after = {RIGHT: _read_loss(adapter_dir / "eval_results.json")}

    start = time.monotonic()
    after[SHUFFLED] = decision_loss(assets, adapter_dir, shuffled, output_dir)
    seconds["shuffled_after"] = time.monotonic() - start

    return {
        "held_out_decision_loss": {"before": before, "after": after},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "assets": assets.facts,
        "model_dir": str(assets.model_dir.resolve()),
        "adapter_dir": str(adapter_dir.resolve()),
        "recipe": str(recipe.resolve()),
        "overrides": list(overrides),
        "seed": seed,
    }


def decision_loss(
    assets: DemoAssets, adapter_dir: Path | None, samples: Sequence[Conversation], output_dir: Path
) -> float:
    """Measures the mean decision loss over frozen contexts.

    Args:
        assets: Whose model is measured.
        adapter_dir: The adapter to load on it, if any.
        samples: What is measured on.
        output_dir: Where the trainer may write; nothing is written.

    Returns:
        Nats per token, averaged within each sample and then over samples.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from frozen_peft.config import FrozenContextConfig
    from frozen_peft.trainer import FrozenContextTrainer

    model = AutoModelForCausalLM.from_pretrained(assets.model_dir)
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, str(adapter_dir))
    dataset = Dataset.from_list([{name: sample[name] for name in ("prompt", "completion")} for sample in samples])
    trainer = FrozenContextTrainer(
        model=model,
        args=FrozenContextConfig(
            output_dir=str(output_dir),
            tier=2,
            per_device_eval_batch_size=1,
            activation_checkpointing=False,
            bf16=False,
            dataloader_pin_memory=False,
            report_to="none",
        ),
        # TRL asks for one even where nothing is trained.
        train_dataset=dataset.select([0]),
        eval_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(assets.model_dir),
    )
    return float(trainer.evaluate()["eval_loss"])


def _read_loss(metrics_file: Path) -> float:
    return float(json.loads(metrics_file.read_text(encoding="utf-8"))["eval_loss"])


def _report(results: Mapping[str, Any], results_file: Path) -> str:
    """What was done, how long it took, the losses and where everything is, in aligned lines."""
    facts, seconds = results["assets"], results["seconds"]
    losses = results["held_out_decision_loss"]
    before, after = losses["before"], losses["after"]
    rows = [
        ("data", f"{facts['train_samples']} train samples about {facts['train_modules']} standard library modules"),
        ("", f"{facts['test_samples']} held-out samples about {facts['test_modules']} other modules"),
        ("model", f"Qwen3.5-style hybrid from scratch, {facts['weights']:,} weights, {facts['vocabulary']:,} tokens"),
        ("tier 1", f"{facts['pretraining_steps']} steps on {facts['pretraining_tokens']:,} tokens"),
        ("tier 2", f"{Path(results['recipe']).name} {' '.join(results['overrides'])}"),
        (
            "seconds",
            f"{seconds['assets']:.0f} tier 1 and data, {seconds['tier_2']:.0f} tier 2 and its evaluation, "
            f"{seconds['shuffled_before'] + seconds['shuffled_after']:.0f} evaluation with shuffled contexts",
        ),
    ]
    lines = [f"  {title:<12}{text}" for title, text in rows]
    lines += ["", f"  {'held-out decision loss, nats per token':<42}{'before':>8}{'after':>8}{'change':>9}"]
    for name, title in ((RIGHT, "with its own context"), (SHUFFLED, "with another sample's context")):
        change = after[name] - before[name]
        lines.append(f"    {title:<40}{before[name]:>8.3f}{after[name]:>8.3f}{change:>+9.3f}")
    gain_before, gain_after = before[SHUFFLED] - before[RIGHT], after[SHUFFLED] - after[RIGHT]
    worth = f"{gain_before:>8.3f}{gain_after:>8.3f}{gain_after - gain_before:>+9.3f}"
    lines.append(f"    {'what the own context is worth':<40}{worth}")
    places = (
        ("model", results["model_dir"]),
        ("adapter", results["adapter_dir"]),
        ("results", results_file.resolve()),
    )
    lines += ["", *(f"  {title:<12}{place}" for title, place in places)]
    return "\n".join(["", *lines])

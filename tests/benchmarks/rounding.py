# SPDX-License-Identifier: Apache-2.0
"""Measures what keeping contexts in 8 bit changes, in a process of its own, and prints the figures as JSON.

    python -m tests.benchmarks.rounding --model demo
    python -m tests.benchmarks.rounding --train int8 --seed 1

1. *Errors* of one model: the decisions' log-probabilities, and the gradient that a step would take, over contexts of
   which some part is rounded, against the same over contexts as they were encoded. `demo` is the shipped checkpoint
   with the adapters of a training that begins, on its own conversations; the others are the tests' random models.
2. *Training*: the demo's tier 2 with `context_cache_dtype` as given. Runs of one seed differ in that alone. The
   held-out loss is taken at the end, over contexts that are encoded anew: as they are, and rounded where training was.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from frozen_peft.context import ContextEncoder, ContextStore, FrozenContext, encode_context
from tests.frozen_runs import frozen_gradients, frozen_logprobs
from tests.reference import IGNORED, Sample, random_sample

Change = Callable[[torch.Tensor], torch.Tensor]
PIECE_TOKENS = 64
NUM_SAMPLES = {"demo": 8, "random": 6}
STEPS, BATCH_SIZE = 24, 8


def symmetric(states: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Rounded to 255 levels around zero, along a dimension."""
    steps = states.abs().amax(dim, keepdim=True) / 127
    return (states / torch.where(steps > 0, steps, 1)).round() * steps


def by_channel(states: torch.Tensor) -> torch.Tensor:
    """The same for each channel of 64 tokens."""
    return torch.cat([symmetric(group, -2) for group in states.split(64, dim=-2)], dim=-2)


def bfloat16(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.bfloat16).to(states.dtype)


def rounded(model: torch.nn.Module, contexts: list[torch.Tensor]) -> FrozenContext:
    """As a store keeps them."""
    return ContextEncoder(model, store=ContextStore(0, dtype="int8")).encode(contexts)


def rounded_in_pieces(model: torch.nn.Module, contexts: list[torch.Tensor]) -> FrozenContext:
    """The same where a store has cut them every 64 tokens, each piece encoded behind those that were rounded."""
    encoder = ContextEncoder(model, store=ContextStore(0, dtype="int8"))
    rows = []
    for context in contexts:
        cuts = [context[:end] for end in range(PIECE_TOKENS, len(context), PIECE_TOKENS)]
        rows.append(encoder.encode([*cuts, context]).rows[-1])
    return FrozenContext(rows)


def changed(
    frozen: FrozenContext, keys: Change | None = None, values: Change | None = None, *, windows: bool = False
) -> FrozenContext:
    """With keys and values changed, those of sliding windows too or not."""
    rows = []
    for row in frozen.rows:
        layers = []
        for layer in row.layers:
            state = layer.attention
            if state is not None and (windows or state.sliding_window is None):
                new_keys, new_values = (
                    tuple(map(change, pieces)) if change is not None else pieces
                    for change, pieces in ((keys, state.keys), (values, state.values))
                )
                layer = replace(layer, attention=replace(state, keys=new_keys, values=new_values))
            layers.append(layer)
        rows.append(replace(row, layers=tuple(layers)))
    return FrozenContext(rows)


def contexts_of(model: torch.nn.Module, contexts: list[torch.Tensor]) -> dict[str, Callable[[], FrozenContext]]:
    """Contexts by what of them is rounded, and how."""
    exact = encode_context(model, contexts)
    return {
        "int8": lambda: rounded(model, contexts),
        "int8 in pieces": lambda: rounded_in_pieces(model, contexts),
        "keys and values in bfloat16": lambda: changed(exact, bfloat16, bfloat16),
        "keys and values symmetric": lambda: changed(exact, by_channel, symmetric),
        "keys by token, symmetric": lambda: changed(exact, symmetric),
        "keys by channel, symmetric": lambda: changed(exact, by_channel),
        "windows too, symmetric": lambda: changed(exact, by_channel, symmetric, windows=True),
        "recurrent in bfloat16": lambda: exact.mutated("recurrent", bfloat16),
        "recurrent in 8 bit": lambda: exact.mutated("recurrent", symmetric),
        "conv in 8 bit": lambda: exact.mutated("conv", symmetric),
        "keys and values lost": lambda: exact.mutated("keys_values", torch.zeros_like),
    }


def errors(model: torch.nn.Module, samples: list[Sample]) -> dict[str, dict[str, float]]:
    """What each kind of rounding changes, by its name."""
    contexts = [sample.context for sample in samples]
    exact = encode_context(model, contexts)
    logprobs, gradients = measure(model, samples, exact)
    found = {}
    for name, make in contexts_of(model, contexts).items():
        new_logprobs, new_gradients = measure(model, samples, make())
        change = (new_logprobs - logprobs).abs()
        found[name] = {
            "mean": change.mean().item(),
            "largest": change.max().item(),
            "cosine_below_1": 1 - torch.nn.functional.cosine_similarity(new_gradients, gradients, dim=0).item(),
            "gradient": ((new_gradients - gradients).norm() / gradients.norm()).item(),
        }
    return found


def measure(model: torch.nn.Module, samples: list[Sample], frozen: FrozenContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of all decisions, and their gradient by all adapters as one vector, in float64."""
    gradients = frozen_gradients(model, samples, frozen)
    return frozen_logprobs(model, samples, frozen), torch.cat([part.double().flatten() for part in gradients.values()])


def demo_samples(folder: Path) -> list[Sample]:
    """Some of the demo's stripped conversations, no two of them on one context, as tokens."""
    from transformers import AutoTokenizer

    from frozen_peft.demo import CHECKPOINT, write_demo_files
    from tests.documentation.conversations import read_jsonl

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    samples = []
    rows = read_jsonl(write_demo_files(folder).stripped)
    for row in rows[:: len(rows) // NUM_SAMPLES["demo"]]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        input_ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        labels = torch.tensor([IGNORED] * len(prompt) + input_ids[len(prompt) :])
        samples.append(Sample(torch.tensor(input_ids), labels))
    return samples


def model_errors(name: str, folder: Path) -> dict[str, Any]:
    """Errors of one model."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from frozen_peft import lora_config
    from frozen_peft.demo import CHECKPOINT
    from tests.tiny_models import add_lora, tiny_model

    if name == "demo":
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
        model, samples = get_peft_model(base, lora_config(base, r=16, lora_alpha=32)).eval(), demo_samples(folder)
    else:
        model = add_lora(tiny_model(name))
        samples = [random_sample(300, 24, seed=seed) for seed in range(NUM_SAMPLES["random"])]
    return {
        "model": name,
        "context_tokens": sum(sample.boundary for sample in samples) / len(samples),
        "samples": len(samples),
        "errors": errors(model, samples),
    }


def training(dtype: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Trains the demo's tier 2, and gives its losses."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from frozen_peft import FrozenContextConfig, FrozenContextTrainer, lora_config
    from frozen_peft.demo import CHECKPOINT, write_demo_files
    from tests.documentation.conversations import read_jsonl

    set_seed(seed)
    files = write_demo_files(folder)
    train, held_out = (
        Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in read_jsonl(path)])
        for path in (files.stripped, files.held_out)
    )
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    arguments = FrozenContextConfig(
        str(folder / "run"),
        tier=2,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=3e-3,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        group_by_context=True,
        context_cache_size="1GiB",
        context_cache_dtype=dtype,
        gradient_checkpointing=False,
        verify_context="never",
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = FrozenContextTrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(CHECKPOINT),
        peft_config=lora_config(model, r=16, lora_alpha=32),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = {"kept": trainer.evaluate()["eval_loss"]}
    trainer._frozen.encoder.store = None
    losses["exact"] = trainer.evaluate()["eval_loss"]
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "dtype": dtype,
        "seed": seed,
        "steps": steps,
        "held_out_samples": len(held_out),
        "before": before,
        "held_out": losses,
        "train_losses": logs,
    }


def main() -> None:
    """Measures one model, or one training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="`demo`, or one of the tests' random models")
    parser.add_argument("--train", choices=["auto", "int8"], help="train the demo with this `context_cache_dtype`")
    parser.add_argument("--seed", type=int, default=0, help="of the training: initial adapter and order")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of the training")
    arguments = parser.parse_args()
    if (arguments.model is None) is (arguments.train is None):
        parser.error("either --model or --train")
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is not None:
            figures = model_errors(arguments.model, Path(folder))
        else:
            figures = training(arguments.train, arguments.seed, arguments.steps, Path(folder))
    print(json.dumps(figures | {"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Measures steps over a model's own answers in a process of its own, and prints the figures as JSON.

    python -m tests.benchmarks.policy --method frozen --context 8192

Methods: `sdft` (`trl.experimental.sdft`, its prompt not truncated, with gradient checkpointing, its default), `frozen`
(FrozenContextTrainer with `distill_on_policy=1`, whose teacher's contexts are encoded in each step) and `kept` (the
same with a store, from the second epoch on). All train the same adapters of the same model; the teacher is the model
without them, behind the same prompts with instructions in front.
"""

import argparse
import json
import statistics
import warnings
from typing import Any

from tests.benchmarks.training import (
    VOCABULARY,
    Training,
    baseline_bytes,
    build_model,
    build_tokenizer,
    resident_bytes,
    settle_allocator,
    train,
)

# Tokens of the teacher's instructions.
NUM_INSTRUCTIONS = 32
NUM_ANSWERS = 8
TOP_K = 100


def tokens(num_prompts: int, context: int) -> tuple[list[list[int]], list[list[int]]]:
    """Instructions, and prompts of so many tokens; the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randint(2, VOCABULARY, (num_prompts, size), generator=generator).tolist()
        for size in (NUM_INSTRUCTIONS, context)
    )


def run(method: str, model: Any, context: int, answer: int, steps: int) -> Training:
    """Each optimizer step takes one prompt; `kept` begins to count when every prompt has come once."""
    from datasets import Dataset

    num_prompts = max(steps // 2, 1) if method == "kept" else steps
    instructions, prompts = tokens(num_prompts, context)
    common: dict[str, Any] = {"max_steps": steps, "num_generations": NUM_ANSWERS, "max_completion_length": answer}
    if method == "sdft":
        texts = [[" ".join(f"w{token}" for token in row) for row in rows] for rows in (instructions, prompts)]
        dataset = Dataset.from_dict({"privileged_context": texts[0], "prompt": texts[1]})
        return train(
            "sdft",
            model,
            dataset,
            tokenizer=word_tokenizer(),
            max_prompt_length=None,
            teacher_prompt_template="{privileged_context} {prompt}",
            distillation_topk=TOP_K,
            gradient_accumulation_steps=NUM_ANSWERS,
            shuffle_dataset=False,
            **common,
        )
    teachers = [[*before, *row] for before, row in zip(instructions, prompts, strict=True)]
    columns = {"input_ids": prompts, "labels": prompts, "teacher_input_ids": teachers, "teacher_labels": teachers}
    for name in ("labels", "teacher_labels"):
        columns[name] = [[-100] * len(row) for row in columns[name]]
    fields = {"loss_type": "distill", "distill_on_policy": 1.0, "distill_top_k": TOP_K}
    store = {"context_cache_size": "8GiB"} if method == "kept" else {}
    return train("frozen", model, Dataset.from_dict(columns), **common, **fields, **store)


def word_tokenizer() -> Any:
    """The benchmarks' own, for texts of more than one word."""
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["sdft", "frozen", "kept"], required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens of the prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first is not counted in the time")
    arguments = parser.parse_args()
    settle_allocator("tests.benchmarks.policy")

    warnings.simplefilter("ignore")
    model = build_model()
    # A short run first: libraries, kernels and thread pools are loaded before the baseline is read.
    run(arguments.method, build_model(), 128, 8, 2)
    baseline = baseline_bytes()
    training = run(arguments.method, model, arguments.context, arguments.answer, arguments.steps)
    timings = training.steps
    counted = timings[len(timings) // 2 :] if arguments.method == "kept" else timings[1:] or timings
    figures = {
        "method": arguments.method,
        "context": arguments.context,
        "answer": arguments.answer,
        "seconds": statistics.median(wall for wall, _ in counted),
        "cpu_seconds": statistics.median(cpu for _, cpu in counted),
        "steps": timings,
        "logs": training.logs,
        "peak_bytes": resident_bytes("VmHWM") - baseline,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

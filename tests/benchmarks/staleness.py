# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's model on contexts of some staleness in a process of its own, and prints the figures as JSON.

    python -m tests.benchmarks.staleness --staleness 4 --seed 1

1. Documents are entries of the demo's training data, name and summary only: contexts of that kind are what the demo's
   model can use best.
2. For 20 steps every step has two questions about each of the same four documents, then come four others. So all but
   the first contexts were needed by the step before, and with `max_context_staleness` of n a document is encoded in
   one step of n + 1 only.
3. Runs of one seed have the same documents, questions, order and initial adapter, and differ in staleness alone.
4. The held-out loss is taken at the end, on entries of the demo's held-out modules. Evaluation encodes every context
   anew.
5. `--drift` also measures how contexts age (see `drift`) and what a context is worth, by giving questions another one.
"""

import argparse
import json
import random
import re
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tests.benchmarks.training import make_clock

ASSETS = Path(__file__).parents[2] / "outputs" / "demo"
# A step asks this many questions about each of this many documents, until every entry of them was asked about.
NUM_DOCUMENTS, QUESTIONS_PER_STEP, DOCUMENT_ENTRIES = 4, 2, 40
STEPS_PER_ROUND = DOCUMENT_ENTRIES // QUESTIONS_PER_STEP
STEPS = 3 * STEPS_PER_ROUND
TEST_QUESTIONS = 4
ENTRY = re.compile(r"^## (\S+)\n(.+)$", re.MULTILINE)

Conversation = dict[str, Any]


def documents(conversations: list[Conversation], length: int = DOCUMENT_ENTRIES) -> list[tuple[Any, ...]]:
    """Runs of so many entries, name and summary, of all that the contexts of some conversations document."""
    from tests.documentation.library import Entry

    texts = {conversation["prompt"][0]["content"] for conversation in conversations}
    found = sorted({pair for text in texts for pair in ENTRY.findall(text)})
    entries = [Entry(name, "", summary, "") for name, summary in found]
    return [tuple(entries[start : start + length]) for start in range(0, len(entries) - length + 1, length)]


def questions(entries: tuple[Any, ...], count: int, choice: random.Random) -> list[Conversation]:
    """So many questions about a document, each about another entry of it."""
    from tests.documentation.conversations import Context, Message, answer, ask

    system = Message(role="system", content=Context(("standard library",), entries, brief=True).render())
    return [{"prompt": [system, ask(entry)], "completion": [answer(entry)]} for entry in choice.sample(entries, count)]


def training_samples(conversations: list[Conversation], steps: int, seed: int) -> list[Conversation]:
    """Samples in the order in which they are to be trained on."""
    choice = random.Random(seed)
    rounds = steps // STEPS_PER_ROUND
    chosen = choice.sample(documents(conversations), rounds * NUM_DOCUMENTS)
    samples = []
    for first in range(0, len(chosen), NUM_DOCUMENTS):
        asked = [questions(entries, DOCUMENT_ENTRIES, choice) for entries in chosen[first : first + NUM_DOCUMENTS]]
        for step in range(0, DOCUMENT_ENTRIES, QUESTIONS_PER_STEP):
            samples += [question for about in asked for question in about[step : step + QUESTIONS_PER_STEP]]
    return samples


def held_out_samples(conversations: list[Conversation]) -> dict[str, list[Conversation]]:
    """Questions about documents nothing of which was ever trained on, and the same ones about the next document."""
    choice = random.Random(0)
    asked = [questions(entries, TEST_QUESTIONS, choice) for entries in documents(conversations)]
    own = [question for about in asked for question in about]
    other = [
        {**question, "prompt": [following[0]["prompt"][0], question["prompt"][1]]}
        for about, following in zip(asked, [*asked[1:], asked[0]], strict=True)
        for question in about
    ]
    return {"own": own, "other": other}


def make_trainer(assets: Any, arguments: argparse.Namespace, folder: str) -> Any:
    """The demo's tier 2, but for the data, the number of steps and the store."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from frozen_peft import FrozenContextConfig, FrozenContextTrainer, lora_config
    from tests.documentation.conversations import read_jsonl

    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir)
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir)
    train = training_samples(read_jsonl(assets.train_file), arguments.steps, arguments.seed)
    held_out = held_out_samples(read_jsonl(assets.test_file))
    names = ("own", "other") if arguments.drift else ("own",)
    args = FrozenContextConfig(
        folder,
        tier=2,
        max_steps=arguments.steps,
        per_device_train_batch_size=NUM_DOCUMENTS * QUESTIONS_PER_STEP,
        per_device_eval_batch_size=1,
        learning_rate=arguments.learning_rate,
        warmup_steps=5,
        lr_scheduler_type="cosine",
        train_sampling_strategy="sequential",
        context_cache_size="1GiB" if arguments.staleness else "0",
        max_context_staleness=arguments.staleness,
        gradient_checkpointing=False,
        verify_context="never",
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=arguments.seed,
    )
    return FrozenContextTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(train),
        eval_dataset={name: Dataset.from_list(held_out[name]) for name in names},
        processing_class=tokenizer,
        peft_config=lora_config(model, r=16, lora_alpha=32),
    )


def main() -> None:
    """Runs one training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--staleness", type=int, required=True, help="max_context_staleness")
    parser.add_argument("--seed", type=int, default=0, help="decides documents, questions and the initial adapter")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak of the cosine schedule")
    parser.add_argument("--drift", action="store_true", help="also measure how contexts age; time is not comparable")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the demo's model and data are or are built")
    arguments = parser.parse_args()

    from tests.benchmarks.drift import Drift
    from tests.documentation.assets import ensure_demo_assets

    warnings.simplefilter("ignore")
    assets = ensure_demo_assets(arguments.assets)
    clock = make_clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(assets, arguments, folder)
        trainer.add_callback(clock)
        drift = Drift(trainer) if arguments.drift else None
        if drift is not None:
            trainer.add_callback(drift)
            before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    encoded, reused = (sum(log[f"context/tokens_{name}"] for log in logs) for name in ("encoded", "reused"))
    figures = {
        "staleness": arguments.staleness,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "held_out_loss": after["eval_own_loss"],
        "train_loss": statistics.mean(log["loss"] for log in logs[-STEPS_PER_ROUND:]),
        "seconds": sum(wall for wall, _ in clock.steps),
        "cpu_seconds": sum(cpu for _, cpu in clock.steps),
        "prefill_seconds": sum(log["context/prefill_seconds"] for log in logs),
        "decision_seconds": sum(log["context/decision_seconds"] for log in logs),
        "tokens_encoded": encoded,
        "tokens_reused": reused,
        "hit_rate": reused / (encoded + reused),
        "context_tokens": statistics.mean(map(len, trainer.train_dataset["input_ids"])),
        "held_out_samples": len(trainer.eval_dataset["own"]),
    }
    if drift is not None:
        figures["drift"] = drift.summary()
        figures["context_worth"] = [losses["eval_other_loss"] - losses["eval_own_loss"] for losses in (before, after)]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

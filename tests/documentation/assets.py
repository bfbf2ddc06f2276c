# SPDX-License-Identifier: Apache-2.0
"""The demo's model and data, built once and reused."""

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from tests.documentation.conversations import (
    MAX_CONTEXT_TOKENS,
    MIN_CONTEXT_TOKENS,
    build_conversations,
    split_modules,
    write_jsonl,
)
from tests.documentation.lessons import Curriculum, build_lessons
from tests.documentation.library import ModuleDocumentation, list_public_modules, read_standard_library
from tests.documentation.model import ModelSize, build_model, pretrain
from tests.documentation.tokenizer import train_tokenizer

FACTS_FILE = "facts.json"


@dataclass(frozen=True)
class AssetSettings:
    """What the assets are built from; the defaults are the demo, smaller values are for tests.

    Attributes:
        vocab_size: Of the tokenizer. Small, so that every token is seen often in the short training.
        min_tokens: Shortest context of the conversations, in tokens.
        max_tokens: Longest context of the conversations, in tokens.
        train_questions: Train samples per context.
        test_questions: Test samples per context.
        test_fraction: Share of the documented names whose modules are held out.
        model: Shape of the tiny model.
        curriculum: What it is pretrained on.
        learning_rate: Peak of the pretraining.
    """

    vocab_size: int = 1024
    min_tokens: int = MIN_CONTEXT_TOKENS
    max_tokens: int = MAX_CONTEXT_TOKENS
    train_questions: int = 4
    test_questions: int = 2
    test_fraction: float = 0.15
    model: ModelSize = field(default_factory=ModelSize)
    curriculum: Curriculum = field(default_factory=Curriculum)
    learning_rate: float = 4e-3


@dataclass(frozen=True)
class DemoAssets:
    """Where the assets are.

    Attributes:
        model_dir: An ordinary checkpoint with its tokenizer.
        train_file: Conversations in TRL's prompt-completion format, one JSON object a line.
        test_file: The same about modules that neither tokenizer, model nor `train_file` has seen.
        facts: Counts and losses recorded while building.
    """

    model_dir: Path
    train_file: Path
    test_file: Path
    facts: dict[str, float]


def ensure_demo_assets(
    output_dir: Path,
    *,
    seed: int = 0,
    settings: AssetSettings | None = None,
    modules: list[ModuleDocumentation] | None = None,
) -> DemoAssets:
    """Returns the assets, after building them if they are not there; that takes about two minutes on two cores.

    They are built in a temporary folder and renamed at the end, so a run that is cut short leaves nothing half done.
    Another seed, other settings or another Python version make other assets beside them.

    Args:
        output_dir: Folder in which the assets' folder is.
        seed: Decides weights, order and splits.
        settings: Sizes and lengths; the demo's by default.
        modules: Documentation to use in place of the standard library's.

    Returns:
        The assets' places.
    """
    settings = settings or AssetSettings()
    names = None if modules is None else [module.name for module in modules]
    recipe = json.dumps([asdict(settings), seed, names, platform.python_version()], sort_keys=True)
    final = output_dir / f"assets-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if not final.is_dir():
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".assets-") as parent:
            built = Path(parent) / "assets"
            built.mkdir()
            with one_thread():
                _build(built, settings, modules or _read_with_progress(), seed)
            # Another process may have been faster; its result is the same.
            if not final.is_dir():
                shutil.move(built, final)
    facts = json.loads((final / FACTS_FILE).read_text(encoding="utf-8"))
    return DemoAssets(final / "model", final / "train.jsonl", final / "test.jsonl", facts)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread and restores the number it had.

    The tiny model's tensors are too small to share between threads, and on a machine that is busy otherwise, threads
    that wait for each other make a step take many times as long.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _build(folder: Path, settings: AssetSettings, modules: list[ModuleDocumentation], seed: int) -> None:
    train_modules, test_modules = split_modules(modules, test_fraction=settings.test_fraction, seed=seed)
    tokenizer = train_tokenizer(
        (entry.render() for module in train_modules for entry in module.entries), vocab_size=settings.vocab_size
    )

    @cache
    def count_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    limits = {"min_tokens": settings.min_tokens, "max_tokens": settings.max_tokens, "seed": seed}
    train = build_conversations(train_modules, count_tokens, questions_per_context=settings.train_questions, **limits)
    test = build_conversations(test_modules, count_tokens, questions_per_context=settings.test_questions, **limits)
    for name, conversations in (("train", train), ("test", test)):
        if not conversations:
            raise ValueError(
                f"The {name} modules give no context of `min_tokens={settings.min_tokens}` or more. Lower it, or hold "
                "out another `test_fraction`."
            )
        write_jsonl(folder / f"{name}.jsonl", conversations)

    lessons = build_lessons(train_modules, tokenizer, count_tokens, settings.curriculum, seed=seed)
    model = build_model(tokenizer, settings.model, seed=seed)
    loss = pretrain(
        model,
        tokenizer,
        lessons,
        folder / "model",
        batch_size=settings.curriculum.batch_size,
        learning_rate=settings.learning_rate,
        seed=seed,
    )
    facts = {
        "train_modules": len(train_modules),
        "test_modules": len(test_modules),
        "train_samples": len(train),
        "test_samples": len(test),
        "vocabulary": len(tokenizer),
        "weights": model.num_parameters(),
        "pretraining_steps": settings.curriculum.steps,
        "pretraining_tokens": sum(len(ids) for ids in lessons["input_ids"]),
        "pretraining_loss": loss,
    }
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _read_with_progress() -> list[ModuleDocumentation]:
    # The delay keeps the bar away from machines that read the library in a moment.
    with tqdm(total=len(list_public_modules()), desc="Reading documentation", unit=" modules", delay=2) as bar:
        return read_standard_library(lambda _: bar.update())

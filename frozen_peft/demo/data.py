# SPDX-License-Identifier: Apache-2.0
"""The demo's files: conversations with an instruction in their contexts, and probes about things held out from them.

People's names, what directions are about and what else is talked of are drawn from one part of the vocabulary for
training and from the other for probes, so that what is measured was never trained on.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frozen_peft.data import strip_instructions
from frozen_peft.data.rows import dump_row
from frozen_peft.demo.world import ITEMS, NAMES, NOUNS, Request, Scene, Vocabulary, draw_scene, message
from frozen_peft.utils.files import whole_file

__all__ = ["DemoData", "DemoFiles", "write_demo_files"]

# A part of the vocabulary is held out: every fourth word.
HELD_OUT = Vocabulary(NAMES[::4], ITEMS[::4], NOUNS[::4])
TRAINED = Vocabulary(*(tuple(w for w in words if w not in words[::4]) for words in (NAMES, ITEMS, NOUNS)))


@dataclass(frozen=True)
class DemoData:
    """How much there is of what.

    Attributes:
        num_scenes: Contexts to train on; each has `requests`.
        num_probed: Contexts of the probes; each has `probes`.
        num_prompts: Prompts without an answer.
        tokens: Shortest and longest context, drawn evenly on a logarithmic scale.
        short_tokens: The same of the short conversations, for tier 1.
        requests: Directions and questions on each context to train on.
        probes: The same on each context of the probes.
        seed: Decides everything.
    """

    num_scenes: int = 96
    num_probed: int = 20
    num_prompts: int = 8
    tokens: tuple[int, int] = (300, 2000)
    short_tokens: tuple[int, int] = (80, 160)
    requests: tuple[int, int] = (2, 2)
    probes: tuple[int, int] = (5, 5)
    seed: int = 0


@dataclass(frozen=True)
class DemoFiles:
    """Where the files are. All are JSON Lines.

    Attributes:
        conversations: Samples whose contexts hold the instruction that their decisions follow.
        stripped: The same without the instruction.
        short: Stripped samples of short contexts.
        held_out: Stripped samples about what was held out.
        prompts: Prompts with the instruction and without an answer.
        probes: Probes about what was held out, stripped: directions as targets, questions as controls.
        pairs: Preference pairs, stripped: the decisions of `stripped`, and for each what the instruction is against.
        held_out_pairs: The same about what was held out.
    """

    conversations: Path
    stripped: Path
    short: Path
    held_out: Path
    prompts: Path
    probes: Path
    pairs: Path
    held_out_pairs: Path


def write_demo_files(folder: Path, data: DemoData = DemoData()) -> DemoFiles:
    """Writes the files that are not there yet.

    Args:
        folder: Where to; made if needed.
        data: How much of what.
    """
    files = DemoFiles(*(folder / f"{name}.jsonl" for name in DemoFiles.__annotations__))
    folder.mkdir(parents=True, exist_ok=True)
    _write(files.conversations, _samples(data, data.num_scenes, data.tokens, TRAINED, "train"))
    _write(files.stripped, map(_strip, _samples(data, data.num_scenes, data.tokens, TRAINED, "train")))
    _write(files.short, map(_strip, _samples(data, data.num_scenes, data.short_tokens, TRAINED, "short")))
    _write(files.held_out, map(_strip, _samples(data, data.num_probed, data.tokens, HELD_OUT, "probes")))
    _write(files.prompts, _prompts(data))
    _write(files.probes, map(_strip, _probes(data)))
    _write(files.pairs, map(_strip, _pairs(data, data.num_scenes, TRAINED, "train")))
    _write(files.held_out_pairs, map(_strip, _pairs(data, data.num_probed, HELD_OUT, "probes")))
    return files


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    if not path.exists():
        with whole_file(path) as file:
            file.writelines(map(dump_row, rows))


def _strip(row: dict[str, Any]) -> dict[str, Any]:
    return strip_instructions(row, tidy=True)


def _samples(
    data: DemoData, count: int, tokens: tuple[int, int], vocabulary: Vocabulary, part: str
) -> Iterator[dict[str, Any]]:
    """Prompt-completion samples, those on one context after each other."""
    for scene, request in _requests(data, count, tokens, vocabulary, part):
        yield {"prompt": _prompt(scene, request), "completion": [message("assistant", request.right)]}


def _pairs(data: DemoData, count: int, vocabulary: Vocabulary, part: str) -> Iterator[dict[str, Any]]:
    for scene, request in _requests(data, count, data.tokens, vocabulary, part):
        yield {
            "prompt": _prompt(scene, request),
            "chosen": [message("assistant", request.right)],
            "rejected": [message("assistant", request.other)],
        }


def _requests(
    data: DemoData, count: int, tokens: tuple[int, int], vocabulary: Vocabulary, part: str
) -> Iterator[tuple[Scene, Request]]:
    """What is said in each scene."""
    for scene, choice in _scenes(data, count, tokens, vocabulary, part):
        directions, questions = data.requests
        requests = [scene.direction(choice) for _ in range(directions)]
        requests += [scene.question(choice) for _ in range(questions)]
        for request in requests:
            yield scene, request


def _prompts(data: DemoData) -> Iterator[dict[str, Any]]:
    for scene, choice in _scenes(data, data.num_prompts, data.tokens, TRAINED, "prompts"):
        yield {"prompt": _prompt(scene, scene.direction(choice))}


def _probes(data: DemoData) -> Iterator[dict[str, Any]]:
    for number, (scene, choice) in enumerate(_scenes(data, data.num_probed, data.tokens, HELD_OUT, "probes")):
        directions, questions = data.probes
        requests = [("target", f"direction {i}", scene.direction(choice)) for i in range(directions)]
        requests += [("control", f"question {i}", scene.question(choice)) for i in range(questions)]
        for kind, name, request in requests:
            yield {
                "id": f"context {number}, {name}",
                "kind": kind,
                "prompt": _prompt(scene, request),
                "preferred": request.right,
                "rejected": request.other,
                "expected": request.right,
            }


def _scenes(
    data: DemoData, count: int, tokens: tuple[int, int], vocabulary: Vocabulary, part: str
) -> Iterator[tuple[Scene, random.Random]]:
    shortest, longest = tokens
    choice = random.Random(f"{data.seed} {part}")
    for _ in range(count):
        num_tokens = round(shortest * (longest / shortest) ** choice.random())
        yield draw_scene(choice, num_tokens, obeys=True, vocabulary=vocabulary), choice


def _prompt(scene: Scene, request: Request) -> list[dict[str, str]]:
    return [*scene.messages, message("user", request.text)]

# SPDX-License-Identifier: Apache-2.0
"""Files for the command line: prompts whose good behaviour comes from examples in them, questions, and probes.

    python -m tests.benchmarks.real.road MODEL_DIR OUTPUT_DIR

What comes next is in `docs/real.md`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from frozen_peft.data import strip_instructions
from tests.benchmarks.real.samples import SampleFiles
from tests.benchmarks.real.tasks import Sample, draw_samples
from tests.benchmarks.real.texts import Part, read_texts

NUM_TOKENS = (300, 500)
NUM_PROMPTS, NUM_PROBES = 56, 24


def write_road(model_folder: Path, output: Path, num_prompts: int = NUM_PROMPTS, num_probes: int = NUM_PROBES) -> None:
    """Writes `prompts.jsonl`, `questions.jsonl` and `probes.jsonl`.

    Prompts are directions behind text, with examples of the good behaviour before it, which are marked. Questions,
    which the model is to answer as before, and probes have none.

    Args:
        model_folder: The checkpoint, with texts in the folder above it.
        output: Folder of the files.
        num_prompts: Of both kinds, from the train part; of four, one is a question.
        num_probes: From the held-out part, likewise.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    files = SampleFiles(output / "samples", read_texts(model_folder.parent), model, tokenizer, answer_tokens=24)

    def drawn(part: Part, num: int) -> list[Sample]:
        return draw_samples("accept", part, 0, num, files.texts, files.count, NUM_TOKENS)

    output.mkdir(parents=True, exist_ok=True)
    train = drawn("train", num_prompts)
    directions = [{"prompt": _messages(sample)} for sample in train if sample.kind == "target"]
    questions = [{"prompt": _messages(sample)[-1:]} for sample in train if sample.kind == "control"]
    _write(output / "prompts.jsonl", directions)
    _write(output / "questions.jsonl", questions)
    rows = files.rows("accept", "held-out", 0, num_probes, NUM_TOKENS)
    samples = zip(drawn("held-out", num_probes), rows, strict=True)
    _write(output / "probes.jsonl", [_probe(sample, row, tokenizer) for sample, row in samples])


def _messages(sample: Sample) -> list[dict[str, Any]]:
    """Memories, marked as what is to be stripped, and the text with its request."""
    memories = [
        {"role": role, "content": text, "instruction": True}
        for memory in sample.memories
        for role, text in zip(("user", "assistant"), memory, strict=True)
    ]
    return [*memories, {"role": "user", "content": f"{sample.document}\n\n{sample.request}"}]


def _probe(sample: Sample, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A probe without memories; of a question, what the base says against a refusal."""
    said = tokenizer.decode(row["decision"], skip_special_tokens=True)
    rejected = (
        "I will not." if row["rejected"] is None else tokenizer.decode(row["rejected"], skip_special_tokens=True)
    )
    probe = {"prompt": _messages(sample), "preferred": said, "rejected": rejected}
    if sample.kind == "control":
        return strip_instructions(probe | {"kind": "control"})
    return strip_instructions(probe | {"kind": "target", "expected": said})


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the checkpoint, beside the texts")
    parser.add_argument("output", type=Path, help="folder of the files")
    arguments = parser.parse_args()
    write_road(arguments.model, arguments.output)


if __name__ == "__main__":
    main()

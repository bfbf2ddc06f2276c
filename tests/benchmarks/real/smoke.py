# SPDX-License-Identifier: Apache-2.0
"""A made model of the same architecture and made text, with which the whole study takes seconds."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.real.fetch import CONVERSATIONS, DOCUMENTS, MODEL
from tests.benchmarks.real.methods import Size
from tests.benchmarks.real.words import WORDS
from tests.documentation.tokenizer import train_tokenizer

SMALL = Size(
    cut={},
    seeds=(0,),
    rates=(1e-3, 3e-3),
    steps=4,
    batch_size=2,
    measured=(2,),
    num_tokens=(40, 80),
    short_tokens=(8, 16),
    long_tokens=(150, 200),
    num_dev=4,
    num_held_out=8,
    num_long=2,
    num_flow=2,
    answer_tokens=6,
    rank=4,
)
# In a test: one task goes through every method, the others are drawn only.
SMALLEST = replace(
    SMALL,
    tasks=("conditional",),
    rates=(3e-3,),
    steps=2,
    measured=(1,),
    num_held_out=4,
    num_dev=2,
    num_long=1,
    num_flow=1,
)


def make(folder: Path) -> Path:
    """Writes text and a checkpoint as `fetch` does, and returns the checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    choice = random.Random(0)
    documents = [
        {"source": f"page {index}", "paragraphs": [" ".join(_sentences(choice, 3)) for _ in range(8)]}
        for index in range(30)
    ]
    told = [
        {"people": [f"p{index}", f"q{index}"], "lines": [[line % 2, next(_sentences(choice, 1))] for line in range(9)]}
        for index in range(60)
    ]
    for name, rows in ((DOCUMENTS, documents), (CONVERSATIONS, told)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([" ".join(row["paragraphs"]) for row in documents], vocab_size=512)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    return folder / MODEL


def _sentences(choice: random.Random, num: int) -> Iterator[str]:
    words = [word for part in WORDS.values() for word in (*part.verbs, *part.objects, *part.things)]
    for _ in range(num):
        yield f"They {' and '.join(choice.sample(words, choice.randint(3, 9)))}."

# SPDX-License-Identifier: Apache-2.0
"""Trains tier 2 over a 4-bit base and over the whole one on the same samples, and prints both as JSON.

    python -m tests.benchmarks.real.nf4 --model MODEL_DIR --results RESULTS

Task `accept`, the same adapters, order and rate; what the base says to questions is the whole one's for both.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from frozen_peft import quantization_config
from frozen_peft.adapters import keep_linear4bit_trainable
from tests.benchmarks.real.methods import METHODS, TIER_2, Size
from tests.benchmarks.real.report import exact_rate
from tests.benchmarks.real.scores import loss, score_rows
from tests.benchmarks.real.smoke import SMALL
from tests.benchmarks.real.study import PROBE_SEED, Study, Watch
from tests.benchmarks.real.texts import read_texts

TASK = "accept"
RATE = 1e-3


def compare(study: Study, rate: float = RATE) -> dict[str, dict[str, float]]:
    """Per precision: bytes of the weights, processor seconds of the steps, held-out loss and targets met exactly.

    Args:
        study: Its model, samples and size; a quarter of its steps are trained.
        rate: Learning rate.
    """
    size = study.size
    (method,) = (method for method in METHODS if method.name == TIER_2)
    steps = max(1, size.steps // 4)
    rows = study.samples.rows(TASK, "train", 0, size.steps * size.batch_size, size.num_tokens)
    held_out = study.samples.rows(TASK, "held-out", PROBE_SEED, size.num_held_out, size.num_tokens)
    figures = {}
    for name in ("float32", "nf4"):
        model, watch = load(study.model_folder, name == "nf4"), Watch((), lambda model: None)
        num_bytes = model.get_memory_footprint()
        model = study.fit(model, method, rows, steps, rate, 0, watch)
        scores = score_rows(model, study.samples.tokenizer, held_out)["given"]
        figures[name] = {"model_bytes": num_bytes, "seconds": watch.seconds, "steps": steps}
        for which, found in scores.items():
            figures[name] |= {f"{which}_loss": loss(found), f"{which}_exact": exact_rate(found, ("target",))}
    return figures


def load(folder: Path, in_4_bit: bool) -> Any:
    """The model, 4-bit or in float32."""
    fields = {"quantization_config": quantization_config(str(folder))} if in_4_bit else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **fields)
    if in_4_bit:
        keep_linear4bit_trainable(model)
    return model


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="folder whose samples are used, if they are there")
    parser.add_argument("--smoke", action="store_true", help="few and short samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    size = SMALL if arguments.smoke else Size()
    study = Study.of(arguments.model, read_texts(arguments.model.parent), arguments.results, size)
    print(json.dumps({"precisions": compare(study), "cpu_seconds": time.process_time()}))


if __name__ == "__main__":
    main()

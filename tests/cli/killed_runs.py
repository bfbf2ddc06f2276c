# SPDX-License-Identifier: Apache-2.0
"""Kills trainings at random moments, resumes them, and compares what they end with; a process of its own.

The libraries are imported once, and each run is a fork of this process: what is killed is a process that has just
begun to train, not one that still imports.

    python -m tests.cli.killed_runs FOLDER NUM_KILLS SEED
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from frozen_peft.cli import main
from frozen_peft.training.checkpoints import UNFINISHED, last_whole_checkpoint
from tests.documentation.tokenizer import train_tokenizer
from tests.tiny_models import tiny_model

FIELDS = {
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lora_dropout": 0.2,
    "context_cache_size": "1GiB",
    "max_context_staleness": 3,
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "num_examples": 1,
    "max_example_tokens": 2,
}


def make_assets(folder: Path) -> list[str]:
    """A tiny hybrid and samples; the arguments that name them."""
    system = [f"entry {number} of {number * 7 % 31}" for number in range(20)]
    rows = [
        {
            "prompt": [
                {"role": "system", "content": " ".join(system[row % 3 :])},
                {"role": "user", "content": f"what is {row}?"},
            ],
            "completion": [{"role": "assistant", "content": f"entry {row} of many"}],
        }
        for row in range(10)
    ]
    tokenizer = train_tokenizer([str(rows)], vocab_size=320)
    tiny_model("qwen3_5_text", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    samples = folder / "samples.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = {"model_name_or_path": folder / "model", "dataset_name": samples, "eval_dataset_name": samples}
    return [argument for name, value in (names | FIELDS).items() for argument in (f"--{name}", str(value))]


def start(arguments: list[str], output_dir: Path) -> int:
    """Begins a run that goes on from what is there; its process id."""
    process = os.fork()
    if process:
        return process
    with (output_dir.parent / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        status = 1
        try:
            status = main(["train", *arguments, "--output_dir", str(output_dir), "--resume", "auto"])
        finally:
            os._exit(status)


def finish(arguments: list[str], output_dir: Path) -> float:
    """Runs to the end; seconds that it took."""
    began = time.monotonic()
    _, status = os.waitpid(start(arguments, output_dir), 0)
    assert status == 0, f"the run ended with {status}, see log.txt"
    return time.monotonic() - began


def ends_before(process: int, seconds: float) -> bool:
    """Kills a run after some time; whether it had ended before."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            assert status == 0, f"the run ended with {status}, see log.txt"
            return True
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def require_whole(output_dir: Path) -> str:
    """Reads whatever has its name; says from where a run would go on."""
    for path in output_dir.glob("*.safetensors"):
        load_file(path)
    last = last_whole_checkpoint(output_dir)
    if last is None:
        return "anew"
    load_file(last / "adapter_model.safetensors")
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    assert last.name == f"checkpoint-{state['global_step']}"
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(last / name, weights_only=True)
    return last.name


def require_same(output_dir: Path, whole: Path) -> None:
    """Compares final weights and what else a run leaves."""
    weights, expected = (load_file(folder / "adapter_model.safetensors") for folder in (output_dir, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected), f"{output_dir} ended otherwise"
    assert sorted(path.name for path in output_dir.iterdir() if path.name != "eval_before_results.json") == sorted(
        path.name for path in whole.iterdir() if path.name != "eval_before_results.json"
    )
    assert not (output_dir / UNFINISHED).exists()
    evaluated = [json.loads((folder / "eval_results.json").read_text()) for folder in (output_dir, whole)]
    assert evaluated[0]["eval_loss"] == evaluated[1]["eval_loss"]


def run(folder: Path, num_kills: int, seed: int) -> None:
    """Prints how often a run was killed, and from where it went on."""
    arguments = make_assets(folder)
    seconds = finish(arguments, folder / "whole")
    generator = random.Random(seed)
    resumed: list[str] = []
    num_halves = num_runs = 0
    while len(resumed) < num_kills:
        num_runs += 1
        output_dir = folder / f"killed-{num_runs}"
        while len(resumed) < num_kills:
            began = time.monotonic()
            if ends_before(start(arguments, output_dir), generator.uniform(0.2, 1.0) * seconds):
                # The first run fills caches, and those that go on have less to do: kills are to hit these, too.
                seconds = min(seconds, time.monotonic() - began)
                break
            num_halves += (output_dir / UNFINISHED).exists()
            resumed.append(require_whole(output_dir))
        else:
            finish(arguments, output_dir)
        require_same(output_dir, folder / "whole")
    counts = {name: resumed.count(name) for name in sorted(set(resumed))}
    print(json.dumps({"kills": len(resumed), "while saving": num_halves, "runs": num_runs, "from": counts}))


if __name__ == "__main__":
    # What the command imports where it needs it.
    for module in (
        "frozen_peft.cli.train",
        "frozen_peft.training",
        "frozen_peft.report",
        "trl.trainer.sft_trainer",
    ):
        importlib.import_module(module)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft demo`: from an instruction in the context to a disposition in the weights, on a tiny model."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from frozen_peft.cli.errors import reported

__all__ = ["DEMO_DIR", "DEMO_NAME", "model_source", "run"]

# Where the demo writes, and where `demo` as a dataset's name is looked for.
DEMO_DIR = Path("outputs/demo")
# As a model's name: the one that the package ships. As a dataset's: the demo's, written on first use.
DEMO_NAME = "demo"


def run(arguments: Sequence[str]) -> None:
    """Runs the demo.

    Args:
        arguments: Command-line arguments after `demo`.

    Raises:
        CommandError: An argument cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="frozen-peft demo",
        description="A tiny hybrid model accepts directions where its context tells it to, and suggests something "
        "else where it does not. The demo strips the instruction from conversations, trains the three tiers on them, "
        "and measures whether the model now accepts directions untold and still answers questions from its context.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=DEMO_DIR, help="where everything is written, demo.json too")
    parser.add_argument("--seed", type=int, default=0, help="decides adapters, samples and their order")
    parser.add_argument("--files-only", action="store_true", help="write conversations and probes, and train nothing")
    options = parser.parse_args(arguments)
    from frozen_peft.demo import DemoData, write_demo_files

    data = DemoData(seed=options.seed)
    with reported(raised_in="frozen_peft"):
        if options.files_only:
            files = write_demo_files(options.output, data)
            print("\n".join(str(getattr(files, item.name)) for item in fields(files)))
            return
        from frozen_peft.demo.job import DemoSettings, run_demo

        run_demo(options.output, DemoSettings(data=data, seed=options.seed))


def model_source(name: str) -> str:
    """Returns where a model is loaded from: the one that the package ships for `demo`, else what was named.

    Raises:
        ValueError: It is `demo`, and a model of that name lies here too.
    """
    if name != DEMO_NAME:
        return name
    if Path(name, "config.json").exists():
        raise ValueError(f"{name} is the model that ships, and a folder {name} with another lies here: write ./{name}")
    from frozen_peft.demo import CHECKPOINT

    return str(CHECKPOINT)

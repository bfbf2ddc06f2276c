# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft demo`: from an instruction in the context to a disposition in the weights, on a tiny model.

A tiny hybrid model accepts directions where its context tells it to, and suggests something else where it does not.
The demo strips the instruction from conversations, trains the three tiers on them, and measures whether the model now
accepts directions untold and still answers questions from its context.
"""

from collections.abc import Sequence
from dataclasses import fields

from frozen_peft import demo
from frozen_peft.cli.arguments import CommandParser

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Runs the demo.

    Args:
        arguments: Command-line arguments after `demo`.

    Raises:
        CommandError: An argument cannot be used.
    """
    parser = CommandParser("demo", __doc__)
    parser.option("output", "where everything is written, demo.json too", demo.DEMO_DIR)
    parser.option("seed", "decides adapters, samples and their order", 0)
    parser.option("files_only", "write conversations and probes, and train nothing", False)
    options = parser.read(arguments)
    data = demo.DemoData(seed=options.seed)
    if options.files_only:
        files = demo.write_demo_files(options.output, data)
        print("\n".join(str(getattr(files, item.name)) for item in fields(files)))
        return
    # At first use: torch and transformers take seconds to import.
    from frozen_peft.demo.job import run_demo

    run_demo(options.output, data)

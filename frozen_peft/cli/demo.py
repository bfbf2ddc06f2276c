# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft demo`: the main job on the embedded tiny model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from frozen_peft.cli.errors import reported

__all__ = ["DEMO_DIR", "run"]

# Where `demo` as a model or dataset name is built and looked for.
DEMO_DIR = Path("outputs/demo")


def run(arguments: Sequence[str]) -> None:
    """Runs the demo.

    Args:
        arguments: Command-line arguments after `demo`.

    Raises:
        CommandError: An argument cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="frozen-peft demo",
        description="Trains a tiny hybrid model from scratch on the standard library's documentation, then its "
        "adapters with frozen contexts, and prints the held-out loss before and after, with the right contexts and "
        "with shuffled ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=DEMO_DIR, help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, data order and splits")
    options = parser.parse_args(arguments)
    from frozen_peft.demo import run_demo

    with reported(raised_in="frozen_peft"):
        run_demo(options.output_dir, options.seed)

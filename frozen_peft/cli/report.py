# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft report`: one page on a run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from frozen_peft.cli.errors import reported

__all__ = ["run"]

_DESCRIPTION = """\
Writes one self-contained HTML file on a run: its losses, where time, context tokens and memory went, what reached the
adapters as gradient, probes before and after, decisions side by side, recipe and versions. It loads nothing and runs
no script, and can be read on a telephone, in the dark and on paper.

RUN_DIR is the `output_dir` of `frozen-peft train`, which writes the page at its end too. What is missing in the
folder, or cannot be read, the page names, and shows the rest; so it also does for a run that was stopped or still
goes on."""


def run(arguments: Sequence[str]) -> None:
    """Writes the page, and prints where it is and what it lacks.

    Args:
        arguments: Command-line arguments after `report`.

    Raises:
        CommandError: There is no such folder or file, or the page cannot be written.
    """
    options = _parser().parse_args(arguments)
    with reported():
        if options.output is not None and options.output.is_dir():
            raise ValueError(f"--output {options.output} is a folder; give the name of a file")
        # After the arguments are read: matplotlib takes a second.
        from frozen_peft.report import read_run_folder, render_page, write_page

        found = read_run_folder(options.run_dir, options.probes, options.merged)
        page = write_page(found, render_page(found), options.output)
    print(f"Written to {page}.")
    for name in found.missing:
        print(f"  not there: {name}")
    for problem in found.problems:
        print(f"  {problem}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="frozen-peft report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write, whole or not at all (default: RUN_DIR/report.html)"
    )
    parser.add_argument(
        "--probes",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="what `frozen-peft evaluate --output` wrote, beside those in RUN_DIR",
    )
    parser.add_argument(
        "--merged",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="merged models whose merge_report.json is shown, beside those in RUN_DIR",
    )
    return parser

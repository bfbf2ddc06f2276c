# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft report`: one page on a run.

Writes one self-contained HTML file on a run: its losses, where time, context tokens and memory went, what reached the
adapters as gradient, probes before and after, decisions side by side, recipe and versions. It loads nothing and runs
no script, and can be read on a telephone, in the dark and on paper.

RUN_DIR is the `output_dir` of `frozen-peft train`, which writes the page at its end too. What is missing in the
folder, or cannot be read, the page names, and shows the rest; so it also does for a run that was stopped or still
goes on.
"""

from collections.abc import Sequence
from pathlib import Path

from frozen_peft.cli.arguments import CommandParser, require_writable
from frozen_peft.cli.errors import reported

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Writes the page, and prints where it is and what it lacks.

    Args:
        arguments: Command-line arguments after `report`.

    Raises:
        CommandError: There is no such folder or file, or the page cannot be written.
    """
    options = _parser().read(arguments)
    with reported():
        require_writable(options.output)
        # After the arguments are read: matplotlib takes a second.
        from frozen_peft.report.page import write_report

        page, found = write_report(options.run_dir, options.output, options.probes or [], options.merged or [])
    print(f"Written to {page}.")
    for name in found.missing:
        print(f"  not there: {name}")
    for problem in found.problems:
        print(f"  {problem}")


def _parser() -> CommandParser:
    parser = CommandParser("report", __doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run")
    text = "file to write, whole or not at all (default: RUN_DIR/report.html)"
    parser.option("output", text, metavar="FILE", type=Path)
    text = "what `frozen-peft evaluate --output` wrote, beside those in RUN_DIR"
    parser.option("probes", text, metavar="FILE", type=Path, nargs="+")
    text = "merged models whose merge_report.json is shown, beside those in RUN_DIR"
    parser.option("merged", text, metavar="DIR", type=Path, nargs="+")
    return parser

# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft pairs`: preference pairs to train on, held apart from the probes to measure with.

A row to read is a probe (`prompt`, `preferred`, `rejected`) or a pair (`prompt`, `chosen`, `rejected`). With
--rejected it is a sample (`prompt`, `completion`), such as `frozen-peft sample` writes: its decision is chosen, and
that of the other file on the same prompt rejected. Instructions count as if they were in place, so that decisions with
and without them meet; the pair has the prompt of the rejected one.

What is trained on is none to measure with: --apart-from leaves out every row that has the id or the prompt of a probe,
with instructions or without, and with --group every one that shares a document, a world or a customer with a probe.
"""

from collections.abc import Sequence
from pathlib import Path

from frozen_peft.cli.arguments import CommandParser
from frozen_peft.cli.errors import reported
from frozen_peft.data import write_pairs
from frozen_peft.utils.tables import aligned

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Writes pairs and prints how many.

    Args:
        arguments: Command-line arguments after `pairs`.

    Raises:
        CommandError: An argument or a row cannot be used; nothing was written.
    """
    parser = CommandParser("pairs", __doc__)
    parser.add_argument("source", metavar="IN.jsonl", type=Path, help="probes, pairs, or decisions that are chosen")
    parser.add_argument("target", metavar="OUT.jsonl", type=Path, help="where the pairs go, whole or not at all")
    parser.option("rejected", "decisions on the same prompts that are not", metavar="FILE", type=Path)
    text = "probes to measure with; may be given several times"
    parser.option("apart_from", text, metavar="PROBES", type=Path, action="append")
    parser.option("group", "leave out what has a probe's value in this column too", metavar="NAME")
    options = parser.read(arguments)
    with reported():
        if not options.apart_from:
            parser.refuse_idle(options, ["group"], "without --apart-from")
        summary = write_pairs(
            options.source, options.target, options.rejected, options.apart_from or (), options.group
        )
    rows = [("rows read", str(summary.num_read))]
    if options.apart_from:
        rows.append(("held apart", str(summary.num_read - summary.num_apart)))
    rows.append(("pairs written", f"{summary.num_written} ({options.target})"))
    print("\n".join(aligned(rows)))

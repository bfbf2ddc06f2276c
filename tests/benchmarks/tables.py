# SPDX-License-Identifier: Apache-2.0
"""Pages of figures: a table in Markdown, and everything behind it in JSON."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import describe_machine


@dataclass(frozen=True)
class Page:
    """A page and its figures.

    Attributes:
        name: Of its files, without ending.
        text: Markdown.
        figures: What is kept in JSON.
    """

    name: str
    text: str
    figures: list[Mapping[str, Any]]

    def write(self, folder: Path) -> None:
        """Writes both, with the machine they belong to."""
        folder.mkdir(parents=True, exist_ok=True)
        machine = describe_machine()
        (folder / f"{self.name}.md").write_text(f"{self.text}\n\n{machine_facts(machine)}\n")
        results = {"machine": machine, "figures": self.figures}
        (folder / f"{self.name}.json").write_text(json.dumps(results, indent=2) + "\n")


def machine_facts(machine: Mapping[str, str]) -> str:
    """What figures belong to, as the end of a page."""
    return "\n".join(f"- {name}: {text}" for name, text in machine.items())


def cost_row(name: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of processor seconds and MiB, each with its ratio to that of another measurement."""
    return (
        name,
        f"{own['cpu_seconds']:.2f}",
        f"{own['cpu_seconds'] / other['cpu_seconds']:.3f}",
        f"{own['peak_bytes'] / 2**20:.0f}",
        f"{own['peak_bytes'] / other['peak_bytes']:.3f}",
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_words: int = 0) -> str:
    """A table; its first `num_words` columns are words, aligned left, and the others numbers."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    rule = [
        ":" + "-" * (width - 1) if column < num_words else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    return "\n".join(
        "| " + " | ".join(_aligned(line, widths, num_words)) + " |" for line in [tuple(header), rule, *rows]
    )


def _aligned(line: Sequence[str], widths: Sequence[int], num_words: int) -> list[str]:
    return [
        cell.ljust(width) if column < num_words else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def filled(page: str) -> str:
    """A page whose paragraphs have lines of 119 characters; headings, tables, lists, pictures and HTML stay."""
    return "\n\n".join(map(_filled, page.split("\n\n")))


def _filled(paragraph: str) -> str:
    if paragraph.startswith(("#", "|", "- ", "![", "<")):
        return paragraph
    return textwrap.fill(paragraph, width=119, break_long_words=False, break_on_hyphens=False)

# SPDX-License-Identifier: Apache-2.0
"""What a section of the page is made of; the template knows how each looks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Plot", "Section", "Table", "Tile"]


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        svg: As `plots.as_svg` makes it: the one thing on the page that is put in as it is.
        caption: What to see in it.
        is_paper: It has colours of its own, stays white in the dark, and is as wide as the page.
    """

    svg: str
    caption: str
    is_paper: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of texts.

    Attributes:
        caption: What the table shows.
        columns: Their titles.
        rows: Their cells.
        num_names: So many columns from the left are names, the others figures.
        has_words: But for the last one, which is a sentence.
        bars: Of each row, the length of the bar behind its names, from 0 to 1; empty: there are none.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1
    has_words: bool = False
    bars: Sequence[float] = ()

    def is_figure(self, column: int) -> bool:
        """Whether a column holds figures."""
        return self.num_names <= column < len(self.columns) - self.has_words


@dataclass(frozen=True)
class Tile:
    """One of the numbers to read first."""

    title: str
    value: str
    detail: str = ""


@dataclass
class Section:
    """A section of the page.

    Attributes:
        name: Its anchor.
        title: Its heading.
        files: What it is read from, the one that it cannot do without first.
        tiles: Numbers to read first, which the summary shows.
        plots: Figures.
        tables: Tables below them.
        notes: Sentences below those.
        examples: Decisions side by side, as `examples.json` has them.
        text: Text that is shown as it is, such as a recipe.
        absent: Why there is nothing else, or what is not there.
    """

    name: str
    title: str
    files: Sequence[str] = ()
    tiles: list[Tile] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    text: str | None = None
    absent: list[str] = field(default_factory=list)

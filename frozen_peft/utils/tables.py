# SPDX-License-Identifier: Apache-2.0
"""Text whose columns align."""

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] | None = None, indent: str = "  ") -> list[str]:
    """Lines in which the cells of a column begin, or end, at the same place, two spaces apart.

    Args:
        rows: Cells, as many in each row; a heading is a row.
        right: Columns of figures, which end at the same place.
        indent: Before each line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = right or ()
    return [
        (
            indent + "  ".join(cell.rjust(width) if at in right else cell.ljust(width) for at, (cell, width) in cells)
        ).rstrip()
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]

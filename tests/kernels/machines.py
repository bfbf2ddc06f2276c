# SPDX-License-Identifier: Apache-2.0
"""The table of kernels as a page shows it."""

from packaging.version import Version

from frozen_peft.context.kernels import kernel_choices
from frozen_peft.context.kernels.table import Capabilities
from tests.benchmarks.tables import markdown_table

__all__ = ["table_of_kernels"]

# Cards and versions of Triton between which the table differs.
MACHINES = (
    ("A100, L40S, RTX 4090", (8, 0), "3.7.1"),
    ("H100, H200", (9, 0), "3.6"),
    ("H100, H200", (9, 0), "3.7.1"),
    ("B200, RTX 5090", (10, 0), "3.9"),
)


def table_of_kernels() -> str:
    """What runs on every kind of card, and where it was proven."""
    newest = Version("99")
    columns = [
        kernel_choices(Capabilities("cuda", capability, newest, Version(triton), newest, newest))
        for _, capability, triton in MACHINES
    ]
    rows = [
        (choices[0].purpose, *(f"{row.kernel} ({row.proven})" for row in choices))
        for choices in zip(*columns, strict=True)
    ]
    header = ("for", *(f"{cards}, Triton {triton}" for cards, _, triton in MACHINES))
    return markdown_table(header, rows, len(header))

# SPDX-License-Identifier: Apache-2.0
"""Accelerators by name: their memory, and the rates that a step's time is estimated from.

**None of these rates was measured here.** Peaks are the makers' figures for dense matrix products in 16 bit without
sparsity; what share of it a training reaches, and what a host link carries, are assumptions. Measured ones go in place
of them with `--rates`.
"""

import difflib
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from frozen_peft.utils.files import read_json
from frozen_peft.utils.sizes import parse_size

__all__ = ["CARDS", "Card", "Rates", "find_card", "read_rates"]

GIBIBYTE = 1 << 30
# Share of the peak that a training step is assumed to reach, and of a PCIe link that copies from pinned memory do.
ASSUMED_UTILIZATION = 0.35
PCIE4_BYTES, PCIE5_BYTES = 25e9, 50e9


@dataclass(frozen=True)
class Rates:
    """What a step's time is estimated from.

    Attributes:
        flops_per_second: Of matrix products as a training step reaches them, not the peak.
        host_bytes_per_second: Of copies between host and card.
        source: Where they come from, in words.
        measured: Whether they were measured.
    """

    flops_per_second: float
    host_bytes_per_second: float
    source: str
    measured: bool = False


@dataclass(frozen=True)
class Card:
    """An accelerator.

    Attributes:
        name: Its name.
        memory_bytes: Its memory, as it reports it.
        rates: None: nothing is known.
        architecture: Compute capability, by which kernels are chosen; None: unknown.
    """

    name: str
    memory_bytes: int
    rates: Rates | None = None
    architecture: tuple[int, int] | None = None


def _card(name: str, gibibytes: float, peak_teraflops: float, link: float, architecture: tuple[int, int]) -> Card:
    source = (
        f"assumed: {ASSUMED_UTILIZATION:.0%} of the maker's {peak_teraflops:g} TFLOPS (dense, 16 bit), "
        f"{link / 1e9:g} GB/s to the host"
    )
    rates = Rates(peak_teraflops * 1e12 * ASSUMED_UTILIZATION, link, source)
    return Card(name, int(gibibytes * GIBIBYTE), rates, architecture)


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("T4", 14.75, 65, 12e9, (7, 5)),
        _card("L4", 22.0, 121, PCIE4_BYTES, (8, 9)),
        _card("A10G", 22.0, 70, PCIE4_BYTES, (8, 6)),
        _card("RTX3090", 23.6, 71, PCIE4_BYTES, (8, 6)),
        _card("RTX4090", 23.5, 165, PCIE4_BYTES, (8, 9)),
        _card("RTX5090", 31.4, 209, PCIE5_BYTES, (12, 0)),
        _card("A6000", 47.5, 155, PCIE4_BYTES, (8, 6)),
        _card("L40S", 44.4, 362, PCIE4_BYTES, (8, 9)),
        _card("A100-40GB", 39.4, 312, PCIE4_BYTES, (8, 0)),
        _card("A100-80GB", 79.1, 312, PCIE4_BYTES, (8, 0)),
        _card("H100", 79.1, 989, PCIE5_BYTES, (9, 0)),
        _card("H200", 139.8, 989, PCIE5_BYTES, (9, 0)),
        _card("B200", 178.3, 2250, PCIE5_BYTES, (10, 0)),
    )
}
# As `_plain` spells them.
ALIASES = {"h10080gb": "H100", "h200141gb": "H200", "a100": "A100-80GB", "4090": "RTX4090", "3090": "RTX3090",
           "5090": "RTX5090"}  # fmt: skip


def find_card(text: str) -> Card:
    """The accelerator that is meant.

    Args:
        text: One of `CARDS`, in any case and with any dashes and spaces, or a size of memory such as `24GB`, which is
            read as cards are sold: in GiB.

    Raises:
        ValueError: It is neither; the message names the nearest.
    """
    names = {_plain(name): name for name in CARDS}
    wanted = _plain(text)
    if (known := {**names, **ALIASES}.get(wanted)) is not None:
        return CARDS[known]
    if re.fullmatch(r"[0-9.]+ ?[kmgt]?i?b?", text.strip(), re.IGNORECASE) and re.search("[a-z]", text, re.IGNORECASE):
        return Card(text, parse_size(re.sub(r"(?i)([kmgt])i?b?$", r"\1iB", text.strip())))
    near = [names[found] for found in difflib.get_close_matches(wanted, names, n=2, cutoff=0.3)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(CARDS)}"
    raise ValueError(f"no accelerator {text!r}; {hint} A size such as 24GB also does.")


def read_rates(card: Card, path: str | Path) -> Card:
    """A card with rates of the user's own.

    Args:
        card: The card.
        path: A JSON file with `flops_per_second`, `host_bytes_per_second` or both, and optionally `source` (in words)
            and `measured` (true or false).

    Raises:
        ValueError: There is no such file, or it is not that.
    """
    given = read_json(Path(path))
    known = [item.name for item in fields(Rates)]
    if not set(given) <= set(known):
        raise ValueError(f"{path}: rates are a JSON object with some of {', '.join(known)}; found {given!r}")
    for name in ("flops_per_second", "host_bytes_per_second"):
        value = given.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{path}: `{name}` must be a number above 0, found {value!r}")
    fields_given: dict[str, Any] = {"source": f"given: {path}", **given}
    return replace(card, rates=replace(card.rates or Rates(float("nan"), float("nan"), ""), **fields_given))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()

# SPDX-License-Identifier: Apache-2.0
"""The cells of the study: each a file of figures, so that a run that is stopped goes on where it was.

Several processes may fill one folder. The one that works on a cell holds a lock on it, which the system takes back
when the process ends, however it ends.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One thing that is measured.

    Attributes:
        task: The task; `cost` for costs.
        method: The method by its name.
        seed: Of samples and adapters.
        rate: A learning rate that is tried, on the dev part; None: the one that was chosen, on held-out samples.
    """

    task: str
    method: str
    seed: int = 0
    rate: float | None = None

    @property
    def name(self) -> str:
        """Of its file, without ending."""
        last = f"seed {self.seed}" if self.rate is None else f"rate {self.rate:g}"
        return "_".join((self.task, self.method, last)).replace(" ", "-").replace(",", "")


class CellFiles:
    """The figures of cells: in a folder, and those that were gathered into one file before.

    Args:
        folder: Where a cell's figures are written.
        gathered: A JSON object of figures by the cell's name; need not be there.
    """

    def __init__(self, folder: Path, gathered: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        has_gathered = gathered is not None and gathered.exists()
        self._gathered: dict[str, Figures] = json.loads(gathered.read_text())["cells"] if has_gathered else {}

    def get(self, cell: Cell) -> Figures | None:
        """A cell's figures; None: it was not measured yet."""
        path = self.folder / f"{cell.name}.json"
        return json.loads(path.read_text()) if path.exists() else self._gathered.get(cell.name)

    def put(self, cell: Cell, figures: Figures) -> None:
        """Keeps a cell's figures."""
        write_json(self.folder / f"{cell.name}.json", figures)

    def all(self) -> dict[str, Figures]:
        """Figures by the cell's name."""
        found = {path.stem: json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))}
        return dict(sorted((self._gathered | found).items()))

    def claim(self, cell: Cell) -> Any:
        """A context that is True unless another process works on the cell."""
        return locked(self.folder / f"{cell.name}.json", wait=False)

    def best_rate(self, task: str, method: str, rates: Sequence[float]) -> float | None:
        """The learning rate with the least loss on the dev part; None while one of them was not tried."""
        tried = {rate: self.get(Cell(task, method, rate=rate)) for rate in rates}
        losses = {rate: figures["dev_loss"] for rate, figures in tried.items() if figures is not None}
        return min(losses, key=losses.__getitem__) if len(losses) == len(rates) else None


def write_json(path: Path, values: Any) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    part.write_text(json.dumps(values) + "\n")
    part.replace(path)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock that belongs to a file; gives False where another process holds it and there is no waiting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True

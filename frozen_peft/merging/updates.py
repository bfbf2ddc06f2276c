# SPDX-License-Identifier: Apache-2.0
"""What an adapter does to one weight, computed in float32.

Shapes: a weight is [rows, ...] in the layout in which the model keeps it; `start` and `stop` are rows of it, or
experts where experts are stacked. An update by rows never holds more than the rows it is asked for.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, ties

__all__ = [
    "COMBINATIONS",
    "AddVector",
    "Combination",
    "Combined",
    "Layered",
    "LowRank",
    "Replacement",
    "RowReplacement",
    "Update",
]

Combination = Literal["linear", "ties", "dare_linear", "dare_ties"]
COMBINATIONS: tuple[Combination, ...] = ("linear", "ties", "dare_linear", "dare_ties")


class Update(Protocol):
    """A change of one weight."""

    @property
    def by_rows(self) -> bool:
        """Whether rows can be updated without the others."""

    @property
    def is_linear(self) -> bool:
        """Whether the change is added and does not depend on the weight."""

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The updated rows, float32 as they are given."""

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """What is wrong with updating a weight of this shape; None if nothing."""


@dataclass(frozen=True)
class LowRank:
    """`W + scale * left @ right`, or with a magnitude DoRA's `magnitude * that / its norm by output`.

    Attributes:
        left: float[rows, r], or float[experts, rows, r].
        right: float[r, columns], or float[experts, r, columns].
        scale: PEFT's scaling.
        magnitude: float[outputs] of DoRA (arXiv 2402.09353).
        outputs_last: The weight is [in, out], so outputs are its columns.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    outputs_last: bool = False

    @property
    def by_rows(self) -> bool:
        """DoRA's norm of a column needs all rows."""
        return self.magnitude is None or not self.outputs_last

    @property
    def is_linear(self) -> bool:
        """DoRA rescales the weight itself."""
        return self.magnitude is None

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The updated rows."""
        changed = rows + self.scale * (self.left[start:stop].float() @ self._right(start, stop).float())
        if self.magnitude is None:
            return changed
        if self.outputs_last:
            return changed * (self.magnitude.float() / torch.linalg.norm(changed, dim=0))
        norm = torch.linalg.norm(changed, dim=1, keepdim=True)
        return changed * (self.magnitude[start:stop, None].float() / norm)

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a weight of this shape."""
        own = (*self.left.shape[:-1], self.right.shape[-1])
        return None if tuple(shape) == own else f"the adapter's update has the shape {list(own)}"

    def _right(self, start: int, stop: int) -> torch.Tensor:
        return self.right[start:stop] if self.right.ndim == 3 else self.right


@dataclass(frozen=True)
class AddVector:
    """A bias of the adapter, added to the module's own."""

    vector: torch.Tensor
    scale: float
    by_rows: bool = field(default=True, init=False)
    is_linear: bool = field(default=True, init=False)

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The updated entries."""
        return rows + self.scale * self.vector[start:stop].float()

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a bias of this shape."""
        own = tuple(self.vector.shape)
        return None if tuple(shape) == own else f"the adapter's has the shape {list(own)}"


@dataclass(frozen=True)
class Replacement:
    """A weight that was trained as a whole (`modules_to_save`, `bias`)."""

    tensor: torch.Tensor
    by_rows: bool = field(default=True, init=False)
    is_linear: bool = field(default=False, init=False)

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The trained rows."""
        return (self.tensor[start:stop] if self.tensor.ndim else self.tensor).float()

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a weight of this shape."""
        own = tuple(self.tensor.shape)
        return None if tuple(shape) == own else f"the adapter's has the shape {list(own)}"


@dataclass(frozen=True)
class RowReplacement:
    """Rows of an embedding that were trained (`trainable_token_indices`)."""

    indices: torch.Tensor
    values: torch.Tensor
    by_rows: bool = field(default=True, init=False)
    is_linear: bool = field(default=False, init=False)

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The rows, trained ones replaced."""
        changed = rows.clone()
        inside = (self.indices >= start) & (self.indices < stop)
        changed[self.indices[inside] - start] = self.values[inside].float()
        return changed

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """What is wrong with an embedding of this shape."""
        if len(shape) != 2 or shape[1] != self.values.shape[1]:
            return f"the adapter's rows have {self.values.shape[1]} columns"
        highest = int(self.indices.max()) if len(self.indices) else -1
        return None if highest < shape[0] else f"the adapter trains token {highest}"


@dataclass(frozen=True)
class Layered:
    """A change of a weight that the adapter holds as it was before, since the base has it with other rows."""

    base: torch.Tensor
    update: Update
    is_linear: bool = field(default=False, init=False)

    @property
    def by_rows(self) -> bool:
        """As the change on top."""
        return self.update.by_rows

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The updated rows, of those that the adapter holds."""
        return self.update.apply(self.base[start:stop].float(), start, stop)

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a weight of this shape."""
        return Replacement(self.base).shape_problem(shape) or self.update.shape_problem(shape)


@dataclass(frozen=True)
class Combined:
    """Updates of several adapters on one weight.

    `linear` adds `weight * (updated - W)` of each. The others give the same differences, as whole matrices, to PEFT's
    functions of that name: TIES (arXiv 2306.01708) trims by magnitude and elects a sign; DARE (arXiv 2311.03099) drops
    at random and rescales.

    Attributes:
        updates: One per adapter that adapts this weight.
        weights: As many.
        combination: How they are combined.
        density: Share of each difference that is kept; unused by `linear`.
        seed: Decides, with the weight's name, what DARE drops.
    """

    updates: Sequence[Update]
    weights: Sequence[float]
    combination: Combination
    density: float
    seed: int

    @property
    def by_rows(self) -> bool:
        """TIES and DARE look at whole matrices."""
        return self.combination == "linear" and all(update.by_rows for update in self.updates)

    @property
    def is_linear(self) -> bool:
        """Whether the change does not depend on the weight."""
        return all(update.is_linear for update in self.updates)

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The updated rows."""
        if self.combination == "linear":
            changed = rows.clone()
            for update, weight in zip(self.updates, self.weights, strict=True):
                changed += weight * (update.apply(rows, start, stop) - rows)
            return changed
        differences = [update.apply(rows, start, stop) - rows for update in self.updates]
        weights = torch.tensor(self.weights, dtype=torch.float32)
        if self.combination == "ties":
            return rows + ties(differences, weights, self.density)
        combine = dare_linear if self.combination == "dare_linear" else dare_ties
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return rows + combine(differences, weights, self.density)

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a weight of this shape."""
        problems = (update.shape_problem(shape) for update in self.updates)
        return next((problem for problem in problems if problem), None)


def seed_of(name: str, seed: int) -> int:
    """A seed of this weight's own, the same on every machine."""
    return (zlib.crc32(name.encode("utf-8")) << 20) ^ seed


def same_update(first: Update, second: Update) -> bool:
    """Whether two updates do exactly the same to equal weights."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return (
            first.scale == second.scale
            and first.magnitude is None
            and second.magnitude is None
            and torch.equal(first.left, second.left)
            and torch.equal(first.right, second.right)
        )
    if isinstance(first, Replacement) and isinstance(second, Replacement):
        return torch.equal(first.tensor, second.tensor)
    if isinstance(first, RowReplacement) and isinstance(second, RowReplacement):
        return torch.equal(first.indices, second.indices) and torch.equal(first.values, second.values)
    if isinstance(first, Layered) and isinstance(second, Layered):
        return torch.equal(first.base, second.base) and same_update(first.update, second.update)
    if isinstance(first, Combined) and isinstance(second, Combined):
        return (
            len(first.updates) == len(second.updates)
            and first.combination == second.combination == "linear"
            and list(first.weights) == list(second.weights)
            and all(map(same_update, first.updates, second.updates))
        )
    return False

# SPDX-License-Identifier: Apache-2.0
"""What an adapter does to one weight, computed in float32.

Shapes: a weight is [rows, ...] in the layout in which the model keeps it; `start` and `stop` are rows of it, or
experts where experts are stacked. An update by rows never holds more than the rows it is asked for.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

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
    "combine",
    "same_update",
]

Combination = Literal["linear", "ties", "dare_linear", "dare_ties"]
COMBINATIONS: tuple[Combination, ...] = get_args(Combination)
_FUNCTIONS = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties}


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
        right = self.right[start:stop] if self.right.ndim == 3 else self.right
        changed = rows + self.scale * (self.left[start:stop].float() @ right.float())
        if self.magnitude is None:
            return changed
        if self.outputs_last:
            return changed * (self.magnitude.float() / torch.linalg.norm(changed, dim=0))
        norm = torch.linalg.norm(changed, dim=1, keepdim=True)
        return changed * (self.magnitude[start:stop, None].float() / norm)


@dataclass(frozen=True)
class AddVector:
    """A bias of the adapter, added to the module's own."""

    vector: torch.Tensor
    scale: float
    by_rows: ClassVar[bool] = True
    is_linear: ClassVar[bool] = True

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The updated entries."""
        return rows + self.scale * self.vector[start:stop].float()


@dataclass(frozen=True)
class Replacement:
    """A weight that was trained as a whole (`modules_to_save`, `bias`)."""

    tensor: torch.Tensor
    by_rows: ClassVar[bool] = True
    is_linear: ClassVar[bool] = False

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The trained rows."""
        return (self.tensor[start:stop] if self.tensor.ndim else self.tensor).float()


@dataclass(frozen=True)
class RowReplacement:
    """Rows of an embedding that were trained (`trainable_token_indices`)."""

    indices: torch.Tensor
    values: torch.Tensor
    by_rows: ClassVar[bool] = True
    is_linear: ClassVar[bool] = False

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The rows, trained ones replaced."""
        changed = rows.clone()
        inside = (self.indices >= start) & (self.indices < stop)
        changed[self.indices[inside] - start] = self.values[inside].float()
        return changed


@dataclass(frozen=True)
class Layered:
    """A change of a weight that the adapter holds as it was before, since the base has it with other rows."""

    base: torch.Tensor
    update: Update
    is_linear: ClassVar[bool] = False

    @property
    def by_rows(self) -> bool:
        """As the change on top."""
        return self.update.by_rows

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The updated rows, of those that the adapter holds."""
        return self.update.apply(self.base[start:stop].float(), start, stop)


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
        seed: Decides what DARE drops.
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
        differences = (update.apply(rows, start, stop) - rows for update in self.updates)
        if self.combination == "linear":
            changed = rows.clone()
            for difference, weight in zip(differences, self.weights, strict=True):
                changed += weight * difference
            return changed
        weights = torch.tensor(self.weights, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return rows + _FUNCTIONS[self.combination](list(differences), weights, self.density)


def combine(
    each: Sequence[dict[str, Update]], weights: Sequence[float], how: Combination, density: float, seed: int
) -> dict[str, Update]:
    """What several adapters change together.

    Args:
        each: Updates of each adapter, by the name of the parameter.
        weights: A factor for each.
        how: See `Combined`, as for what follows.
        density: Share of each difference that is kept.
        seed: Decides, with the weight's name, what DARE drops.
    """
    if len(each) == 1 and weights[0] == 1.0 and how == "linear":
        return each[0]
    combined: dict[str, Update] = {}
    for name in dict.fromkeys(name for own in each for name in own):
        held = [(own[name], weight) for own, weight in zip(each, weights, strict=True) if name in own]
        # The same on every machine, and another one for each weight.
        own_seed = (zlib.crc32(name.encode("utf-8")) << 20) ^ seed if how.startswith("dare") else 0
        combined[name] = Combined(
            [update for update, _ in held], [weight for _, weight in held], how, density, own_seed
        )
    return combined


def same_update(first: Any, second: Any) -> bool:
    """Whether two updates, or values of their fields, are equal, and so do the same to equal weights."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same_update, first, second))
    if is_dataclass(first):
        return all(same_update(getattr(first, own.name), getattr(second, own.name)) for own in fields(first))
    return first == second

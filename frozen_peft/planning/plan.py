# SPDX-License-Identifier: Apache-2.0
"""Plans: what a way of training takes, whether it fits, and the longest context that does."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from frozen_peft.planning.setting import Setting

__all__ = ["Plan"]

MAX_CONTEXT = 1 << 24


@dataclass
class Plan:
    """What one way of training takes. How the terms are found is in `terms`.

    Attributes:
        model: Its name.
        setting: The way of training.
        memory_limit: Bytes that the device has; None: not asked.
        plan_of: Plans another setting for the same model and device.
        terms: Bytes on the device by what they are for, of `TERMS`.
        unknown: Terms that cannot be known for this model, each with the reason.
        notes: What the figures leave out or assume.
        host_bytes: Host memory that is needed beside the device's.
        num_parameters: Numbers in the base model; None: unknown.
        cache_token_bytes: Bytes that every further context token adds to the cache; None: unknown.
    """

    model: str
    setting: Setting
    memory_limit: int | None
    plan_of: Callable[[Setting], "Plan"] = field(repr=False, compare=False)
    terms: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    host_bytes: int = 0
    num_parameters: int | None = None
    cache_token_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all terms that are known."""
        return sum(self.terms.values())

    @property
    def fits(self) -> bool | None:
        """Whether the device has as much; None where that is not asked, or where a term is unknown that decides."""
        if self.memory_limit is None:
            return None
        if self.total_bytes > self.memory_limit:
            return False
        return None if self.unknown else True

    def with_setting(self, **changes: Any) -> "Plan":
        """The plan for the same model and device with other choices."""
        return self.plan_of(replace(self.setting, **changes))

    def longest_context(self) -> int | None:
        """Tokens of the longest context that fits, all else as it is; 0: none; None: unknown or no limit.

        The model's own limit is not looked at.
        """
        if self.memory_limit is None or self.unknown:
            return None
        if not self._fits_context(0):
            return 0
        fitting, too_long = 0, 1024
        while self._fits_context(too_long):
            fitting, too_long = too_long, 2 * too_long
            if fitting >= MAX_CONTEXT:
                return MAX_CONTEXT
        while too_long - fitting > max(fitting // 256, 1):
            middle = (fitting + too_long) // 2
            if self._fits_context(middle):
                fitting = middle
            else:
                too_long = middle
        return fitting

    def _fits_context(self, num_tokens: int) -> bool:
        return bool(self.with_setting(context_length=num_tokens).fits)

    def as_dict(self, advice: Sequence[str] = ()) -> dict[str, Any]:
        """What `plan.json` holds."""
        return {
            "model": self.model,
            "setting": asdict(self.setting),
            "terms": self.terms,
            "total_bytes": self.total_bytes,
            "memory_limit_bytes": self.memory_limit,
            "fits": self.fits,
            "host_bytes": self.host_bytes,
            "num_parameters": self.num_parameters,
            "cache_token_bytes": self.cache_token_bytes,
            "unknown": self.unknown,
            "notes": self.notes,
            "advice": list(advice),
        }

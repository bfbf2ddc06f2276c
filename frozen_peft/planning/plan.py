# SPDX-License-Identifier: Apache-2.0
"""Plans: what a way of training takes, whether it fits, and the longest context that does.

How the terms are found is in `terms`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from frozen_peft.planning.setting import Setting
from frozen_peft.planning.terms import ModelTerms, terms_of

__all__ = ["Plan", "make_plan", "plan_of_weights"]

MAX_CONTEXT = 1 << 24


@dataclass(frozen=True)
class Plan:
    """What one way of training takes.

    Attributes:
        model: Its name.
        setting: The way of training.
        terms: Bytes on the device by what they are for, of `TERMS`.
        memory_limit: Bytes that the device has; None: not asked.
        unknown: Terms that cannot be known for this model, each with the reason.
        notes: What the figures leave out or assume.
        host_bytes: Host memory that is needed beside the device's.
        num_parameters: Numbers in the base model; None: unknown.
        cache_token_bytes: Bytes that every further context token adds to the cache; None: unknown.
        max_positions: Longest sequence that the model was made for, as its configuration says; None: it does not.
    """

    model: str
    setting: Setting
    terms: dict[str, int]
    memory_limit: int | None = None
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    host_bytes: int = 0
    num_parameters: int | None = None
    cache_token_bytes: int | None = None
    max_positions: int | None = None
    _again: Callable[[Setting], "Plan"] | None = field(default=None, repr=False, compare=False)

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
        assert self._again is not None
        return self._again(replace(self.setting, **changes))

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
            "setting": self.setting.as_dict(),
            "terms": self.terms,
            "total_bytes": self.total_bytes,
            "memory_limit_bytes": self.memory_limit,
            "fits": self.fits,
            "host_bytes": self.host_bytes,
            "num_parameters": self.num_parameters,
            "cache_token_bytes": self.cache_token_bytes,
            "unknown": list(self.unknown),
            "notes": list(self.notes),
            "advice": list(advice),
        }


def make_plan(config: PretrainedConfig | str, setting: Setting, memory_limit: int | None = None) -> Plan:
    """Plans one way of training from a model's configuration alone; no weights are read.

    Args:
        config: The model's configuration, or a hub id or folder to load it from.
        setting: The way of training.
        memory_limit: Bytes that the device has; None: only what training takes.

    Raises:
        ValueError: The preset or roles do not exist.
    """
    if isinstance(config, str):
        config = AutoConfig.from_pretrained(config)
    return _plan(terms_of(config), setting, memory_limit, quick=False)


def plan_of_weights(config: PretrainedConfig, setting: Setting, memory_limit: int | None = None) -> Plan:
    """The terms of a plan that are quick to know: weights, what is trained, and a frozen context.

    Activations and workspace are among `unknown`, so that it tells only whether a run cannot fit.
    """
    return _plan(terms_of(config), setting, memory_limit, quick=True)


def _plan(model: ModelTerms, setting: Setting, memory_limit: int | None, *, quick: bool) -> Plan:
    figures = model.figures(setting, quick=quick)
    return Plan(
        model.config.name_or_path or model.config.model_type or "a model",
        setting,
        figures.terms,
        memory_limit,
        tuple(figures.unknown),
        tuple(figures.notes),
        figures.host_bytes,
        figures.num_parameters,
        figures.cache_token_bytes,
        model.max_positions,
        lambda other: _plan(model, other, memory_limit, quick=quick),
    )

# SPDX-License-Identifier: Apache-2.0
"""Plans: what a way of training takes, whether it fits, the longest context that does, and the cheapest setting."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from frozen_peft.planning.setting import Setting
from frozen_peft.utils.sizes import format_size

__all__ = ["Plan", "advise", "cheapest_fitting"]

MAX_CONTEXT = 1 << 24
CHUNKS, STRETCHES, DECISIONS = (2048, 1024, 512), (8192, 4096, 2048, 1024), (8, 4, 2, 1)
SPARE_SHARE = 0.8


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


def cheapest_fitting(plan: Plan) -> Plan | None:
    """The first of ever costlier settings of the same tier that fits; the plan itself where it does; None: none does.

    Cheaper is what costs less time: fewer decisions of several turns in a forward, smaller prefill chunks, checkpoints
    of layers, stretches (one forward more; the longer, the fewer states), stretches on the host (copies), and each of
    these over a 4-bit base, which unpacks its weights in every product.
    """
    if plan.fits:
        return plan
    if plan.memory_limit is None or plan.unknown:
        return None
    for changes in _changes(plan):
        other = plan.with_setting(**changes)
        if other.fits:
            return other
    return None


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    setting = plan.setting
    in_4bit: list[dict[str, Any]] = [{}]
    if not setting.load_in_4bit and setting.use_peft and setting.accelerator:
        in_4bit.append({"load_in_4bit": True})
    for base in in_4bit:
        if base:
            yield base
        checkpointed = base | {"gradient_checkpointing": True}
        if setting.num_frozen:
            fewer = [{"max_decisions_per_forward": n} for n in DECISIONS if n < setting.decisions_per_forward]
            if setting.num_boundaries > 1 or setting.answers > 1:
                yield from (base | decisions for decisions in fewer)
                base, checkpointed = ({**each, **(fewer[-1] if fewer else {})} for each in (base, checkpointed))
            size = setting.prefill_chunk_size or setting.num_frozen
            smaller = [{"prefill_chunk_size": chunk} for chunk in CHUNKS if chunk < size]
            yield from (base | chunk for chunk in smaller)
            if not setting.gradient_checkpointing:
                yield from (checkpointed | chunk for chunk in ({}, *smaller))
        else:
            if not setting.gradient_checkpointing:
                yield checkpointed
            if setting.tier is not None:
                for offload in (False, True):
                    for stretch in STRETCHES:
                        if stretch < setting.num_graded:
                            yield checkpointed | {"sequence_chunk_size": stretch, "offload_stretches": offload}


def advise(plan: Plan) -> list[str]:
    """What to do about a plan, in sentences; empty where no limit is given."""
    if plan.memory_limit is None:
        return []
    limit = format_size(plan.memory_limit)
    if plan.fits:
        spare = plan.memory_limit - plan.total_bytes
        advice = [f"It fits: {format_size(plan.total_bytes)} of {limit}."]
        if plan.setting.num_frozen and spare > plan.terms.get("cache", 0):
            budget = int(SPARE_SHARE * spare) // (1 << 30)
            if budget:
                advice.append(
                    f"`context_cache_size: {budget}GiB` would keep contexts that come again in what is left."
                )
        return advice
    if plan.unknown and plan.fits is None:
        return [f"What is known takes {format_size(plan.total_bytes)} of {limit}; whether the rest fits is unknown."]
    advice = [f"It does not fit: {format_size(plan.total_bytes)}, and there are {limit}."]
    other = cheapest_fitting(plan)
    if other is not None:
        changes = {name: value for name, value in vars(other.setting).items() if value != getattr(plan.setting, name)}
        fields = ", ".join(f"`{name}: {_as_yaml(value)}`" for name, value in changes.items())
        text = f"Cheapest that fits: {fields}, {format_size(other.total_bytes)}"
        if other.host_bytes:
            text += f" and {format_size(other.host_bytes)} of host memory"
        return [*advice, f"{text}."]
    longest = plan.longest_context()
    if longest:
        advice.append(f"As it is, contexts of up to {longest} tokens fit (`max_context_length`).")
    else:
        advice.append("As it is, no context fits: a smaller model, or more memory, is needed.")
    return advice


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

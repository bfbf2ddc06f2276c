# SPDX-License-Identifier: Apache-2.0
"""What to change where a plan does not fit: the cheapest setting that does."""

from collections.abc import Iterator
from typing import Any

from frozen_peft.planning.plan import Plan
from frozen_peft.utils.sizes import format_size

__all__ = ["advise", "cheapest_fitting"]

CHUNKS, STRETCHES, DECISIONS = (2048, 1024, 512), (8192, 4096, 2048, 1024), (8, 4, 2, 1)
SPARE_SHARE = 0.8


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
            if setting.num_boundaries > 1:
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

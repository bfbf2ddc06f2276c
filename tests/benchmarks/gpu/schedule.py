# SPDX-License-Identifier: Apache-2.0
"""What is measured, in the order of what matters most, so that a benchmark that runs out of time has that."""

from dataclasses import dataclass

from tests.benchmarks.gpu.methods import COMPILED, METHODS, Method


@dataclass(frozen=True)
class Task:
    """One measurement to make.

    Attributes:
        method: What to train with.
        context: Context tokens.
        cap_gib: GiB that the process may use; None: all there are.
    """

    method: Method
    context: int
    cap_gib: int | None = None


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        goal_context: Context tokens at which all methods are compared.
        contexts: All context lengths, ascending.
        caps: Cards that the process is held to, in GiB, and the context that is to fit.
        decision: Decision tokens.
        profile_context: Context tokens of the profile.
        chunk_sizes: `prefill_chunk_size` values to compare.
        one_step_from: Context tokens from which on there is time for one step only.
    """

    goal_context: int
    contexts: tuple[int, ...]
    caps: tuple[tuple[int, int], ...]
    decision: int
    profile_context: int
    chunk_sizes: tuple[int, ...]
    one_step_from: int


FULL = Plan(
    goal_context=1 << 15,
    contexts=(1 << 12, 1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18),
    caps=((24, 1 << 15), (48, 1 << 17), (80, 1 << 18)),
    decision=256,
    profile_context=1 << 13,
    chunk_sizes=(1024, 2048, 4096, 8192, 16384),
    one_step_from=100_000,
)
SMOKE = Plan(
    goal_context=128,
    contexts=(128,),
    caps=((24, 128),),
    decision=8,
    profile_context=96,
    chunk_sizes=(32, 64),
    one_step_from=0,
)


def tasks(plan: Plan, *, is_first: bool) -> list[Task]:
    """The measurements of one model.

    The caps come with the first model alone; what fits under one is also the measurement of that length.

    Args:
        plan: What to measure.
        is_first: Of the model that the goals are about.
    """
    at = plan.goal_context
    found = [Task(method, at) for method in METHODS]
    caps = plan.caps if is_first else ()
    found += [Task("tier 2", context, cap) for cap, context in caps]
    capped = {context for _, context in caps}
    # By ascending length: what does not fit at one fits at no longer one.
    for context in plan.contexts:
        found += [
            Task(method, context)
            for method in METHODS
            if context != at and not (method == "tier 2" and context in capped)
        ]
    # What is left of the time may go into a compiler.
    return found + [Task(COMPILED, at)] * is_first

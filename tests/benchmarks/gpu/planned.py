# SPDX-License-Identifier: Apache-2.0
"""What the planner says of the steps that are measured, so that the two can be compared."""

from transformers import PretrainedConfig

from frozen_peft.planning import Setting, make_plan


def planned_bytes(
    config: PretrainedConfig, context: int, decision: int, chunk_size: int, quantized: bool, has_fla: bool
) -> int | None:
    """Bytes that tensors are planned to take in a step of tier 2; None where the planner does not know.

    Without what the plan allows for the driver and for fragments, which a peak of what tensors take does not have.
    """
    setting = Setting(
        tier=2,
        context_length=context,
        decision_length=decision,
        prefill_chunk_size=chunk_size,
        load_in_4bit=quantized,
        reference_kernels=not has_fla,
    )
    plan = make_plan(config, setting)
    return None if plan.unknown else plan.total_bytes - plan.terms.get("reserve", 0)

# SPDX-License-Identifier: Apache-2.0
"""The frozen side: where the context ends, how it is encoded once, and how a decision reads it."""

from frozen_peft.context.boundary import SplitBatch, find_boundary, split_batch
from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.capability import use_segmented_attention
from frozen_peft.context.decision import decision_forward
from frozen_peft.context.prefill import encode_context
from frozen_peft.context.verify import ContextCheck, verify_context

__all__ = [
    "ContextCheck",
    "FrozenContext",
    "SplitBatch",
    "decision_forward",
    "encode_context",
    "find_boundary",
    "split_batch",
    "use_segmented_attention",
    "verify_context",
]

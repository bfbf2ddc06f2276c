# SPDX-License-Identifier: Apache-2.0
"""The frozen side: where the context ends, how it is encoded once, and how a decision reads it."""

from .boundary import SplitBatch, find_boundary, split_batch
from .cache import FrozenContext
from .capability import use_segmented_attention
from .decision import decision_forward
from .prefill import encode_context
from .verify import ContextCheck, verify_context

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

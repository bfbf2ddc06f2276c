# SPDX-License-Identifier: Apache-2.0
"""The frozen side: where the context ends, how it is encoded once, and how a decision reads it."""

from frozen_peft.context.boundary import (
    TAIL,
    ContextTokens,
    Cut,
    Decision,
    SplitBatch,
    cut_batch,
    pad_decisions,
)
from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.capability import use_segmented_attention
from frozen_peft.context.carried import carried_context
from frozen_peft.context.decision import decision_forward
from frozen_peft.context.encoder import ContextEncoder, EncoderCounts, encode_context
from frozen_peft.context.generate import generate_over, tokens_within_rope
from frozen_peft.context.store.context_files import ContextFiles
from frozen_peft.context.store.disk_level import DiskLevel
from frozen_peft.context.store.fingerprint import require_untouched_base, trained_base_weights
from frozen_peft.context.store.store import ContextStore
from frozen_peft.context.verify import ContextCheck, verify_context, verify_rounding

__all__ = [
    "TAIL",
    "ContextCheck",
    "ContextEncoder",
    "ContextFiles",
    "ContextStore",
    "ContextTokens",
    "Cut",
    "Decision",
    "DiskLevel",
    "EncoderCounts",
    "FrozenContext",
    "SplitBatch",
    "carried_context",
    "cut_batch",
    "decision_forward",
    "encode_context",
    "generate_over",
    "pad_decisions",
    "require_untouched_base",
    "tokens_within_rope",
    "trained_base_weights",
    "use_segmented_attention",
    "verify_context",
    "verify_rounding",
]

# SPDX-License-Identifier: Apache-2.0
"""The frozen side: where the context ends, how it is encoded once, and how a decision reads it."""

from frozen_peft.context.boundary import (
    IGNORED_LABEL,
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
from frozen_peft.context.carried import Carried, EncodeAgain, adapter_state, carried_context
from frozen_peft.context.decision import decision_forward
from frozen_peft.context.encoder import ContextEncoder, EncoderCounts, encode_context
from frozen_peft.context.generate import generate_over, stop_tokens_of, tokens_within_rope
from frozen_peft.context.kernels import choose_kernels
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.context.modes import prefill_mode, without_dropout
from frozen_peft.context.rope import rope_limits, rows_of_lengths
from frozen_peft.context.sharding import are_sharded
from frozen_peft.context.store import (
    ContextFiles,
    ContextStore,
    DiskLevel,
    require_untouched_base,
    trained_base_weights,
)
from frozen_peft.context.verify import ContextCheck, verify_context, verify_rounding

__all__ = [
    "IGNORED_LABEL",
    "TAIL",
    "Carried",
    "ContextCheck",
    "ContextEncoder",
    "ContextFiles",
    "ContextStore",
    "ContextTokens",
    "Cut",
    "Decision",
    "DiskLevel",
    "EncodeAgain",
    "EncoderCounts",
    "FrozenContext",
    "SplitBatch",
    "adapter_state",
    "are_sharded",
    "carried_context",
    "choose_kernels",
    "cut_batch",
    "decision_forward",
    "encode_context",
    "generate_over",
    "get_decoder",
    "get_pretrained_model",
    "pad_decisions",
    "prefill_mode",
    "require_untouched_base",
    "rope_limits",
    "rows_of_lengths",
    "stop_tokens_of",
    "tokens_within_rope",
    "trained_base_weights",
    "use_segmented_attention",
    "verify_context",
    "verify_rounding",
    "without_dropout",
]

# SPDX-License-Identifier: Apache-2.0
"""The live side: how activations are kept for the backward pass, and what the gradient knows."""

from frozen_peft.gradient.checkpoint import group_checkpoints
from frozen_peft.gradient.flow import GradientFlow, gradient_flow
from frozen_peft.gradient.stretch_check import MIN_TOKENS_TO_VERIFY, StretchCheck, verify_stretches
from frozen_peft.gradient.stretched_decoder import StretchedDecoder
from frozen_peft.gradient.stretches import Stretching, finish_stretches, stretched_forward

__all__ = [
    "MIN_TOKENS_TO_VERIFY",
    "GradientFlow",
    "StretchCheck",
    "StretchedDecoder",
    "Stretching",
    "finish_stretches",
    "gradient_flow",
    "group_checkpoints",
    "stretched_forward",
    "verify_stretches",
]

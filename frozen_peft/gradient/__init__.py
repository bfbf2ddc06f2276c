# SPDX-License-Identifier: Apache-2.0
"""The live side: how activations are kept for the backward pass."""

from frozen_peft.gradient.checkpoint import group_checkpoints
from frozen_peft.gradient.stretches import stretched_forward

__all__ = ["group_checkpoints", "stretched_forward"]

# SPDX-License-Identifier: Apache-2.0
"""Configurations: fields of contexts, which all trainers have, those of distillation, and `FrozenContextConfig`."""

from frozen_peft.config.context_fields import TIERS, ContextFields
from frozen_peft.config.distillation_fields import WRITING_FIELDS
from frozen_peft.config.frozen_config import FrozenContextConfig

__all__ = ["TIERS", "WRITING_FIELDS", "ContextFields", "FrozenContextConfig"]

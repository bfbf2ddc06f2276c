# SPDX-License-Identifier: Apache-2.0
"""Encoded contexts that are kept across steps in memory, and across runs in files."""

from frozen_peft.context.store.context_files import ContextFiles
from frozen_peft.context.store.disk_level import DiskLevel
from frozen_peft.context.store.fingerprint import (
    AdapterWatch,
    base_fingerprint,
    base_state,
    fixed_fingerprint,
    require_untouched_base,
    run_fingerprint,
    trained_base_weights,
)
from frozen_peft.context.store.rounding import round_in_place
from frozen_peft.context.store.store import ContextStore

__all__ = [
    "AdapterWatch",
    "ContextFiles",
    "ContextStore",
    "DiskLevel",
    "base_fingerprint",
    "base_state",
    "fixed_fingerprint",
    "require_untouched_base",
    "round_in_place",
    "run_fingerprint",
    "trained_base_weights",
]

# SPDX-License-Identifier: Apache-2.0
"""From an adapter to what can be served: merged checkpoints, and adapters under the names that a server expects."""

from frozen_peft.merging.base_record import save_base_record
from frozen_peft.merging.comparison import MergeMismatchError, load_merged
from frozen_peft.merging.merging import merge_adapter
from frozen_peft.merging.output import REPORT, export_adapter
from frozen_peft.merging.repeating import require_repeatable, require_repeated_change
from frozen_peft.merging.source import find_folder

__all__ = [
    "REPORT",
    "MergeMismatchError",
    "export_adapter",
    "find_folder",
    "load_merged",
    "merge_adapter",
    "require_repeatable",
    "require_repeated_change",
    "save_base_record",
]

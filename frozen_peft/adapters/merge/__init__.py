# SPDX-License-Identifier: Apache-2.0
"""From an adapter to what can be served: merged checkpoints, and adapters under the names that a server expects."""

from frozen_peft.adapters.merge.checkpoint import find_folder
from frozen_peft.adapters.merge.exporting import export_adapter
from frozen_peft.adapters.merge.merging import REPORT, merge_adapter
from frozen_peft.adapters.merge.record import save_base_record
from frozen_peft.adapters.merge.repeating import require_repeatable, require_repeated_change
from frozen_peft.adapters.merge.verify import MergeMismatchError, load_merged

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

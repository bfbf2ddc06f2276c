# SPDX-License-Identifier: Apache-2.0
"""From an adapter to what can be served: merged checkpoints, and adapters under the names that a server expects."""

from frozen_peft.adapters.merge.merging import merge_adapter

__all__ = ["merge_adapter"]

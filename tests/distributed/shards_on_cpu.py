# SPDX-License-Identifier: Apache-2.0
"""Lets accelerate put weights in shards on a machine without accelerator, for tests.

PyTorch's `fully_shard` runs on CPUs with gloo. accelerate 1.15 asks for it on accelerators alone: on a CPU,
`AcceleratorState` leaves a plugin for FSDP aside and trains with DDP, without a word.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


@contextmanager
def shards_on_cpu() -> Iterator[None]:
    """Inside, a `fsdp` in the training arguments is followed on a CPU too."""
    original = AcceleratorState.__init__

    def with_shards(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_shards
    try:
        yield
    finally:
        AcceleratorState.__init__ = original
        # accelerate sets it, and would shard the next model of this process too.
        os.environ.pop("ACCELERATE_USE_FSDP", None)

# SPDX-License-Identifier: Apache-2.0
"""What the levels of the store hold."""

from dataclasses import dataclass

import torch

from frozen_peft.context.keys import PrefixKey
from frozen_peft.context.store.residence import DeviceCopy

__all__ = ["Entry", "EntryKey"]

# A namespace, which stands for everything but the tokens, and the tokens.
EntryKey = tuple[str, PrefixKey]


@dataclass
class Entry:
    """What a context adds to its prefix.

    Attributes:
        prefix: The context it extends; None: none.
        windows: Sliding window of each layer in tokens, None for any other layer.
        tensors: `EncodedContext.own_tensors`, or what `rounding.pack` made of them.
        on_host: The tensors were moved from the model's device to host memory.
        copying: They are on their way there, since they were read ahead; never of an entry that is kept.
        owed_bytes: What the tensors will take, where another process kept them and this one has yet to encode them;
            0: they are here.
        last_use: Number of uses of a level's entries up to the last one of this.
    """

    prefix: PrefixKey | None
    windows: tuple[int | None, ...]
    tensors: dict[str, torch.Tensor]
    on_host: bool = False
    copying: DeviceCopy | None = None
    owed_bytes: int = 0
    last_use: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, with whatever else their storage holds."""
        return self.owed_bytes or sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

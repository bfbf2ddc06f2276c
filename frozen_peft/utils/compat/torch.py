# SPDX-License-Identifier: Apache-2.0
"""What of PyTorch is used beyond what it promises."""

import torch

__all__ = ["num_writes"]


# PRIVATE: `Tensor._version`, torch 2.8 to 2.13.
# Why: autograd's own count of writes in place tells a weight that has changed from one that has not, and reads
# nothing. Goes when: the count has a public name.
def num_writes(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place, as far as PyTorch counts."""
    return tensor._version

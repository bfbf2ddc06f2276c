# SPDX-License-Identifier: Apache-2.0
"""What is not public of `datasets`."""

from typing import Any

from datasets import IterableDataset

__all__ = ["computed_by"]


# PRIVATE: `IterableDataset._ex_iterable`, datasets 5.
# Why: a stream has a counter in shared memory, by which its hash is another one in every process and every run.
# Goes when: equal streams have equal hashes.
def computed_by(stream: IterableDataset) -> Any:
    """What a stream's rows depend on, the functions that are mapped over it included: to hash, not to use."""
    return stream._ex_iterable

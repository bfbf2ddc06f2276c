# SPDX-License-Identifier: Apache-2.0
"""Names for the beginnings of a token sequence, by which an encoded context is found again."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

__all__ = ["PrefixKey", "prefix_keys"]

# 128 bits: among a billion prefixes, a collision has a probability below 1e-20.
DIGEST_BYTES = 16
TEXT = re.compile(r"([1-9][0-9]*)-([0-9a-f]{32})")


@dataclass(frozen=True)
class PrefixKey:
    """What tells a sequence's first tokens from any others. Its text is `<num_tokens>-<digest>`.

    Attributes:
        num_tokens: The prefix's length, at least 1.
        digest: 32 lowercase hexadecimal digits, BLAKE2b of the rope length, if any, and the tokens, as little-endian
            int64.
    """

    num_tokens: int
    digest: str

    def __str__(self) -> str:
        return f"{self.num_tokens}-{self.digest}"

    @classmethod
    def from_text(cls, text: str) -> Self | None:
        """The key whose text this is, None where it is not a key's."""
        match = TEXT.fullmatch(text)
        return cls(int(match[1]), match[2]) if match else None


def prefix_keys(
    tokens: torch.Tensor | np.ndarray, lengths: Iterable[int], *, rope_length: int = 0
) -> dict[int, PrefixKey]:
    """Keys of several prefixes of one sequence, in one pass over its tokens.

    Args:
        tokens: Integers, shape `(num_tokens,)`, on any device.
        lengths: Prefix lengths from 1 to `num_tokens`, in any order.
        rope_length: How positions are computed (see `rope`), where not as in a short forward: another context.

    Returns:
        The key of each length, shortest first.

    Raises:
        ValueError: The tokens are not one row of integers, or a length is out of range.
    """
    array = tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else tokens
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"`tokens` must be one row of integers, found {array.dtype} of shape {array.shape}.")
    data = np.ascontiguousarray(array, dtype="<i8")
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    if rope_length:
        hasher.update(rope_length.to_bytes(8, "little"))
    keys = {}
    hashed = 0
    for length in sorted(set(lengths)):
        if not 1 <= length <= len(data):
            raise ValueError(f"`lengths` must be from 1 to {len(data)}, the number of tokens, found {length}.")
        hasher.update(data[hashed:length].data)
        keys[length] = PrefixKey(length, hasher.hexdigest())
        hashed = length
    return keys

# SPDX-License-Identifier: Apache-2.0
"""How much of their attention the tokens of a decision give to the context, read off a forward as it runs.

A decision token i of head h attends to token j with weight `α_hij = exp(s_hij) / Σ_l exp(s_hil)`, l over all tokens
that it can see, and over the attention sink where the architecture has one. Its context mass is `Σ_j α_hij` over the
context's tokens. With log-sum-exps that is `exp(logsumexp over the context - logsumexp over all)`, and a log-sum-exp
can be taken over one block of keys after the other: weights `[heads, tokens, tokens]` are never built.

Every attention of transformers 5 is called through `AttentionInterface`, whatever its implementation, and gets its
queries and keys as they meet each other, rotated and normalised. That is where they are read.

Shapes: H query heads, K key/value heads, D decision tokens, N keys, E head dimension. One sample at a time, without
padding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from frozen_peft.context.handover import Segment, get_segment
from frozen_peft.context.segments import IMPLEMENTATION

__all__ = ["context_mass", "observed_attention"]

# Scores that exist at a time: 16 MiB in float32.
NUM_SCORES = 1 << 22
MIN_KEYS = 256
# Latents that are expanded into keys at a time.
TOKENS_EXPANDED = 1024

# Options that modeling files pass on and these implementations make nothing of.
_UNREAD = dict.fromkeys(("sdpa", IMPLEMENTATION), ("softcap", "s_aux"))

Attention = Callable[..., Any]


@contextmanager
def observed_attention(note: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Reads the attention of every forward inside, which goes on as ever.

    Args:
        note: Called for each attention layer that runs, with its index and the context mass `(H, D)` of each head and
            token. Keys that come before the queries' own count as context.

    Raises:
        ValueError: From within the forward: a batch of several samples, or a mask that is no tensor.
    """
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, implementation: str, default: Attention) -> Attention:
        attend = original(self, implementation, default)

        def observed(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
            read = {name: value for name, value in options.items() if name not in _UNREAD.get(implementation, ())}
            note(module.layer_idx, context_mass(query, key, attention_mask, **read))
            return attend(module, query, key, value, attention_mask, **options)

        return observed

    # transformers has no hook for what goes into attention; a registered implementation would replace the model's.
    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original


@torch.no_grad()
def context_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """The share of each token's attention that goes to the context.

    Args:
        query: Shape `(1, H, D, E)`.
        key: Shape `(1, K, D, E)` with the context as a `Segment`, or `(1, K, context + D, E)`.
        attention_mask: Shape `(1, 1 or H, D, columns)`, True where a query may look or a number to add to the score;
            or of no meaning for one sample (two dimensions), or None: causal.
        scaling: Factor on the scores, by default `E ** -0.5`.
        softcap: Where scores are squashed to.
        sliding_window: Window in tokens, where the mask does not say it.
        s_aux: Score of each head's attention sink, shape `(H,)`.

    Returns:
        Shape `(H, D)`, in float32 or more.

    Raises:
        ValueError: More than one sample, or a mask that is no tensor.
    """
    if query.shape[0] != 1:
        raise ValueError(f"The context mass is measured one sample at a time, found a batch of {query.shape[0]}.")
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"The context mass cannot be read with a mask of type {type(attention_mask).__name__}. Load the model "
            "with `attn_implementation='sdpa'` or 'eager'."
        )
    mask = attention_mask[0] if attention_mask is not None and attention_mask.ndim == 4 else None
    num_tokens = query.shape[-2]
    segment = get_segment(key)
    before = key[0, :, : key.shape[-2] - num_tokens]
    num_context = segment.num_tokens(row=0) if isinstance(segment, Segment) else before.shape[-2]
    own = key[0, :, -num_tokens:]
    scores = _Scores(
        query[0],
        own.shape[0],
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap,
        mask,
        sliding_window,
        num_context,
    )
    of_context, position = [], 0
    for keys in _pieces(segment) if isinstance(segment, Segment) else [before]:
        of_context.append(scores.logsumexp(keys, position))
        position += keys.shape[-2]
    whole = scores.logsumexp(own, position)
    if s_aux is not None:
        whole = torch.logaddexp(whole, s_aux.to(whole)[:, None].expand_as(whole))
    for part in of_context:
        whole = torch.logaddexp(whole, part)
    return sum((torch.exp(part - whole) for part in of_context), torch.zeros_like(whole))


def _pieces(segment: Segment) -> Iterator[torch.Tensor]:
    """Keys of the only row, shapes `(K, tokens of the piece, E)`."""
    for piece in zip(segment.keys[0], segment.values[0], strict=True):
        if segment.expand is None:
            yield piece[0][0]
            continue
        for latents in zip(*(tensor.split(TOKENS_EXPANDED, dim=-2) for tensor in piece), strict=True):
            yield segment.expand(*latents)[0][0]


@dataclass(frozen=True)
class _Scores:
    """Scores of one sample's queries, reduced as they are made.

    Attributes:
        query: Shape `(H, D, E)`.
        num_kv_heads: K.
        scale: Factor on the scores.
        softcap: Where scores are squashed to.
        mask: Shape `(1 or H, D, columns)`, or None: causal.
        window: Sliding window in tokens, for lack of a mask.
        num_context: Keys before the queries' own.
    """

    query: torch.Tensor
    num_kv_heads: int
    scale: float
    softcap: float | None
    mask: torch.Tensor | None
    window: int | None
    num_context: int

    def logsumexp(self, keys: torch.Tensor, column: int) -> torch.Tensor:
        """Of the scores against keys `(K, N, E)` that stand at `column` and after it, shape `(H, D)`."""
        num_heads, num_tokens = self.query.shape[:2]
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        result = self.query.new_full((num_heads, num_tokens), float("-inf"), dtype=dtype)
        tokens = max(NUM_SCORES // (num_heads * MIN_KEYS), 1)
        for first in range(0, num_tokens, tokens):
            rows = slice(first, min(first + tokens, num_tokens))
            size = max(NUM_SCORES // (num_heads * (rows.stop - rows.start)), MIN_KEYS)
            for start in range(0, keys.shape[-2], size):
                block = self._block(keys[:, start : start + size].to(self.query.device, dtype), rows, column + start)
                result[:, rows] = torch.logaddexp(result[:, rows], block.logsumexp(-1))
        return result

    def _block(self, keys: torch.Tensor, rows: slice, column: int) -> torch.Tensor:
        """Scores of some queries against a block of keys, shape `(H, rows, N)`, `-inf` where they may not look."""
        queries = self.query[:, rows].to(keys.dtype)
        folded = queries.reshape(self.num_kv_heads, -1, queries.shape[-1])
        scores = (folded @ keys.transpose(-1, -2)).view(*queries.shape[:2], -1) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        stop = column + keys.shape[-2]
        if self.mask is not None:
            mask = self.mask[:, rows, column:stop]
            return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        places = self.num_context + torch.arange(rows.start, rows.stop, device=keys.device)[:, None]
        distance = places - torch.arange(column, stop, device=keys.device)
        hidden = distance < 0
        if self.window is not None:
            hidden |= distance >= self.window
        return scores.masked_fill(hidden, float("-inf"))

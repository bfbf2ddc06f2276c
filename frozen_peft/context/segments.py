# SPDX-License-Identifier: Apache-2.0
"""Attention over two segments, the frozen context and the decision, without a copy of the context.

The obvious read-only cache concatenates the context's keys and values with the decision's in every layer: a second
copy of the cache, its gradient, and an expansion for grouped heads. Here a decision attends to both segments where
they lie:

1. Scores against blocks of keys are reduced with an online softmax in float32, first over the context (every sample
   against its own, unpadded), then over the decision itself. The result is the softmax over both segments. On a GPU
   the operands of its products stay in the model's 16 bit, and their sums are float32, as in FlashAttention.
2. The backward pass needs the output and the log-sum-exp only. Against the context it computes the gradient of the
   queries and nothing else, since keys and values are constants there; against the decision also those of its own
   keys and values.
3. Grouped query heads are folded into the query length, so that keys and values are never repeated.

(Online softmax and its backward: FlashAttention, arXiv 2205.14135; merging of segments: ring attention, arXiv
2310.01889.)

Where no gradient is asked for, PyTorch's own kernels do the same faster. In prefill a chunk's queries sit at the lower
right end of the keys so far: on a GPU there is a kernel for that; on a CPU, where that mask would be built as a whole,
the keys before the chunk are one segment and the chunk's are the other.

Shapes: B samples, H query heads, K key/value heads, G = H / K, D decision tokens, C context tokens of a sample,
E head dimension, V value head dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from frozen_peft.context.handover import CONTIGUOUS, KeyValueGradient, Segment, current_use, get_segment, uncompiled
from frozen_peft.context.kernels.table import has_16_bit_products
from frozen_peft.context.models import get_decoder, latent_expansions
from frozen_peft.errors import ContextMismatchError
from frozen_peft.utils.compat.torch import flash_attention_on_cpu
from frozen_peft.utils.compat.transformers import attention_implementation

__all__ = ["IMPLEMENTATION", "continues_in_segments", "is_segmented"]

IMPLEMENTATION = "frozen_peft_segments"
# Scores held at a time, in numbers: 4 MiB in float32 on a CPU, 64 MiB elsewhere.
CPU_SCORE_BLOCK = 1 << 20
SCORE_BLOCK = 1 << 24
MIN_KEY_BLOCK = 256
# Neighbouring pieces of a context are copied together up to this many tokens.
COARSE_PIECE_TOKENS = 1024


def is_segmented(model: PreTrainedModel) -> bool:
    """Whether the model's attention reads two segments in a decision."""
    return attention_implementation(get_decoder(model).config) == IMPLEMENTATION


def continues_in_segments(model: PreTrainedModel) -> bool:
    """Whether it does so in prefill and in stretches of a sequence too.

    Not where it makes keys and values of latents: there a chunk has many blocks of queries, each of which would expand
    all that lies before it again, and a stretch needs the gradient of what expands them.
    """
    return is_segmented(model) and not latent_expansions(get_decoder(model))


@uncompiled
def segmented_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of `AttentionInterface`: SDPA, unless the keys carry a frozen segment.

    Args:
        module: The attention module.
        query: Shape `(B, H, D, E)`.
        key: Shape `(B, K, D, E)`; in prefill `(B, K, context so far, E)`.
        value: As `key`, with head dimension V.
        attention_mask: True where a query may look, shape `(B, 1, D, context columns + D)`; None: causal.
        dropout: Must be 0 where a segment is read.
        scaling: Factor on the scores, by default `E ** -0.5`.
        **kwargs: Passed on to SDPA.

    Returns:
        Shape `(B, D, H, V)`, and None for the attention weights, which are never built.

    Raises:
        ContextMismatchError: A segment would be read for something else than plain attention over keys and values.
    """
    segment = get_segment(key)
    if segment is CONTIGUOUS and attention_mask is None and query.shape[-2] < key.shape[-2]:
        bias = causal_lower_right(query.shape[-2], key.shape[-2])
        attend = torch.nn.functional.scaled_dot_product_attention
        query, key, value = (_autocast(tensor) for tensor in (query, key, value))
        output = attend(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=True)
    elif isinstance(segment, Segment):
        _require_plain_attention(module, value, attention_mask, segment, dropout, kwargs)
        if (use := current_use()) is not None:
            use.num_read += 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if _can_use_flash_on_cpu(query, key, value, attention_mask):
            output = _flash_on_cpu(query, key, value, segment, scale)
        else:
            operands = _operand_dtype(query)
            # Autocast would round the scores, and not those that the backward pass computes again.
            with torch.autocast(query.device.type, enabled=False):
                output = _TwoSegmentAttention.apply(query, key, value, segment, attention_mask, scale, operands)
    else:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return output.transpose(1, 2).contiguous(), None


def _require_plain_attention(
    module: torch.nn.Module,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    segment: Segment,
    dropout: float,
    options: dict[str, Any],
) -> None:
    """Refuses what two segments do not know; `use_segmented_attention` tries it out before a model is trained."""
    if dropout:
        problem = f"drops out with a probability of {dropout}"
    elif get_segment(value) is not segment:
        problem = "attends to other values than those of the cache"
    elif mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
        problem = "has a mask of numbers, or one for each head"
    elif options.get("position_bias") is not None or options.get("softcap") is not None:
        problem = "changes its scores by a bias or a cap"
    else:
        return
    raise ContextMismatchError(
        f"{type(module).__name__} {problem}, which attention over two segments cannot do. Load the model with "
        "`attn_implementation='eager'`."
    )


def segmented_mask(*, mask_function: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> torch.Tensor | None:
    """Mask function of `AttentionMaskInterface`: SDPA's, without plain causal masks in a segmented forward.

    There each sample's context is read without padding, and the decision's padding lies behind its tokens, so a
    causal mask says nothing that attention does not know. Any other pattern (a sliding window) is built.
    """
    use = current_use()
    segmented = use is not None and use.segmented
    if segmented and allow_is_causal_skip and mask_function is causal_mask_function:
        return None
    return sdpa_mask(
        mask_function=mask_function, allow_is_causal_skip=allow_is_causal_skip and not segmented, **kwargs
    )


AttentionInterface.register(IMPLEMENTATION, segmented_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, segmented_mask)


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """What autocast makes of an argument of attention; torch 2.13 does not do it where the mask is a `CausalBias`."""
    device_type = tensor.device.type
    if not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def _can_use_flash_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    if query.device.type != "cpu" or mask is not None or torch.is_grad_enabled():
        return False
    # Under autocast queries and keys come out of rotary embeddings in float32, and values in 16 bit.
    return query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]


def _flash_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segment: Segment, scale: float
) -> torch.Tensor:
    """Both segments by PyTorch's kernel, merged by their log-sum-exp, shape `(B, H, D, V)`. Without gradient."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    output = torch.empty_like(query)
    for row in range(len(segment.keys)):
        queries, keys, values = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        repeats = num_heads // num_kv_heads
        keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
        decision, decision_sum = flash_attention_on_cpu(queries, keys, values, scale, is_causal=True)
        folded = queries.reshape(1, num_kv_heads, -1, queries.shape[-1])
        for piece_keys, piece_values, _ in _pieces(segment, row):
            # All at once, but of latents, which are expanded some tokens at a time.
            size = piece_keys.shape[-2] if segment.expand is None else COARSE_PIECE_TOKENS
            for start in range(0, piece_keys.shape[-2], max(size, 1)):
                some = piece_keys[:, :, start : start + size], piece_values[:, :, start : start + size]
                keys, values = some if segment.expand is None else segment.expand(*some)
                piece, piece_sum = flash_attention_on_cpu(folded, keys, values, scale)
                difference = piece_sum.reshape(decision_sum.shape) - decision_sum
                share = torch.sigmoid(difference)[..., None]
                decision = torch.lerp(decision, piece.reshape(decision.shape), share.to(decision.dtype))
                decision_sum = torch.logaddexp(decision_sum, piece_sum.reshape(decision_sum.shape))
        output[row] = decision[0]
    return output


@dataclass(frozen=True)
class _Block:
    """One block of scores: some queries of one sample against one block of keys.

    Attributes:
        keys: Shape `(K, keys, E)`.
        values: Shape `(K, keys, V)`.
        hidden: True where a query may not look, shape `(queries, keys)`; None: it may look everywhere.
        gradient: Where the backward pass adds the gradient of keys and values; None: they are constants.
    """

    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor | None
    gradient: KeyValueGradient | None


def _blocks(
    row: int,
    queries: slice,
    num_groups: int,
    key: torch.Tensor,
    value: torch.Tensor,
    segment: Segment,
    mask: torch.Tensor | None,
    gradient: KeyValueGradient | None = None,
) -> Iterator[_Block]:
    """Blocks of keys that a block of queries of one sample looks at: context first, then decision.

    Pieces of the context may lie on another device; they are read block by block.
    """
    num_queries = queries.stop - queries.start
    per_key = num_groups * num_queries
    if segment.expand is not None:
        # Expanded keys and values are held beside the scores.
        per_key = max(per_key, key.shape[-1] + value.shape[-1])
    size = max(_score_block(key) // (key.shape[1] * per_key), MIN_KEY_BLOCK)
    column = segment.padded_length - segment.num_tokens(row)
    for piece_keys, piece_values, piece_gradient in _pieces(segment, row):
        for start in range(0, piece_keys.shape[-2], size):
            tokens = slice(start, start + size)
            keys, values = piece_keys[:, :, tokens].to(key.device), piece_values[:, :, tokens].to(key.device)
            if segment.expand is not None:
                keys, values = segment.expand(keys, values)
            keys, values = keys[0], values[0]
            hidden = None if mask is None else ~mask[row, 0, queries, column : column + keys.shape[-2]]
            column += keys.shape[-2]
            yield _Block(keys, values, hidden, _part(piece_gradient, 0, tokens))
    positions = torch.arange(queries.start, queries.stop, device=key.device)[:, None]
    for start in range(0, queries.stop, size):
        stop = min(start + size, queries.stop)
        hidden = torch.arange(start, stop, device=key.device)[None, :] > positions
        if mask is not None:
            columns = slice(segment.padded_length + start, segment.padded_length + stop)
            hidden = ~mask[row, 0, queries, columns]
        tokens = slice(start, stop)
        yield _Block(key[row, :, tokens], value[row, :, tokens], hidden, _part(gradient, row, tokens))


def _pieces(segment: Segment, row: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, KeyValueGradient | None]]:
    """One sample's pieces of keys and values, with their gradients.

    Small neighbours without gradient are copied together: a call for each would take longer.
    """
    pieces = list(zip(segment.keys[row], segment.values[row], strict=True))
    if segment.gradients:
        yield from ((*piece, gradient) for piece, gradient in zip(pieces, segment.gradients[row], strict=True))
        return
    while pieces:
        num_together, num_tokens = 1, pieces[0][0].shape[-2]
        for keys, _ in pieces[1:]:
            num_tokens += keys.shape[-2]
            if num_tokens > COARSE_PIECE_TOKENS:
                break
            num_together += 1
        together, pieces = pieces[:num_together], pieces[num_together:]
        if num_together == 1:
            yield *together[0], None
        else:
            keys, values = (torch.cat(tensors, dim=-2) for tensors in zip(*together, strict=True))
            yield keys, values, None


def _part(gradient: KeyValueGradient | None, row: int, tokens: slice) -> KeyValueGradient | None:
    return None if gradient is None else (gradient[0][row, :, tokens], gradient[1][row, :, tokens])


def _query_blocks(query: torch.Tensor) -> Iterator[slice]:
    """Slices of the queries, `(B, H, D, E)`, whose scores against the smallest block of keys fit into a block."""
    num_heads, num_tokens = query.shape[1:3]
    size = max(_score_block(query) // (num_heads * MIN_KEY_BLOCK), 1)
    yield from (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def _score_block(tensor: torch.Tensor) -> int:
    return CPU_SCORE_BLOCK if tensor.device.type == "cpu" else SCORE_BLOCK


def _accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _operand_dtype(query: torch.Tensor) -> torch.dtype:
    """In which matrices are multiplied: on a card with tensor cores for it the model's 16 bit, as SDPA would."""
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    is_16_bit = dtype in (torch.float16, torch.bfloat16)
    # `bmm` with sums in float32 is there for CUDA alone (torch 2.13).
    return dtype if is_16_bit and has_16_bit_products(query.device) else _accumulation_dtype(query)


def _product(left: torch.Tensor, right: torch.Tensor, operands: torch.dtype) -> torch.Tensor:
    """Product of batches of matrices, summed and returned in float32 or more whatever the operands are."""
    left, right = left.to(operands), right.to(operands)
    dtype = _accumulation_dtype(left)
    if operands == dtype:
        return left @ right
    if left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _folded(tensor: torch.Tensor, num_kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Heads of one sample `(H, queries, E)` as `(K, G * queries, E)`."""
    return tensor.to(dtype).reshape(num_kv_heads, -1, tensor.shape[-1])


def _scores(query: torch.Tensor, block: _Block, scale: float, operands: torch.dtype) -> torch.Tensor:
    """Scaled scores of folded queries, shape `(K, G * queries, keys)`, `-inf` where a query may not look."""
    scores = _product(query, block.keys.transpose(-1, -2), operands).mul_(scale)
    if block.hidden is not None:
        num_queries, num_keys = block.hidden.shape
        scores.view(scores.shape[0], -1, num_queries, num_keys).masked_fill_(block.hidden, float("-inf"))
    return scores


class _TwoSegmentAttention(torch.autograd.Function):
    """Softmax attention of decision queries over a frozen context and the decision itself."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segment: Segment,
        mask: torch.Tensor | None,
        scale: float,
        operands: torch.dtype,
    ) -> torch.Tensor:
        dtype = _accumulation_dtype(query)
        num_kv_heads, num_groups = key.shape[1], query.shape[1] // key.shape[1]
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        logsumexp = query.new_empty(query.shape[:-1], dtype=dtype)
        for row in range(query.shape[0]):
            for queries in _query_blocks(query):
                folded = _folded(query[row, :, queries], num_kv_heads, operands)
                peak = folded.new_full(folded.shape[:-1], float("-inf"), dtype=dtype)
                total = torch.zeros_like(peak)
                weighted = peak.new_zeros(*peak.shape, value.shape[-1])
                for block in _blocks(row, queries, num_groups, key, value, segment, mask):
                    scores = _scores(folded, block, scale, operands)
                    new_peak = torch.maximum(peak, scores.amax(-1))
                    # A query that has seen no key yet has no peak; any finite one will do.
                    safe_peak = new_peak.masked_fill(new_peak == float("-inf"), 0.0)
                    weights = scores.sub_(safe_peak[..., None]).exp_()
                    decayed = (peak - safe_peak).exp_()
                    total = total.mul_(decayed).add_(weights.sum(-1))
                    weighted.mul_(decayed[..., None]).add_(_product(weights, block.values, operands))
                    peak = new_peak
                shape = (query.shape[1], queries.stop - queries.start)
                # Padding may look nowhere (a window that ends before it): it gets zeros, and in the backward pass
                # weights of zero.
                blind = total == 0.0
                mean = weighted / total.masked_fill(blind, 1.0)[..., None]
                output[row, :, queries] = mean.view(*shape, -1).to(output.dtype)
                logsumexp[row, :, queries] = (peak + total.log()).masked_fill(blind, float("inf")).view(shape)
        ctx.save_for_backward(query, key, value, output, logsumexp, mask)
        ctx.segment, ctx.scale, ctx.operands = segment, scale, operands
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, logsumexp, mask = ctx.saved_tensors
        dtype, scale, operands = logsumexp.dtype, ctx.scale, ctx.operands
        num_kv_heads, num_groups = key.shape[1], query.shape[1] // key.shape[1]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=dtype) for tensor in (key, value))
        for row in range(query.shape[0]):
            for queries in _query_blocks(query):
                folded, folded_output, folded_grad = (
                    _folded(tensor[row, :, queries], num_kv_heads, dtype) for tensor in (query, output, grad_output)
                )
                normalizer = logsumexp[row, :, queries].reshape(num_kv_heads, -1, 1)
                delta = (folded_grad * folded_output).sum(-1, keepdim=True)
                folded_grad_query = torch.zeros_like(folded)
                for block in _blocks(row, queries, num_groups, key, value, ctx.segment, mask, (grad_key, grad_value)):
                    weights = _scores(folded, block, scale, operands).sub_(normalizer).exp_()
                    grad_weights = _product(folded_grad, block.values.transpose(-1, -2), operands)
                    grad_scores = grad_weights.sub_(delta).mul_(weights).mul_(scale)
                    folded_grad_query += _product(grad_scores, block.keys, operands)
                    if block.gradient is not None:
                        of_keys, of_values = block.gradient
                        of_keys += _product(grad_scores.transpose(-1, -2), folded, operands).to(of_keys.device)
                        of_values += _product(weights.transpose(-1, -2), folded_grad, operands).to(of_values.device)
                shape = (query.shape[1], queries.stop - queries.start, query.shape[-1])
                grad_query[row, :, queries] = folded_grad_query.view(shape).to(query.dtype)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None

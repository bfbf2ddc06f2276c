# SPDX-License-Identifier: Apache-2.0
"""What the store keeps of a context with `context_cache_dtype="int8"`: about half of its bytes.

1. *Keys.* A channel of a head stays in its own range from token to token, and some are much larger than others, or far
   from zero (KIVI, arXiv 2402.02750). So every channel has a range of its own over each 64 tokens of a piece.
2. *Values* have no such channels: every token of a head has a range of its own.
3. A range is an offset, its middle, and a step, a 127th of its half; a number is the nearest of 255 steps. Offset and
   step have the dtype of what they stand for, and so tell it. Both are settled before numbers are rounded, which are
   therefore off by half a step at most, wherever the offset and step themselves were rounded to.
4. *Recurrent states* in float32 are kept in bfloat16. Keys of sliding windows and inputs of convolutions, which do not
   grow with the context, stay as they are: rounded to 8 bit they harm more than they save
   (`docs/benchmarks/rounding.md`).
5. A context is rounded when it is put into the store, in its own memory, and read as it was rounded. Numbers are taken
   some thousand tokens at a time, so that nothing in float32 is as large as one layer's keys.

Shapes: H key/value heads, T tokens of a piece, E head dimension, G ranges.
"""

from typing import Literal

import torch

from frozen_peft.context.encoded import EncodedContext

__all__ = ["CacheDtype", "pack", "round_in_place", "rounding_name", "unpack"]

CacheDtype = Literal["auto", "int8"]
Tensors = dict[str, torch.Tensor]

# Part of the namespace: entries that were rounded in another way are never read.
VERSION = 1
LEVELS = 127
GROUP_TOKENS = 64
# Tokens that are in float32 at a time, a multiple of `GROUP_TOKENS`.
BLOCK_TOKENS = 4096
# Added to names of `EncodedContext.own_tensors`.
CODES, STEPS, OFFSETS, HALVED = ".codes", ".steps", ".offsets", ".float32"


def rounding_name(dtype: CacheDtype) -> str:
    """What tells entries of this kind from others; empty for those that are kept as they are."""
    return f"{dtype} {VERSION}" if dtype == "int8" else ""


def round_in_place(context: EncodedContext) -> Tensors:
    """Rounds what a context adds to the one it extends, so that it reads as it will from the store.

    Args:
        context: Its own tensors are overwritten; pieces of the context that it extends are not.

    Returns:
        What to keep, as `pack` returns it.

    Raises:
        ValueError: Keys or values are not finite.
    """
    tensors = context.own_tensors()
    packed = pack(tensors, context.windows())
    unpack(packed, into=tensors)
    return packed


def pack(tensors: Tensors, windows: tuple[int | None, ...]) -> Tensors:
    """Rounds tensors on their own device.

    Args:
        tensors: What `EncodedContext.own_tensors` gave.
        windows: What `EncodedContext.windows` gave.

    Returns:
        In place of keys and values of full attention: `.codes` of their shape, int8; `.steps` and `.offsets` of their
        dtype, shape `(1, H, G, E)` for keys and `(1, H, T, 1)` for values. In place of a float32 recurrent state:
        `.float32`, bfloat16. Anything else as it is.

    Raises:
        ValueError: Keys or values are not finite.
    """
    packed: Tensors = {}
    offsets: Tensors = {}
    for name, tensor in tensors.items():
        layer, kind, *_ = name.split(".")
        if kind in ("keys", "values") and windows[int(layer)] is None:
            packed[name + CODES], packed[name + STEPS], offsets[name] = _rounded(tensor, _tokens_per_range(kind))
            packed[name + OFFSETS] = offsets[name]
        elif kind == "recurrent" and tensor.dtype == torch.float32:
            packed[name + HALVED] = tensor.to(torch.bfloat16)
        else:
            packed[name] = tensor
    _require_finite(offsets)
    return packed


def unpack(packed: Tensors, *, into: Tensors | None = None) -> Tensors:
    """The tensors that `pack` was given, as they were rounded.

    Args:
        packed: What `pack` gave, on any device.
        into: Tensors of the same names to write to; without, new ones.
    """
    tensors: Tensors = {}
    for name, tensor in packed.items():
        if name.endswith(CODES):
            plain = name.removesuffix(CODES)
            steps, offsets = packed[plain + STEPS], packed[plain + OFFSETS]
            out = into[plain] if into is not None else torch.empty_like(tensor, dtype=steps.dtype)
            _restore(tensor, steps, offsets, _tokens_per_range(plain.split(".")[1]), out)
            tensors[plain] = out
        elif name.endswith(HALVED):
            plain = name.removesuffix(HALVED)
            tensors[plain] = into[plain].copy_(tensor) if into is not None else tensor.float()
        elif not name.endswith((STEPS, OFFSETS)):
            tensors[name] = tensor
    return tensors


def _tokens_per_range(kind: str) -> int:
    return GROUP_TOKENS if kind == "keys" else 1


def _rounded(tensor: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, steps and offsets of `(1, H, T, E)`: a range for each channel of `group` tokens, or for each token."""
    codes = torch.empty(tensor.shape, dtype=torch.int8, device=tensor.device)
    steps, offsets = [], []
    for start in range(0, tensor.shape[-2], BLOCK_TOKENS):
        block = tensor[..., start : start + BLOCK_TOKENS, :]
        numbers = _in_groups(block.float(), group) if group > 1 else block.float()
        dim = -2 if group > 1 else -1
        step, offset = _ranges(numbers, dim, tensor.dtype)
        divisor = torch.where(step > 0, step, 1).float()
        numbers = ((numbers - offset.float()) / divisor).round_().clamp_(-LEVELS, LEVELS)
        if group > 1:
            numbers, step, offset = numbers.flatten(-3, -2), step.squeeze(dim), offset.squeeze(dim)
        codes[..., start : start + BLOCK_TOKENS, :] = numbers[..., : block.shape[-2], :]
        steps.append(step)
        offsets.append(offset)
    return codes, torch.cat(steps, dim=-2), torch.cat(offsets, dim=-2)


def _in_groups(numbers: torch.Tensor, group: int) -> torch.Tensor:
    """Shape `(1, H, G, group, E)`; the last group is filled up with its last token, which leaves its ranges alone."""
    missing = -numbers.shape[-2] % group
    filling = numbers[..., -1:, :].expand(*numbers.shape[:-2], missing, -1)
    return torch.cat([numbers, filling], dim=-2).unflatten(-2, (-1, group))


def _ranges(numbers: torch.Tensor, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and offsets of numbers in float32, along one dimension, which stays with size 1."""
    low, high = numbers.aminmax(dim=dim, keepdim=True)
    offsets = (low / 2 + high / 2).to(dtype)
    half = torch.maximum(high - offsets.float(), offsets.float() - low)
    # Far below one, float16 has too few numbers to tell steps apart.
    steps = (half / LEVELS).clamp_min(torch.finfo(dtype).tiny)
    return torch.where(half > 0, steps, 0.0).to(dtype), offsets


def _restore(codes: torch.Tensor, steps: torch.Tensor, offsets: torch.Tensor, group: int, out: torch.Tensor) -> None:
    """Writes the numbers that codes stand for."""
    largest = torch.finfo(out.dtype).max
    for start in range(0, codes.shape[-2], BLOCK_TOKENS):
        tokens = slice(start, start + BLOCK_TOKENS)
        numbers = codes[..., tokens, :].float()
        ranges = slice(start // group, (start + BLOCK_TOKENS) // group)
        step, offset = (part[..., ranges, :].float() for part in (steps, offsets))
        if group > 1:
            step, offset = (part.repeat_interleave(group, -2)[..., : numbers.shape[-2], :] for part in (step, offset))
        # A step that was rounded up may lead beyond the largest number.
        out[..., tokens, :] = numbers.mul_(step).add_(offset).clamp_(-largest, largest).to(out.dtype)


def _require_finite(offsets: Tensors) -> None:
    """Checks all layers at once, so that a GPU is waited for once."""
    if not offsets:
        return
    are_finite = torch.stack([part.isfinite().all() for part in offsets.values()]).tolist()
    broken = [name for name, is_finite in zip(offsets, are_finite, strict=True) if not is_finite]
    if broken:
        layer, kind = broken[0].split(".")
        raise ValueError(
            f"`context_cache_dtype='int8'` keeps finite numbers only, and a context's {kind} in layer {layer} hold "
            "NaN or infinity. With `context_cache_dtype: auto` they would reach the loss; look for what makes them."
        )

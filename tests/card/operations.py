# SPDX-License-Identifier: Apache-2.0
"""The operations of the stand-in: where results lie, what is refused, and what CPUs do not have."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.card.memory import CARD, HOST, Place, card, real_device

aten = torch.ops.aten
# Operations that CUDA runs with tensors in either memory.
MIXING = {"copy_", "_to_copy", "set_", "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


class Operations(TorchDispatchMode):
    """Says of every result where it lies, and refuses what CUDA refuses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        on, asked = card(), kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        without_memory = [tensor for tensor in tensors if real_device(tensor).type == "meta"]
        if (asked is None and without_memory) or (asked is not None and asked.type == "meta"):
            return func(*args, **kwargs)
        places = [on.place(tensor) for tensor in tensors]
        if not without_memory:
            _require_one_memory(func, tensors, places)
        for place in filter(None, places):
            on.require_readable(place, func)
        to_card = _target(asked, places)
        if asked is not None:
            kwargs["device"] = HOST
        pinned = bool(kwargs.get("pin_memory"))
        if pinned:
            kwargs["pin_memory"] = False
        own = EMULATED.get(func) if to_card else None
        if own is not None:
            on.calls.add(str(func))
        with on.aside():
            results = (own or func)(*args, **kwargs)
        on.stream.steps += 1
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                on.put(result, to_card, pinned=pinned)
        if func._schema.is_mutable and places and places[0] is not None and places[0].on_card:
            places[0].stream, places[0].steps = on.stream, on.stream.steps
        return results


def _require_one_memory(func: Any, tensors: list[torch.Tensor], places: list[Place | None]) -> None:
    """A number of the host is taken anywhere."""
    found = {
        place is not None and place.on_card for tensor, place in zip(tensors, places, strict=True) if tensor.dim()
    }
    found |= {True for place in places if place is not None and place.on_card}
    if len(found) == 2 and func.overloadpacket.__name__ not in MIXING:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


class _Asked(threading.local):
    """What the Python functions that run ask for: a device, or none with (`tensors`) or without any of the card."""

    def __init__(self) -> None:
        self.said: list[str] = []


_asked = _Asked()


@contextmanager
def asking(said: str) -> Iterator[None]:
    """Notes what a call in Python asks for."""
    _asked.said.append(said)
    try:
        yield
    finally:
        _asked.said.pop()


def _target(asked: torch.device | None, places: list[Place | None]) -> bool:
    """Whether a result lies on the card.

    PyTorch's own code takes the device of new tensors from those it was given, which it finds on the CPU: there an
    explicit CPU means nothing, unless it was asked for in Python.
    """
    of_tensors = any(place is not None and place.on_card for place in places)
    if asked is None:
        return of_tensors
    said = _asked.said[-1] if _asked.said else ""
    return asked.type == "cuda" or (said != "cpu" and (of_tensors or said == "tensors"))


class Functions(TorchFunctionMode):
    """Notes which device a call in Python asks for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        # A number is one of a card's.
        if isinstance(device, int):
            device = kwargs["device"] = CARD
        if func is torch.device and len(args) == 1 and isinstance(args[0], int):
            return CARD
        if device is not None:
            said = torch.device(device).type
        else:
            tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            said = "tensors" if any(map(card().holds, tensors)) else ""
        with asking(said):
            return func(*args, **kwargs)


def _require_arguments(func: Any, *args: Any, **kwargs: Any) -> None:
    """PyTorch's own check of an operation's arguments, which its tracers run."""
    args, kwargs = tree_map_only(torch.Tensor, partial(torch.empty_like, device="meta"), (args, kwargs))
    func(*args, **kwargs)


def _bmm(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    _require_arguments(aten.bmm.dtype, left, right, out_dtype)
    _require_products(left, right, out_dtype)
    return torch.bmm(left.float(), right.float())


def _addmm(
    added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype, *, out: Any, **factors: Any
) -> torch.Tensor:
    _require_products(left, right, out_dtype)
    assert added.dtype == out.dtype == out_dtype, (added.dtype, out.dtype, out_dtype)
    return torch.addmm(added, left.float(), right.float(), out=out, **factors)


def _require_products(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> None:
    """As PyTorch's CUDA code does."""
    assert left.dtype == right.dtype, (left.dtype, right.dtype)
    assert left.dtype in SIXTEEN_BIT, left.dtype
    assert out_dtype == torch.float32, out_dtype


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The causal mask sits at the lower right, and grouped heads are not repeated."""
    _require_arguments(
        aten._scaled_dot_product_flash_attention.default,
        query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale,
    )  # fmt: skip
    assert query.dtype in SIXTEEN_BIT, query.dtype
    assert len({tensor.dtype for tensor in (query, key, value)}) == 1
    assert len({tensor.shape[-1] for tensor in (query, key, value)}) == 1
    assert query.shape[-1] <= MAX_HEAD_DIM, query.shape
    assert query.shape[-1] % 8 == 0, query.shape
    repeats = query.shape[1] // key.shape[1]
    keys, values = (tensor.float().repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    num_queries, num_keys = scores.shape[-2:]
    if is_causal:
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        scores = scores.masked_fill(~visible, -torch.inf)
    output = (scores.softmax(-1) @ values).to(query.dtype)
    nothing = torch.empty(0)
    return output, scores.logsumexp(-1), nothing, nothing, num_queries, num_keys, nothing, nothing, nothing


def _histc(tensor: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    """Of integers too, for which CPUs have none."""
    return torch.histc(tensor.float(), bins, min, max).to(tensor.dtype)


EMULATED: dict[Any, Callable[..., Any]] = {
    aten.bmm.dtype: _bmm,
    aten.addmm.dtype_out: _addmm,
    aten.histc.default: _histc,
    aten._scaled_dot_product_flash_attention.default: _flash_attention,
}

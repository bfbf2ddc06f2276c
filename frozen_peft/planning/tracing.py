# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes that a computation holds, without holding them.

What a layer keeps for its backward pass, and what it needs for a moment, is not in any configuration: it follows from
every operation of the modeling code. So the code itself is run, on tensors that have shapes and no storage, and every
storage that an operation would have allocated is counted from its birth to its death.

1. A `Ghost` is a tensor that says it is on a CPU and has a counterpart on the meta device, which has all of it but
   numbers. An operation on ghosts runs on their counterparts, views and operations in place included.
2. Whole numbers and masks that depend on no ghost are real, so that code may ask for their values: lengths, positions.
   Whatever else is made anew is a ghost.
3. Autograd, checkpoints and caches do not notice.

Nothing is computed, so the width of a model costs nothing; what costs time is the number of operations. (PyTorch's
`FakeTensorMode` does the same for compilers, with caches and guards that make an operation take ten times as long.)
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch

# Registers what operations on the meta device return.
import torch._meta_registrations
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Ghost", "LiveBytes", "without_storage"]

# What ghosts say they are on, which is the modeling code's plain path; kernels of an accelerator are put in its place
# where one is planned for (see `kernels`).
DEVICE = torch.device("cpu")
META = torch.device("meta")
_TYPED_BY_VALUE = frozenset({torch.ops.aten.arange, torch.ops.aten.full})


class Ghost(torch.Tensor):
    """A tensor without storage.

    Args:
        counterpart: A tensor on the meta device.
        requires_grad: Whether it is a leaf with gradient.
    """

    counterpart: torch.Tensor

    @staticmethod
    def __new__(cls, counterpart: torch.Tensor, requires_grad: bool = False) -> "Ghost":
        ghost = torch.Tensor._make_wrapper_subclass(
            cls,
            counterpart.size(),
            strides=counterpart.stride(),
            storage_offset=counterpart.storage_offset(),
            dtype=counterpart.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        ghost.counterpart = counterpart
        return ghost

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def without_storage(model: nn.Module) -> None:
    """Replaces a model's weights and buffers, on the meta device, by ghosts. Tied weights stay tied.

    Buffers that were computed when the model was built stay as they are.
    """
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                ghost = Ghost(parameter.data)
                replaced[id(parameter)] = nn.Parameter(ghost, requires_grad=parameter.requires_grad)
            module._parameters[name] = replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = Ghost(buffer)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations under it allocate, as long as anything refers to them.

    What a kernel takes for itself and gives back before it returns is not seen.

    Args:
        existing: Tensors that were there before, which count for nothing.

    Attributes:
        live: Bytes that are held now.
        peak: Most bytes that were held at a time.
    """

    def __init__(self, existing: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for tensor in existing:
            self._known[_storage(tensor)] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = _run(func, args, kwargs or {})
        if isinstance(result, torch.Tensor):
            self._note(_storage(result))
        elif result is not None:
            for value in tree_leaves(result):
                if isinstance(value, torch.Tensor):
                    self._note(_storage(value))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        num_bytes = storage.nbytes()
        self._known[storage] = weakref.ref(storage, lambda _: self._release(num_bytes))
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def _release(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return getattr(tensor, "counterpart", tensor).untyped_storage()


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the counterparts of its arguments, or on the arguments themselves where none is a ghost."""
    leaves = tree_leaves((args, kwargs))
    if not any(isinstance(leaf, Ghost) for leaf in leaves):
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves) or not _makes_numbers(func, args, kwargs):
            return func(*args, **kwargs)
        return Ghost(func(*args, **{**kwargs, "device": META}))
    plain_args, plain_kwargs = tree_map(_on_meta, (args, kwargs))
    result = _SHAPES.get(func.overloadpacket, func)(*plain_args, **plain_kwargs)
    if func._schema.is_mutable:
        return _mutated(func, args, kwargs, plain_args, plain_kwargs, result)
    return tree_map(_as_ghost, result)


def _grouped_products(
    left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Shape of products of groups of rows, of columns, or of what both have in common, with a matrix each."""
    rows, columns = left.shape[-2], right.shape[-1]
    grouped = left.ndim == right.ndim
    if grouped:
        num_groups = left.shape[0] if left.ndim == 3 else offs.shape[0]
        return left.new_empty(num_groups, rows, columns)
    return left.new_empty(rows, columns)


# torch 2.13 says of these on the meta device what holds on a GPU alone: that they take bfloat16.
_SHAPES = {torch.ops.aten._grouped_mm: _grouped_products}


def _makes_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function that takes no tensors makes one of floating point."""
    if "device" not in kwargs:
        return False
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return dtype.is_floating_point
    # Of the type of the numbers that are given, for these two.
    return func.overloadpacket not in _TYPED_BY_VALUE or any(isinstance(value, float) for value in args)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Ghost):
        return value.counterpart
    if isinstance(value, torch.Tensor):
        # A number stands for itself among tensors of any device; anything else goes where the others are.
        return (
            value
            if value.ndim == 0
            else torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)
        )
    return META if isinstance(value, torch.device) else value


def _as_ghost(value: Any) -> Any:
    return Ghost(value) if isinstance(value, torch.Tensor) and value.is_meta else value


def _mutated(func: Any, args: Any, kwargs: Any, plain_args: Any, plain_kwargs: Any, result: Any) -> Any:
    """The result of an operation in place: the arguments that it returns are the ones that were given."""
    given = {
        id(plain): own
        for own, plain in zip(tree_leaves((args, kwargs)), tree_leaves((plain_args, plain_kwargs)), strict=True)
        if isinstance(plain, torch.Tensor)
    }
    return tree_map(lambda value: given[id(value)] if id(value) in given else _as_ghost(value), result)

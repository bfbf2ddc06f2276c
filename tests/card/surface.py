# SPDX-License-Identifier: Apache-2.0
"""What Python sees of the stand-in: `torch.cuda`, `torch.accelerator`, and the methods of tensors."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import bias
from torch.overrides import _get_current_function_mode_stack, get_testing_overrides
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from tests.card.memory import CARD, HOST, Card, Stream, like
from tests.card.operations import MAX_HEAD_DIM, SIXTEEN_BIT, asking

Function = Callable[..., Any]


def _require_card(device: Any) -> None:
    assert device is None or device == 0 or torch.device(device).type == "cuda", f"asks {device} for what a card has"


def _of_card(value: Function) -> Function:
    def ask(device: Any = None) -> Any:
        _require_card(device)
        return value()

    return ask


def cuda_functions(on: Card) -> dict[str, Function]:
    """By their names in `torch.cuda`."""

    def set_fraction(fraction: float, device: Any = None) -> None:
        on.limit = int(fraction * on.total_bytes)

    @contextmanager
    def in_stream(stream: Stream | None) -> Iterator[None]:
        before, on.stream = on.stream, stream or on.stream
        try:
            yield
        finally:
            on.stream = before

    properties = SimpleNamespace(
        name=on.name, total_memory=on.total_bytes, major=on.capability[0], minor=on.capability[1], warp_size=32
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _of_card(lambda: None),
        "get_device_properties": _of_card(lambda: properties),
        "get_device_capability": _of_card(lambda: on.capability),
        "get_device_name": _of_card(lambda: on.name),
        "is_bf16_supported": lambda including_emulation=True: on.capability >= (8, 0),
        "mem_get_info": _of_card(lambda: (on.limit - on.allocated(), on.total_bytes)),
        "memory_allocated": _of_card(on.allocated),
        "memory_reserved": _of_card(on.allocated),
        "max_memory_allocated": _of_card(lambda: on.peak),
        "max_memory_reserved": _of_card(lambda: on.peak),
        "reset_peak_memory_stats": _of_card(on.forget_peak),
        "empty_cache": lambda: None,
        "synchronize": _of_card(lambda: None),
        "set_per_process_memory_fraction": set_fraction,
        "is_current_stream_capturing": lambda: False,
        "current_stream": _of_card(lambda: on.stream),
        "default_stream": _of_card(lambda: on.default_stream),
        "stream": in_stream,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": _of_card(torch.get_rng_state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda new_state, device="cuda": torch.set_rng_state(new_state),
        "set_rng_state_all": lambda new_states: torch.set_rng_state(new_states[0]),
    }


ACCELERATOR_FUNCTIONS: dict[str, Function] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_accelerator": lambda check_available=False: torch.device("cuda"),
    "current_device_index": lambda: 0,
    "current_stream": lambda device=None: SimpleNamespace(is_capturing=lambda: False),
    "synchronize": lambda device=None: None,
}


class Device:
    """In place of `torch.cuda.device`."""

    def __init__(self, device: Any):
        _require_card(device)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def made_in_host_memory(real: Function) -> Function:
    """`torch.tensor` and its like, which PyTorch runs past all modes: their numbers are moved by a copy."""

    @functools.wraps(real)
    def make(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> torch.Tensor:
        if device is None and isinstance(data, torch.Tensor):
            device = data.device
        device = CARD if isinstance(device, int) else torch.device(device or _default_device())
        if device.type == "meta":
            return real(data, *args, device=device, **kwargs)
        if isinstance(data, torch.Tensor):
            made = data.to(device, kwargs.get("dtype") or data.dtype, copy=real.__name__ == "tensor")
        else:
            made = real(data, *args, device=HOST, **kwargs).to(device)
        return made.requires_grad_() if requires_grad else made

    return make


def _default_device() -> torch.device:
    """As `with torch.device(...)` says; `torch.get_default_device` makes a tensor to find out."""
    contexts = (mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, DeviceContext))
    return next((context.device for context in contexts), HOST)


def tensor_methods(on: Card) -> dict[str, Any]:
    """By their names in `torch.Tensor`."""
    base, names = torch._C.TensorBase, get_testing_overrides()
    real = {name: getattr(torch.Tensor, name) for name in ("to", "numpy", "__array__", "__deepcopy__")}

    def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        assert not on.holds(tensor), "only dense CPU tensors can be pinned"
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            copy = tensor.clone()
        on.put(copy, False, pinned=True)
        return copy

    def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
        place = on.place(tensor)
        return place is not None and place.pinned

    def record_stream(tensor: torch.Tensor, stream: Any) -> None:
        place = on.place(tensor)
        assert isinstance(stream, Stream)
        assert place is not None, "a tensor of host memory belongs to no stream"
        assert place.on_card, "a tensor of host memory belongs to no stream"
        place.readers.add(stream)

    def require_host(tensor: torch.Tensor) -> None:
        if on.device(tensor).type == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def numpy(tensor: torch.Tensor, *, force: bool = False) -> Any:
        require_host(tensor)
        return real["numpy"](tensor, force=force)

    def array(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        require_host(tensor)
        return real["__array__"](tensor, *args, **kwargs)

    def deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        copy: torch.Tensor = real["__deepcopy__"](tensor, memo)
        on.put(copy, on.holds(tensor))
        return copy

    return {
        "device": property(on.device),
        "is_cuda": property(lambda tensor: on.device(tensor).type == "cuda"),
        "is_cpu": property(lambda tensor: on.device(tensor).type == "cpu"),
        "get_device": lambda tensor: 0 if on.device(tensor).type == "cuda" else -1,
        "to": lambda tensor, *args, **kwargs: _to(real["to"], tensor, *args, **kwargs),
        "cuda": lambda tensor, device=None, non_blocking=False: tensor.to(CARD, non_blocking=non_blocking),
        "cpu": lambda tensor: tensor.to(HOST),
        "pin_memory": like(base.pin_memory, pin_memory, names[torch.Tensor.pin_memory]),
        "is_pinned": like(base.is_pinned, is_pinned, names[torch.Tensor.is_pinned]),
        "record_stream": like(base.record_stream, record_stream, names[torch.Tensor.record_stream]),
        "numpy": numpy,
        "__array__": array,
        "__deepcopy__": deepcopy,
    }


def _to(real: Function, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to` in any of its forms."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    here, dtype = tensor.device.type, dtype or tensor.dtype
    if device is not None and device.type != here and {device.type, here} == {"cuda", "cpu"}:
        with asking(device.type):
            moved: torch.Tensor = torch.ops.aten._to_copy.default(
                tensor, dtype=dtype, device=device, non_blocking=non_blocking
            )
            return moved
    rest: dict[str, Any] = {"copy": copy} | ({} if layout is None else {"memory_format": layout})
    if device is not None and "meta" in (device.type, here):
        return real(tensor, device, dtype, non_blocking, **rest)
    return real(tensor, dtype, non_blocking, **rest)


def can_use_flash_attention(params: Any, debug: bool = False) -> bool:
    """As `torch.backends.cuda` says of a card from Ampere on."""
    shapes = {tensor.shape[-1] for tensor in (params.query, params.key, params.value)}
    return params.query.dtype in SIXTEEN_BIT and len(shapes) == 1 and max(shapes) <= MAX_HEAD_DIM


def new_bias(bias_class: type[bias.CausalBias], *_: object) -> torch.Tensor:
    """PyTorch makes its subclass of a tensor that no mode must have seen."""
    with _disable_current_modes():
        return torch.Tensor.__new__(bias_class)


class Autocast:
    """Has `torch.autocast` for the card act on what is computed on the CPU."""

    def __init__(self) -> None:
        self._enter, self._exit = torch.autocast.__enter__, torch.autocast.__exit__
        self._before: list[tuple[bool, torch.dtype]] = []

    def enter(self, context: torch.autocast) -> Any:
        result = self._enter(context)
        if context.device == "cuda":
            self._before.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            self._set(torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        return result

    def exit(self, context: torch.autocast, *error: Any) -> Any:
        if context.device == "cuda":
            self._set(*self._before.pop())
        return self._exit(context, *error)

    @staticmethod
    def _set(enabled: bool, dtype: torch.dtype) -> None:
        torch.set_autocast_enabled("cpu", enabled)
        torch.set_autocast_dtype("cpu", dtype)

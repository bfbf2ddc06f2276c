# SPDX-License-Identifier: Apache-2.0
"""The memory and the streams of the stand-in: which storage lies where, who wrote it, and who may read it."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
GIBIBYTE = 1 << 30


def like(real: Callable[..., Any], own: Callable[..., Any], signature: Any = None) -> Callable[..., Any]:
    """`own`, which takes the arguments that `real` takes and no others, and whose calls are counted."""
    parameters = inspect.signature(signature or real)
    name = getattr(real, "__qualname__", str(real))

    @wraps(own)
    def checked(*args: Any, **kwargs: Any) -> Any:
        parameters.bind(*args, **kwargs)
        if _current:
            _current[-1].calls.add(name)
        return own(*args, **kwargs)

    return checked


def with_signatures(real: type) -> Callable[[type], type]:
    """Has the methods of a class take the arguments of another's."""

    def decorate(own: type) -> type:
        for name, method in list(vars(own).items()):
            if inspect.isfunction(method):
                setattr(own, name, like(real.__new__ if name == "__init__" else getattr(real, name), method))
        return own

    return decorate


@with_signatures(torch.cuda.Stream)
class Stream:
    """In place of `torch.cuda.Stream`: how much was done on it, and what of others it has waited for."""

    def __init__(self, device: Any = None, priority: int = 0):
        assert torch.device(device or CARD).type == "cuda"
        self.steps, self.waited = 0, {}

    def wait_event(self, event: "Event") -> None:
        assert event.stream is not None, "it was never recorded"
        self.waited[event.stream] = max(event.steps, self.waited.get(event.stream, 0))

    def wait_stream(self, stream: "Stream") -> None:
        self.waited[stream] = stream.steps

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event


@with_signatures(torch.cuda.Event)
class Event:
    """In place of `torch.cuda.Event`: a place in a stream's work."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any):
        self.timed, self.stream, self.steps, self.done = enable_timing, None, 0, False

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or card().stream
        self.steps = self.stream.steps

    def synchronize(self) -> None:
        assert self.stream is not None, "it was never recorded"
        self.done = True

    def elapsed_time(self, end_event: "Event") -> float:
        assert self.timed, "it was made without `enable_timing`"
        assert end_event.timed, "the later one was made without `enable_timing`"
        assert end_event.done, "CUDA error: device not ready: the later one was not waited for"
        return float(end_event.steps - self.steps)


@dataclass
class Place:
    """Where a storage lies.

    Attributes:
        storage: Which one, without keeping it.
        num_bytes: Its size.
        on_card: On the card, or in host memory.
        pinned: Whether that is pinned.
        stream: On which it was last written, and how much had been done there then.
        steps: See `stream`.
        readers: Other streams that it was recorded on.
    """

    storage: StorageWeakRef
    num_bytes: int
    on_card: bool
    pinned: bool = False
    stream: Stream | None = None
    steps: int = 0
    readers: set[Stream] = field(default_factory=set)


class Card:
    """The card's memory and streams.

    Args:
        total_bytes: Of memory.
        capability: Compute capability.
        name: As drivers say it.
    """

    def __init__(
        self,
        total_bytes: int = 80 * GIBIBYTE,
        capability: tuple[int, int] = (9, 0),
        name: str = "NVIDIA H100 (none)",
    ):
        self.total_bytes, self.capability, self.name = total_bytes, capability, name
        self.limit, self.peak, self._counted = total_bytes, 0, 0
        self.calls: set[str] = set()
        self._places: dict[int, Place] = {}
        # The store reads and writes in threads of its own.
        self._lock = threading.RLock()
        self.default_stream: Any = None
        self._of_thread = threading.local()

    @property
    def stream(self) -> Any:
        """The current one, of the thread that asks."""
        return getattr(self._of_thread, "stream", self.default_stream)

    @stream.setter
    def stream(self, stream: Any) -> None:
        self._of_thread.stream = stream

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Has tensors say where they really are inside, for what computes them."""
        before, self._of_thread.is_aside = self.is_aside, True
        try:
            yield
        finally:
            self._of_thread.is_aside = before

    @property
    def is_aside(self) -> bool:
        return getattr(self._of_thread, "is_aside", False)

    def place(self, tensor: torch.Tensor) -> Place | None:
        """Where a tensor lies; None where nothing was said of it, which is in host memory."""
        with torch._C.DisableTorchFunction():
            if not is_plain(tensor):
                return None
            found = self._places.get(tensor.untyped_storage()._cdata)
        return None if found is None or found.storage.expired() else found

    def device(self, tensor: torch.Tensor) -> torch.device:
        """Where a tensor says that it is."""
        return CARD if not self.is_aside and self.holds(tensor) else real_device(tensor)

    def holds(self, tensor: torch.Tensor) -> bool:
        place = self.place(tensor)
        return place is not None and place.on_card

    def put(self, tensor: torch.Tensor, on_card: bool, *, pinned: bool = False) -> None:
        """Says where the storage of a tensor lies; what was said before stays.

        Raises:
            OutOfMemoryError: The card has no room for it.
        """
        with torch._C.DisableTorchFunction():
            if not is_plain(tensor) or self.place(tensor) is not None:
                return
            storage = tensor.untyped_storage()
        num_bytes, stream = storage.nbytes(), self.stream if on_card else None
        with self._lock:
            if on_card:
                self._take(num_bytes)
            self._places[storage._cdata] = Place(
                StorageWeakRef(storage), num_bytes, on_card, pinned, stream, self.stream.steps
            )

    def _take(self, num_bytes: int) -> None:
        self._counted += num_bytes
        if self._counted <= min(self.peak, self.limit):
            return
        # What was counted may have been freed.
        self._counted = self.allocated() + num_bytes
        if self._counted > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes} bytes.")
        self.peak = max(self.peak, self._counted)

    def allocated(self) -> int:
        """Bytes of the card's tensors."""
        with self._lock:
            for key in [key for key, place in self._places.items() if place.storage.expired()]:
                del self._places[key]
            return sum(place.num_bytes for place in self._places.values() if place.on_card)

    def forget_peak(self) -> None:
        self.peak = self._counted = self.allocated()

    def require_readable(self, place: Place, func: Any) -> None:
        """Fails where work on the current stream may not read this yet, or not for long."""
        if not place.on_card or place.stream is self.stream:
            return
        assert place.steps <= self.stream.waited.get(place.stream, -1), f"{func} reads what has not arrived"
        assert self.stream in place.readers, f"{func} reads what was not recorded on its stream, and may be given away"


_current: list[Card] = []


def card() -> Card:
    """The card that is in place."""
    return _current[-1]


def real_device(tensor: torch.Tensor) -> torch.device:
    """Where PyTorch has a tensor."""
    device: torch.device = torch._C.TensorBase.device.__get__(tensor)
    return device


def is_plain(tensor: torch.Tensor) -> bool:
    return real_device(tensor).type == "cpu" and tensor.layout == torch.strided

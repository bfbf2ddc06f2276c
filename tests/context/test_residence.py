# SPDX-License-Identifier: Apache-2.0
"""Where kept tensors lie, and how they get to where they are needed."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from frozen_peft.context import ContextEncoder, ContextFiles, ContextStore, DiskLevel
from frozen_peft.context.store.residence import DeviceCopy, copy_ahead, device_room, pinned, to_device, to_host
from tests.context.stored import content, same
from tests.reference import random_sample
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def test_on_a_cpu_nothing_changes() -> None:
    tensors = content()
    assert same(to_device(tensors, CPU), tensors)
    assert same(DeviceCopy(tensors, CPU).wait(), tensors)
    copies = to_host(tensors)
    assert same(copies, tensors)
    assert all(copies[name].data_ptr() != tensor.data_ptr() for name, tensor in tensors.items() if tensor.numel())
    assert device_room(CPU) > 1 << 60


@pytest.mark.parametrize("pins", [False, True])
def test_the_reader_pins_what_goes_to_a_gpu(pins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so in its own thread, and only where it was told to; what is found is the same."""
    threads: list[str] = []

    def note(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        threads.append(threading.current_thread().name)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    monkeypatch.setattr("frozen_peft.context.store.disk_level.pinned", note)
    model, context = tiny_model("qwen3_5_text"), random_sample(70, 2).context

    def encoder() -> ContextEncoder:
        disk = DiskLevel(ContextFiles(tmp_path))
        return ContextEncoder(model, store=ContextStore(0, disk, max_staleness=9))

    first = encoder()
    expected = first.encode([context])
    first.store.flush()
    second = encoder()
    # Opens the store, which a CPU's store sets to not pin.
    second.encode([random_sample(20, 2, seed=1).context])
    assert second.store._disk.pins is False
    second.store._disk.pins = pins
    second.read_ahead([context])
    monkeypatch.setattr(second.store, "open", lambda *args, **kwargs: None)
    found = second.encode([context])
    assert second.counts.num_tokens_encoded == 20
    assert all(name.startswith("contexts-read") for name in threads)
    assert bool(threads) is pins
    for left, right in zip(found.rows[0].tensors(), expected.rows[0].tensors(), strict=True):
        assert torch.equal(left, right)


@dataclass
class Device:
    """A device with a memory of its own, of which copies ahead take their share."""

    room: int = 1 << 30
    threads: list[str] = field(default_factory=list)
    waited: list[Tensors] = field(default_factory=list)
    begun: list[Tensors] = field(default_factory=list)
    refused: int = 0

    def copy(self, tensors: Tensors, device: torch.device) -> "Device._Copy":
        """In place of `DeviceCopy`."""
        if self.refused:
            self.refused -= 1
            raise torch.OutOfMemoryError
        self.threads.append(threading.current_thread().name)
        self.begun.append(tensors)
        self.room -= num_bytes(tensors)
        return self._Copy(self, tensors)

    @dataclass
    class _Copy:
        device: "Device"
        tensors: Tensors

        def wait(self) -> Tensors:
            self.device.waited.append(self.tensors)
            self.device.room += num_bytes(self.tensors)
            return {name: tensor.clone() for name, tensor in self.tensors.items()}


def num_bytes(tensors: Tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr("frozen_peft.context.store.residence.DeviceCopy", device.copy)
    return device


WHOLE = random_sample(140, 2).context
# The second one goes on from the first.
CONTEXTS = [WHOLE[:70], WHOLE, random_sample(50, 2, seed=3).context]


def reading(folder: Path, room: Callable[[torch.device], int] = device_room, **options: object) -> ContextEncoder:
    """An encoder that has nothing in memory, of which an earlier one has written what it needs."""
    if not folder.exists():
        first = ContextEncoder(
            tiny_model("qwen3_5_text"),
            store=ContextStore(0, DiskLevel(ContextFiles(folder)), max_staleness=9, **options),
        )
        first.encode(CONTEXTS)
        first.store.flush()
    disk = DiskLevel(ContextFiles(folder))
    encoder = ContextEncoder(
        tiny_model("qwen3_5_text"), store=ContextStore(0, disk, max_staleness=9, room=room, **options)
    )
    encoder.encode([random_sample(20, 2, seed=1).context])
    encoder.counts.num_tokens_encoded = 0
    return encoder


def tensors_of(encoder: ContextEncoder) -> list[torch.Tensor]:
    return [tensor for row in encoder.encode(CONTEXTS).rows for tensor in row.tensors()]


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_what_was_read_ahead_is_on_its_way_to_the_device(dtype: str, device: Device, tmp_path: Path) -> None:
    """All of it, in the reader's thread, each file once; and as it lies in the file: in 8 bit where that was asked."""
    expected = tensors_of(reading(tmp_path / "contexts", dtype=dtype))
    encoder = reading(tmp_path / "contexts", lambda _: device.room, dtype=dtype)
    encoder.read_ahead(CONTEXTS)
    found = tensors_of(encoder)
    assert encoder.counts.num_tokens_encoded == 0
    assert len(device.begun) == len(device.waited) == 3
    assert all(name.startswith("contexts-read") for name in device.threads)
    assert ({torch.int8} <= {t.dtype for tensors in device.begun for t in tensors.values()}) is (dtype == "int8")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_copies_stay_within_the_room(device: Device, tmp_path: Path) -> None:
    expected, total = tensors_of(reading(tmp_path / "contexts")), 0
    for num_copies in (3, 2, 0):
        device.begun.clear()
        device.waited.clear()
        # All of them, one byte too little for the last one, nothing.
        device.room = {3: 1 << 30, 2: total - 1, 0: 0}[num_copies]
        encoder = reading(tmp_path / "contexts", lambda _: device.room)
        encoder.read_ahead(CONTEXTS)
        for future in [*encoder.store._disk._reading.values()]:
            future.result()
        assert device.room >= 0
        assert len(device.begun) == num_copies
        total = total or sum(map(num_bytes, device.begun))
        found = tensors_of(encoder)
        assert encoder.counts.num_tokens_encoded == 0
        assert len(device.waited) == num_copies
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_device_that_is_full_after_all_loses_nothing(device: Device, tmp_path: Path) -> None:
    expected = tensors_of(reading(tmp_path / "contexts"))
    device.refused = 2
    encoder = reading(tmp_path / "contexts", lambda _: device.room)
    encoder.read_ahead(CONTEXTS)
    found = tensors_of(encoder)
    assert encoder.counts.num_tokens_encoded == 0
    assert device.refused == 0
    assert len(device.begun) == 1
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_entries_in_host_memory_are_copied_ahead_within_the_room(device: Device) -> None:
    device.room = -1
    store = ContextStore(1 << 30, max_staleness=9, room=lambda _: device.room)
    encoder = ContextEncoder(tiny_model("qwen3_5_text"), store=store)
    expected = tensors_of(encoder)
    total = store.num_bytes
    for room, num_copies in ((1 << 30, 1), (total - 1, 1), (0, 0)):
        encoder.expect([])
        device.begun.clear()
        device.room = room
        # Of what is read ahead twice, the copy begins once.
        encoder.read_ahead(CONTEXTS[1:2])
        encoder.read_ahead(CONTEXTS[1:2])
        assert len(device.begun) == num_copies
        assert sum(map(num_bytes, device.begun)) <= room
        assert all(torch.equal(*pair) for pair in zip(tensors_of(encoder), expected, strict=True))


def test_the_source_of_a_copy_is_held_until_it_is_waited_for() -> None:
    """Whoever owns pinned memory may let it go while it is read."""
    tensor = torch.randn(8)
    seen = weakref.ref(tensor)
    copying = copy_ahead({"a": tensor}, CPU, lambda _: 1 << 30)
    assert copying is not None
    copying._tensors = {"a": tensor.clone()}
    expected = tensor.clone()
    del tensor
    assert seen() is not None
    arrived = copying.wait()
    assert seen() is None
    assert torch.equal(arrived["a"], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_what_was_read_ahead_arrives_whole_on_a_card(dtype: str, tmp_path: Path) -> None:
    """Files are read, pinned and copied while the card multiplies; contexts are bit for bit what was written."""
    model = tiny_model("llama", hidden_size=256, head_dim=128).to("cuda", torch.bfloat16)

    def encoder() -> ContextEncoder:
        disk = DiskLevel(ContextFiles(tmp_path))
        return ContextEncoder(model, store=ContextStore(0, disk, max_staleness=9, dtype=dtype))

    contexts = [random_sample(2000, 2, seed=seed).context for seed in range(8)]
    first = encoder()
    expected = first.encode(contexts)
    first.store.flush()
    second = encoder()
    second.encode([random_sample(20, 2, seed=99).context])
    second.read_ahead(contexts)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = (busy @ busy).tanh_()
    entries = [entry for future in second.store._disk._reading.values() for entry in future.result().values()]
    assert all(entry.copying is not None for entry in entries)
    assert all(tensor.is_pinned() for entry in entries for tensor in entry.tensors.values())
    del entries
    found = second.encode(contexts)
    assert second.counts.num_tokens_encoded == 20
    # What was copied has gone to the contexts or is free again; its memory is given away at once.
    _ = [torch.full((1 << 22,), 7.0, device="cuda") for _ in range(4)]
    for left, right in zip(found.rows, expected.rows, strict=True):
        assert all(torch.equal(*pair) for pair in zip(left.tensors(), right.tensors(), strict=True))


@pytest.mark.gpu
def test_a_copy_arrives_whole_beside_other_work() -> None:
    """Many megabytes while the card multiplies; what is computed after `wait` sees all of it."""
    device = torch.device("cuda")
    source = pinned({name: torch.randn(1 << 22) for name in "abcd"})
    assert all(tensor.is_pinned() for tensor in source.values())
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(8):
        copying = DeviceCopy(source, device)
        for _ in range(4):
            busy = (busy @ busy).tanh_()
        arrived = copying.wait()
        sums = {name: tensor.double().sum() for name, tensor in arrived.items()}
        # Their memory is given to something else at once, which must not reach what was queued before.
        del copying, arrived
        _ = [torch.full((1 << 22,), 7.0, device=device) for _ in "abcd"]
        for name, total in sums.items():
            assert total.item() == pytest.approx(source[name].double().sum().item(), rel=1e-9, abs=1e-6)


@pytest.mark.gpu
def test_what_moves_off_a_card_comes_back_the_same() -> None:
    tensors = {name: tensor.cuda() for name, tensor in content().items()}
    moved = to_host(tensors)
    assert all(tensor.is_pinned() for tensor in moved.values() if tensor.numel())
    assert same(
        {name: tensor.cpu() for name, tensor in DeviceCopy(moved, torch.device("cuda")).wait().items()},
        content_of(tensors),
    )


def content_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}

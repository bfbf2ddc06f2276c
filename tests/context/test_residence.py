# SPDX-License-Identifier: Apache-2.0
"""Where kept tensors lie, and how they get to where they are needed."""

import threading
from pathlib import Path

import pytest
import torch

from frozen_peft.context import ContextEncoder, ContextFiles, ContextStore, DiskLevel
from frozen_peft.context.residence import DeviceCopy, device_room, pinned, to_device, to_host
from tests.context.stored import content, same
from tests.reference import random_sample
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")


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

    monkeypatch.setattr("frozen_peft.context.disk.pinned", note)
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

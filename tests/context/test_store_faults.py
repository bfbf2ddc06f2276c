# SPDX-License-Identifier: Apache-2.0
"""Stores that are used in odd ways: what is stale, foreign or lost, and what costs more than it should."""

import time
from pathlib import Path

import pytest
import torch

from frozen_peft.context import ContextFiles, encode_context
from tests.context.stored import KEY
from tests.context.test_prefixes import tokens
from tests.context.test_store import encoded_by, encoder, memory, move_adapters, on_disk, same
from tests.tiny_models import add_lora, tiny_model


@pytest.mark.parametrize("staleness", [0, 9])
@pytest.mark.parametrize("first_steps", [(5,), (0, 1, 2)], ids=str)
def test_steps_that_are_counted_again_from_the_start(first_steps: tuple[int, ...], staleness: int) -> None:
    """A second training with the same store: what the first one left is not of these weights."""
    model = add_lora(tiny_model("llama"))
    store = memory(max_staleness=staleness)
    again = encoder(model, store)
    for step in first_steps:
        again.encode([tokens(40 + step, 1)], step=step)
        move_adapters(model)
    contexts = [tokens(40 + step, 1) for step in first_steps]
    frozen, num_encoded = encoded_by(again, contexts, step=0)
    assert num_encoded == max(map(len, contexts))
    assert same(frozen, encode_context(model, contexts))


def test_room_is_asked_for_only_while_entries_are_on_the_device() -> None:
    calls = []
    store = memory(room=lambda device: calls.append(device) or -1)
    one = encoder(add_lora(tiny_model("llama")), store, adapters=False)
    one.encode([tokens(20 + seed, seed) for seed in range(20)])
    calls.clear()
    one.encode([tokens(20, 0)], step=1)
    assert len(calls) <= 1


def halved(model: torch.nn.Module) -> None:
    model.to(torch.bfloat16)


def written(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.mul_(1.5)


@pytest.mark.parametrize("change", [halved, written])
@pytest.mark.parametrize("adapters", [False, True])
def test_base_weights_that_change_after_the_store_was_opened(change, adapters: bool, tmp_path: Path) -> None:
    model, contexts = add_lora(tiny_model("llama")), [tokens(40, 1)]
    store = on_disk(tmp_path, 1 << 30)
    one = encoder(model, store, adapters=adapters)
    one.encode(contexts)
    change(model)
    frozen, num_encoded = encoded_by(one, contexts)
    assert num_encoded == 40
    assert same(frozen, encode_context(model, contexts, adapters=adapters))
    # Nor does a run of the model as it was find what the changed one encoded.
    one.encode([tokens(50, 2)])
    store.flush()
    before = add_lora(tiny_model("llama"))
    fresh, _ = encoded_by(encoder(before, on_disk(tmp_path), adapters=adapters), [tokens(50, 2)])
    assert same(fresh, encode_context(before, [tokens(50, 2)], adapters=adapters))


def test_reading_ahead_reads_each_entry_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns of a conversation, each of which extends all before it."""
    model, base = tiny_model("llama"), tokens(400, 1)
    turns = [base[:length] for length in range(10, 401, 10)]
    store = on_disk(tmp_path)
    encoder(model, store).encode(turns)
    store.flush()
    reads, read = [], ContextFiles.read
    monkeypatch.setattr(ContextFiles, "read", lambda self, *key: reads.append(key) or read(self, *key))
    later = on_disk(tmp_path, max_staleness=1)
    later.open(model, fixed=None, step=0)
    one = encoder(model, later)
    one.read_ahead(turns)
    frozen, num_encoded = encoded_by(one, turns)
    assert num_encoded == 0
    assert same(frozen, encode_context(model, turns))
    assert len(reads) == len(turns)


def test_an_entry_whose_prefix_is_lost_is_written_again(tmp_path: Path) -> None:
    model, short = tiny_model("llama"), tokens(40, 1)
    long = torch.cat([short, tokens(20, 2)])
    store = on_disk(tmp_path)
    encoder(model, store).encode([short, long])
    store.flush()
    (file,) = tmp_path.glob("*/40-*")
    file.write_bytes(b"damaged")
    num_encoded = []
    for _ in range(3):
        store = on_disk(tmp_path)
        num_encoded.append(encoded_by(encoder(model, store), [long])[1])
        store.flush()
    assert num_encoded == [60, 0, 0]


def test_namespaces_that_are_dropped_leave_no_directories(tmp_path: Path) -> None:
    model = add_lora(tiny_model("llama"))
    store = on_disk(tmp_path, max_staleness=1)
    one = encoder(model, store)
    for step in range(6):
        one.encode([tokens(20, step)], step=step)
        move_adapters(model, by=0.01)
    store.flush()
    assert len(list(tmp_path.iterdir())) == 2
    assert len(store._disk._listed) <= 2


def test_a_directory_is_not_listed_for_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listings, keys = [], ContextFiles.keys

    def slow(self: ContextFiles, namespace: str) -> set:
        listings.append(namespace)
        time.sleep(0.2)
        return keys(self, namespace)

    monkeypatch.setattr(ContextFiles, "keys", slow)
    store = on_disk(tmp_path)
    one = encoder(tiny_model("llama"), store, adapters=True)
    for seed in range(10):
        one.encode([tokens(20, seed)])
    store.flush()
    # What this process wrote is found all the same.
    assert encoded_by(one, [tokens(20, seed) for seed in range(10)])[1] == 0
    assert len(listings) <= 3


@pytest.mark.parametrize("then", ["gone", "another's"])
def test_a_file_that_goes_while_it_is_read(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process removes or replaces it between the two times that safetensors opens it."""
    folders = [tmp_path / name for name in ("one", "other")]
    for value, folder in enumerate(folders):
        assert ContextFiles(folder).write("model", KEY, {"keys": torch.full((9,), float(value))}, {})
    here, there = (folder / "model" / f"{KEY}.safetensors" for folder in folders)
    from_file = torch.UntypedStorage.from_file

    def late(*args: object, **kwargs: object) -> torch.UntypedStorage:
        here.unlink() if then == "gone" else there.replace(here)
        return from_file(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", late)
    tensors, _ = ContextFiles(folders[0]).read("model", KEY)
    assert tensors["keys"].tolist() == [0.0] * 9
    assert not caplog.records

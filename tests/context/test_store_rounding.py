# SPDX-License-Identifier: Apache-2.0
"""A store that keeps 8 bit gives the same context whether it is found, read or was just encoded."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from frozen_peft.context import (
    ContextEncoder,
    ContextFiles,
    ContextStore,
    DiskLevel,
    FrozenContext,
    encode_context,
    use_segmented_attention,
)
from tests.context.test_prefixes import family, tokens
from tests.context.test_store import PLENTY, encoded_by, encoder, memory, move_adapters, on_disk, same
from tests.frozen_runs import frozen_logprobs
from tests.tiny_models import add_lora, tiny_model

INT8 = {"dtype": "int8"}
LEVELS = ("memory", "host", "disk", "disk of an earlier run", "read ahead")


def asked_twice(level: str, model: nn.Module, contexts: list[torch.Tensor], folder: Path) -> list[FrozenContext]:
    """What a store gives when nothing is there, and when everything is."""
    room = (lambda device: -1) if level == "host" else (lambda device: 1)
    options = {**INT8, "room": room, "max_staleness": 1 if level == "read ahead" else 0}
    on_file = level not in ("memory", "host")
    asking = encoder(model, on_disk(folder, **options) if on_file else memory(**options))
    missed = asking.encode(contexts)
    asking.store.flush()
    if level == "disk of an earlier run":
        asking = encoder(model, on_disk(folder, **INT8))
    if level == "read ahead":
        asking.read_ahead(contexts)
    hit, num_encoded = encoded_by(asking, contexts)
    assert num_encoded == 0
    return [missed, hit]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["qwen3_5_text", "gemma3_text", "falcon_h1", "kimi_linear"])
def test_what_is_found_is_what_was_encoded(name: str, level: str, tmp_path: Path) -> None:
    """Contexts that share prefixes, so that some go on from what was rounded."""
    model = add_lora(tiny_model(name))
    use_segmented_attention(model)
    samples = family()
    contexts = [sample.context for sample in samples]
    missed, hit = asked_twice(level, model, contexts, tmp_path)
    assert same(missed, hit)
    assert torch.equal(frozen_logprobs(model, samples, missed), frozen_logprobs(model, samples, hit))
    assert not same(missed, encode_context(model, contexts))


def test_in_16_bit(tmp_path: Path) -> None:
    model = add_lora(tiny_model("qwen3_5_text")).to(torch.bfloat16)
    missed, hit = asked_twice("disk of an earlier run", model, [tokens(66, 1)], tmp_path)
    assert same(missed, hit)
    assert {tensor.dtype for tensor in hit.rows[0].tensors()} == {
        tensor.dtype for tensor in encode_context(model, [tokens(66, 1)]).rows[0].tensors()
    }


def test_a_budget_of_nothing_rounds_as_well() -> None:
    model, contexts = add_lora(tiny_model("qwen3_5_text")), [tokens(66, 1), tokens(40, 2)]
    kept, lost = (encoder(model, memory(size, **INT8)).encode(contexts) for size in (PLENTY, 0))
    assert same(kept, lost)


def test_an_extension_goes_on_from_what_was_rounded() -> None:
    """From the same prefix, found or encoded in the same step; and its keys stay rounded once."""
    model, whole = add_lora(tiny_model("qwen3_5_text")), tokens(100, 1)
    together = encoder(model, memory(**INT8)).encode([whole[:66], whole])
    apart = encoder(model, memory(**INT8))
    prefix = apart.encode([whole[:66]])
    later, num_encoded = encoded_by(apart, [whole])
    assert num_encoded == 34
    assert same(together.select([1]), later)
    for left, right in zip(prefix.rows[0].layers, later.rows[0].layers, strict=True):
        if left.attention is not None:
            assert torch.equal(left.attention.keys[0], right.attention.keys[0])


@pytest.mark.parametrize("adapters", [True, False])
def test_a_directory_serves_both_kinds(adapters: bool, tmp_path: Path) -> None:
    model, contexts = add_lora(tiny_model("qwen3_5_text")), [tokens(66, 1)]
    exact = encode_context(model, contexts, adapters=adapters)
    for _ in range(2):
        plain = encoder(model, on_disk(tmp_path), adapters=adapters)
        rounded = encoder(model, on_disk(tmp_path, **INT8), adapters=adapters)
        assert same(plain.encode(contexts), exact)
        assert not same(rounded.encode(contexts), exact)
        for asking in (plain, rounded):
            asking.store.flush()
    assert plain.counts.num_tokens_encoded == rounded.counts.num_tokens_encoded == 0
    assert len(list(tmp_path.rglob("66-*.safetensors"))) == 2


def test_a_file_of_the_other_kind_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, contexts = add_lora(tiny_model("qwen3_5_text")), [tokens(66, 1)]
    for dtype in ("auto", "int8"):
        asking = encoder(model, on_disk(tmp_path, dtype=dtype))
        fresh = asking.encode(contexts)
        asking.store.flush()
    one, other = sorted(tmp_path.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    one.write_bytes(other.read_bytes())
    again, num_encoded = encoded_by(encoder(model, on_disk(tmp_path, dtype="int8")), contexts)
    assert num_encoded == 66
    assert same(again, fresh)
    assert "is removed, because it holds" in caplog.text


def test_a_damaged_file_is_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, contexts = add_lora(tiny_model("qwen3_5_text")), [tokens(66, 1)]
    first = encoder(model, on_disk(tmp_path, **INT8))
    fresh = first.encode(contexts)
    first.store.flush()
    (path,) = tmp_path.rglob("*.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    again, num_encoded = encoded_by(encoder(model, on_disk(tmp_path, **INT8)), contexts)
    assert num_encoded == 66
    assert same(again, fresh)
    assert "its checksum is wrong" in caplog.text


def test_a_file_holds_8_bit(tmp_path: Path) -> None:
    model = add_lora(tiny_model("llama"))
    asking = encoder(model, on_disk(tmp_path, **INT8))
    asking.encode([tokens(130, 1)])
    asking.store.flush()
    (path,) = tmp_path.rglob("*.safetensors")
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        parts = ("codes", "steps", "offsets")
        assert names == {f"{n}.{kind}.{part}" for n in range(4) for kind in ("keys", "values") for part in parts}
        for kind, shapes in {"keys": (1, 2, 3, 16), "values": (1, 2, 130, 1)}.items():
            codes, *ranges = (file.get_tensor(f"0.{kind}.{part}") for part in parts)
            assert (codes.dtype, codes.shape) == (torch.int8, (1, 2, 130, 16))
            assert {(part.dtype, tuple(part.shape)) for part in ranges} == {(torch.float32, shapes)}


def test_stale_entries_are_used_for_as_many_steps_as_allowed_and_never_in_evaluation() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    training = encoder(model, memory(max_staleness=2, **INT8))
    contexts = [tokens(66, 1)]
    counts = []
    for step in range(5):
        counts.append(encoded_by(training, contexts, step=step)[1])
        move_adapters(model, 0.01)
    assert counts == [66, 0, 0, 66, 0]
    evaluated, num_encoded = encoded_by(training, contexts, step=5, stale=False)
    assert num_encoded == 66
    assert same(evaluated, encoder(model, memory(0, **INT8)).encode(contexts))


def test_the_budget_counts_what_is_kept() -> None:
    """A model with heads of 64, whose ranges weigh little: where two contexts fit, three of 8 bit do."""
    model = add_lora(tiny_model("llama", hidden_size=64, head_dim=64, num_hidden_layers=1)).to(torch.bfloat16)
    contexts = [tokens(256, seed) for seed in range(4)]
    sizes = {}
    for dtype in ("auto", "int8"):
        store = memory(dtype=dtype)
        encoder(model, store, adapters=False).encode(contexts)
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for entry in store._memory.entries.values()
            for tensor in entry.tensors.values()
        }
        assert store.num_bytes == sum(storages.values())
        sizes[dtype] = store.num_bytes
    # A byte and, for each 64 numbers, a step and an offset, instead of two bytes.
    assert sizes["int8"] == sizes["auto"] * (64 + 4) / 128
    for dtype, fits in (("auto", 2), ("int8", 3)):
        asking = encoder(model, memory(sizes["auto"] // 4 * 2, dtype=dtype), adapters=False)
        counts = [encoded_by(asking, [context], step=step)[1] for step, context in enumerate(contexts[:fits] * 2)]
        assert counts == [256] * fits + [0] * fits


def test_moving_off_the_device_moves_what_is_kept() -> None:
    model, contexts = add_lora(tiny_model("qwen3_5_text")), [tokens(66, 1)]
    free = [1]
    store = ContextStore(PLENTY, dtype="int8", room=lambda device: free[0])
    asking = ContextEncoder(model, adapters=False, store=store)
    fresh = asking.encode(contexts)
    size = store.num_bytes
    free[0] = -1
    found, num_encoded = encoded_by(asking, contexts, step=1)
    assert num_encoded == 0
    assert [entry.on_host for entry in store._memory.entries.values()] == [True]
    assert store.num_bytes == size
    assert same(found, fresh)


def test_what_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.v_proj.base_layer.weight[3] = float("nan")
    asking = encoder(model, ContextStore(PLENTY, DiskLevel(ContextFiles(tmp_path)), dtype="int8"))
    with pytest.raises(ValueError, match=r"context_cache_dtype='int8'.*values in layer 1 hold NaN"):
        asking.encode([tokens(66, 1)])
    assert asking.store.num_bytes == 0

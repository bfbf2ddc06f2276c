# SPDX-License-Identifier: Apache-2.0
"""Files that anyone may have written: an error or the truth, never a crash, a hang or a file elsewhere."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file, save, save_file

from frozen_peft import merge_adapter
from frozen_peft.merging import export_adapter
from frozen_peft.merging.source import Shard
from frozen_peft.merging.writing import OutputShard, OutputTensor, write_shards
from tests.merging.cases import Case, lora, save_case

FIXTURE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.int64), "c": torch.ones(0, 4)}
WHOLE = save(TENSORS, {"format": "pt"})
SIZES = st.one_of(st.integers(-2, 8), st.integers(2**31, 2**70), st.floats(), st.none(), st.booleans())
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "U8", "F8_E4M3", "F4", "F99", "", 7]),
        "shape": st.lists(st.integers(0, 4) | SIZES, max_size=3),
        "data_offsets": st.lists(st.integers(0, 48) | SIZES, min_size=1, max_size=3),
    },
    optional={"more": st.none()},
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def check(path: Path, content: bytes) -> None:
    """What is read is what the library reads; what it refuses is refused."""
    path.write_bytes(content)
    try:
        expected = {name: (item["dtype"], tuple(item["shape"]), item["data"]) for name, item in deserialize(content)}
    except SafetensorError:
        with pytest.raises(ValueError, match="no whole safetensors file"):
            Shard(path)
        return
    shard = Shard(path)
    found = {}
    for name, entry in shard.tensors.items():
        copied = io.BytesIO()
        shard.copy(name, copied)
        found[name] = (entry.dtype, entry.shape, copied.getvalue())
    assert found == {name: (dtype, shape, bytes(data)) for name, (dtype, shape, data) in expected.items()}


@FIXTURE
@given(position=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255), cut=st.integers(0, 40))
def test_headers_with_a_byte_changed(tmp_path: Path, position: int, value: int, cut: int) -> None:
    content = bytearray(WHOLE)
    content[position] = value
    check(tmp_path / "file", bytes(content[: len(content) - cut]))


@FIXTURE
@given(
    entries=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRIES | JSON, max_size=3),
    num_bytes=st.integers(0, 64),
    padding=st.integers(0, 9),
)
def test_headers_of_any_content(tmp_path: Path, entries: Any, num_bytes: int, padding: int) -> None:
    text = json.dumps(entries).encode() + b" " * padding
    check(tmp_path / "file", len(text).to_bytes(8, "little") + text + bytes(num_bytes))


@FIXTURE
@given(content=st.binary(max_size=64))
def test_files_of_any_content(tmp_path: Path, content: bytes) -> None:
    check(tmp_path / "file", content)


@pytest.mark.parametrize("depth", [100_000])
def test_a_header_that_is_nested_without_end(depth: int, tmp_path: Path) -> None:
    text = b"[" * depth
    check(tmp_path / "file", len(text).to_bytes(8, "little") + text)


@FIXTURE
@given(
    st.lists(
        st.tuples(st.sampled_from(["F32", "BF16", "I64", "U8"]), st.lists(st.integers(0, 4), max_size=3)), max_size=5
    )
)
def test_files_written_are_files_read(tmp_path: Path, tensors: list[tuple[str, list[int]]]) -> None:
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
    named = {
        f"tensor {number}": torch.full(shape, number, dtype=dtypes[dtype])
        for number, (dtype, shape) in enumerate(tensors)
    }
    save_file(named, tmp_path / "source")
    shard = Shard(tmp_path / "source")
    entries = [OutputTensor(name, shard, name, entry.dtype) for name, entry in shard.tensors.items()]
    (tmp_path / "written.safetensors").unlink(missing_ok=True)
    written = OutputShard("written.safetensors", entries, {"format": "pt"})
    assert len(written.header()) % 8 == 0
    write_shards([written], tmp_path, {}, torch.nn.Module())
    assert (tmp_path / "written.safetensors").stat().st_size == written.num_bytes
    found = load_file(tmp_path / "written.safetensors")
    assert found.keys() == named.keys()
    assert all(
        torch.equal(tensor, named[name]) and tensor.dtype == named[name].dtype for name, tensor in found.items()
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    return save_case(Case("llama", lora(), {"num_hidden_layers": 1}), folder)


# fmt: off
FIELDS = [
    "r", "lora_alpha", "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_pattern",
    "layers_to_transform", "rank_pattern", "alpha_pattern", "trainable_token_indices", "fan_in_fan_out", "use_rslora",
    "use_dora", "lora_bias", "bias", "peft_type", "ensure_weight_tying", "init_lora_weights", "use_qalora", "revision",
    "alora_invocation_tokens", "megatron_config", "layer_replication", "base_model_name_or_path", "auto_mapping",
    "peft_version", "lora_dropout", "runtime_config",
]
# fmt: on
NAMES = st.sampled_from(["q_proj", "o_proj", "lm_head", "embed_tokens", "../../x", "/", "", ".", "model.layers.0"])
VALUES = JSON | NAMES | st.lists(NAMES | st.integers(-1, 200), max_size=3) | st.dictionaries(NAMES, JSON, max_size=2)


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@settings(FIXTURE, max_examples=60)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2))
def test_adapter_configurations_of_any_content(made, tmp_path: Path, changes: dict[str, Any]) -> None:
    base, original = made
    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    for folder in (adapter, output, tmp_path / "exported"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    before = snapshot(tmp_path)
    for write in (
        lambda: merge_adapter(adapter, output, base, verify=False),
        lambda: export_adapter(adapter, tmp_path / "exported", "wrapper"),
    ):
        with contextlib.suppress(ValueError, FileNotFoundError):
            write()
    after = snapshot(tmp_path)
    written = ("merged/", "exported/")
    assert {name: time for name, time in after.items() if not name.startswith(written)} == before
    for folder, last in ((output, "merge_report.json"), (tmp_path / "exported", "adapter_config.json")):
        assert not folder.exists() or (folder / last).is_file()
    # Anything left beside the output would be in the way of the next run.
    assert not list(tmp_path.glob(".*"))


OTHER_FILES = ("adapter/base_record.json", "adapter/tokenizer.json", "base/config.json", "base/tokenizer_config.json")


@settings(FIXTURE, max_examples=40)
@given(name=st.sampled_from(OTHER_FILES), content=JSON, data=st.data())
def test_other_files_of_any_content(made, tmp_path: Path, name: str, content: Any, data: st.DataObject) -> None:
    for source in made:
        shutil.rmtree(tmp_path / source.name, ignore_errors=True)
        shutil.copytree(source, tmp_path / source.name)
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    path = tmp_path / name
    if path.is_file():
        # One field of what is there, of any content.
        values = json.loads(path.read_text())
        content = {**values, data.draw(st.sampled_from(sorted(values))): content}
    path.write_text(json.dumps(content))
    before = snapshot(tmp_path)
    with contextlib.suppress(ValueError, FileNotFoundError):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", verify=False)
    after = snapshot(tmp_path)
    assert {name: time for name, time in after.items() if not name.startswith("merged/")} == before
    assert not list(tmp_path.glob(".*"))


@settings(FIXTURE, max_examples=40)
@given(content=JSON | st.dictionaries(st.just("weight_map"), JSON | st.dictionaries(NAMES, NAMES, max_size=3)))
def test_indices_of_any_content(made, tmp_path: Path, content: Any) -> None:
    base, adapter = made
    shutil.rmtree(tmp_path / "base", ignore_errors=True)
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(content))
    before = snapshot(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        merge_adapter(adapter, tmp_path / "merged", tmp_path / "base", verify=False)
    assert snapshot(tmp_path) == before

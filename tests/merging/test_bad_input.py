# SPDX-License-Identifier: Apache-2.0
"""What cannot be merged: an error that says why, and nothing written."""

import fnmatch
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from frozen_peft import merge_adapter
from frozen_peft.adapters import activate_at_invocation
from tests.merging.cases import Case, lora, save_case
from tests.tiny_models import tiny_model
from tests.training.runs import word_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    return save_case(Case("llama", lora()), tmp_path)


def refused(made: tuple[Path, Path], message: str, error: type[Exception] = ValueError, **fields: Any) -> None:
    base, adapter = made
    root = adapter.parent
    before = sorted(path.name for path in root.iterdir())
    with pytest.raises(error, match=message):
        merge_adapter(adapter, root / "merged", base, verify=False, **fields)
    assert sorted(path.name for path in root.iterdir()) == before


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rename(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path, {"format": "pt"})


def test_an_adapter_tensor_without_a_home_is_listed(made) -> None:
    path = made[1] / "adapter_model.safetensors"
    rename(
        path,
        lambda tensors: (
            tensors | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
        ),
    )
    refused(made, r"1 of 17 tensors have no home in the base model: .*layers\.9\.self_attn\.q_proj\.lora_A")


def test_a_tensor_that_is_missing_is_listed(made) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    path = made[1] / "adapter_model.safetensors"
    rename(path, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    refused(made, r"lacks 1 tensors .*layers\.1\.self_attn\.q_proj\.lora_B")


def test_a_base_of_another_size_is_refused(made, tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=48, head_dim=8).save_pretrained(tmp_path / "other")
    refused((tmp_path / "other", made[1]), "size mismatch")


def test_a_base_of_another_architecture_is_refused(made, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "other")
    refused((tmp_path / "other", made[1]), "other|base model")


def test_an_adapter_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base, adapter = save_case(Case("llama", lora(modules_to_save=["lm_head"]), {"vocab_size": 90}), tmp_path)
    shutil.rmtree(base)
    tiny_model("llama").save_pretrained(base)
    refused((base, adapter), "size mismatch|same vocabulary")


def test_a_tokenizer_with_more_tokens_than_the_base_is_refused(made) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"more{number}" for number in range(20)])
    tokenizer.save_pretrained(made[1])
    refused(made, "has a token 'more19' with number 107, and the model has embeddings of 97 tokens")


@pytest.mark.parametrize("how", ["shard", "index", "config"])
def test_a_file_of_the_base_that_is_missing_is_named(how: str, made) -> None:
    name = {"shard": "model-00002-of-00004.safetensors", "index": INDEX, "config": "config.json"}[how]
    (made[0] / name).unlink()
    refused(made, {"shard": f"lacks {name}", "index": "holds no weights", "config": "holds no config.json"}[how])


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001-of-00004.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        3,
        # Names that the output has for something else.
        "merge_report.json",
        "config.json",
        ".safetensors",
        "a" * 300 + ".safetensors",
        "model.bin",
    ],
)
def test_an_index_cannot_point_elsewhere(name: Any, made) -> None:
    index = json.loads((made[0] / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (made[0] / INDEX).write_text(json.dumps(index))
    refused(made, r"no name of a \.safetensors file beside it")


def test_an_index_that_disagrees_with_its_files_is_refused(made) -> None:
    index = json.loads((made[0] / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00004.safetensors"
    (made[0] / INDEX).write_text(json.dumps(index))
    refused(made, r"places `model.layers.9.mlp.up_proj.weight` in model-00001-of-00004.safetensors, and it is in none")


def test_a_report_among_the_weights_is_not_written_over(made) -> None:
    """A shard of that name would be replaced by the report, and half of the weights be gone."""
    index = json.loads((made[0] / INDEX).read_text())
    first = "model-00001-of-00004.safetensors"
    (made[0] / first).rename(made[0] / "merge_report.json")
    index["weight_map"] = {
        tensor: "merge_report.json" if name == first else name for tensor, name in index["weight_map"].items()
    }
    (made[0] / INDEX).write_text(json.dumps(index))
    refused(made, r"'merge_report.json', which is no name of a \.safetensors file")


def test_a_weight_of_integers_is_not_updated(made) -> None:
    path = made[0] / "model-00002-of-00004.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    (path,) = (path for path in made[0].glob("*.safetensors") if name in load_file(path))
    rename(path, lambda tensors: tensors | {name: tensors[name].int()})
    refused(made, f"`{name}` in .* is stored as I32, to which no update can be added")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "x"}, "cannot be read by transformers"),
        ({"num_attention_heads": 0}, "cannot be read by transformers"),
        ({"dtype": "load"}, "cannot be read by transformers"),
        ({"architectures": ["BertForMaskedLM"]}, "transformers makes no model of this LlamaConfig"),
        ({"architectures": ["LlamaModel"]}, "have no home in the base model"),
    ],
)
def test_a_configuration_that_is_no_model_is_refused(fields: dict[str, Any], message: str, made) -> None:
    edit(made[0] / "config.json", **fields)
    refused(made, message)


def test_a_configuration_that_is_nested_without_end_is_refused(made) -> None:
    (made[0] / "config.json").write_text("[" * 100_000)
    refused(made, "cannot be read by transformers")


@pytest.mark.parametrize("named", [["Trainer"], ["pipeline"], ["AutoModelForCausalLM"], [3], "LlamaForCausalLM", None])
def test_a_configuration_that_names_no_model_class_has_the_usual_one(named: Any, made, tmp_path: Path) -> None:
    edit(made[0] / "config.json", architectures=named)
    assert merge_adapter(made[1], tmp_path / "merged", made[0], verify=False)["merged_parameters"] == 8


def test_a_pipe_in_place_of_a_file_is_not_waited_for(made) -> None:
    (made[1] / "adapter_config.json").unlink()
    os.mkfifo(made[1] / "adapter_config.json")
    refused(made, "There is no file .*adapter_config.json")


def test_a_tokenizer_that_cannot_be_read_is_named(made) -> None:
    word_tokenizer().save_pretrained(made[1])
    (made[1] / "tokenizer.json").write_text('{"model": {"vocab": 7}}')
    refused(made, "The tokenizer in .*adapter cannot be read by transformers")


@pytest.mark.parametrize("cut", [1, 4, 9, 200, -1])
def test_a_file_that_was_cut_off_is_refused(cut: int, made) -> None:
    path = made[0] / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refused(made, "model-00001-of-00004.safetensors is no whole safetensors file")


def test_a_pickle_is_refused_with_the_flag_that_allows_it(tmp_path: Path) -> None:
    base, adapter = save_case(Case("llama", lora()), tmp_path, max_shard_size="1GB")
    expected = tmp_path / "expected"
    merge_adapter(adapter, expected, base, verify=False)
    weights, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    refused((base, adapter), "pytorch_model.bin is a pickle.*--allow-pickle")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(factors, adapter / "adapter_model.bin")
    refused((base, adapter), "adapter_model.bin is a pickle.*--allow-pickle")
    merge_adapter(adapter, tmp_path / "merged", base, allow_pickle=True)
    merged, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", expected))
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in merged.items())


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def test_a_pickle_that_runs_code_runs_none(tmp_path: Path, monkeypatch) -> None:
    base, adapter = save_case(Case("llama", lora()), tmp_path, max_shard_size="1GB")
    (base / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Boom()}, base / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    refused((base, adapter), "cannot be read as a pickle of tensors", allow_pickle=True)
    assert not (tmp_path / "owned").exists()


def test_a_base_with_its_own_code_needs_to_be_trusted(made) -> None:
    edit(
        made[0] / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.M"},
    )
    (made[0] / "code.py").write_text("raise SystemExit('ran')\n")
    refused(made, "trust_remote_code")


def test_a_quantized_base_is_refused(made) -> None:
    edit(made[0] / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(made, "holds quantized weights")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"peft_type": None}, "only LORA"),
        ({"alora_invocation_tokens": [3]}, "context_adapters=False"),
        ({"use_qalora": True}, "QALoRA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "replicated layers"),
        ({"init_lora_weights": "pissa"}, "changes the base weights before training"),
        ({"init_lora_weights": 7}, "changes the base weights before training"),
        ({"r": "two"}, "cannot be read by PEFT"),
        ({"r": True}, "cannot be read by PEFT"),
        ({"target_modules": "(("}, "does not fit the base model"),
        ({"target_modules": [{}]}, "cannot be read by PEFT"),
        ({"rank_pattern": {"q_proj": []}}, "cannot be read by PEFT"),
        ({"rank_pattern": {"((": 2}}, "does not fit the base model"),
        ({"r": 5}, "size mismatch"),
        ({"rank_pattern": [2]}, "cannot be read by PEFT"),
        ({"base_model_name_or_path": [3]}, "cannot be read by PEFT"),
        ({"bias": "some"}, "does not fit|cannot be read|no home"),
    ],
)
def test_configurations_that_cannot_be_merged(fields: dict[str, Any], message: str, made) -> None:
    edit(made[1] / "adapter_config.json", **fields)
    refused(made, message)


def test_an_adapter_that_is_off_in_contexts_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    activate_at_invocation(model, [5, 6])
    model.save_pretrained(tmp_path / "adapter")
    refused((tmp_path / "base", tmp_path / "adapter"), "trained with `context_adapters=False` cannot be merged")


def test_an_adapter_that_a_kernel_bypasses_is_refused(tmp_path: Path) -> None:
    made = save_case(Case("granitemoehybrid", lora(target_modules=["q_proj", "out_proj"])), tmp_path)
    refused(made, r"mamba\.out_proj.*without calling the module")


def test_values_that_are_not_finite_are_refused(made) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    path = made[1] / "adapter_model.safetensors"
    rename(path, lambda tensors: tensors | {name: tensors[name] * 1e6})
    refused(made, r"layers\.1\.self_attn\.q_proj\.weight` is not finite after merging, in F16", dtype="fp16")
    rename(path, lambda tensors: tensors | {name: tensors[name] * float("nan")})
    refused(made, "is not finite after merging, in F32")


def test_a_full_disk_is_seen_before_writing(made, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    refused(made, r"0\.00 GB free, and 0\.00 GB are to be written", OSError)


def test_an_output_that_holds_something_is_left_alone(made, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    refused(made, "not an empty folder", FileExistsError)
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"
    (tmp_path / "merged" / "mine.txt").unlink()
    merge_adapter(made[1], tmp_path / "merged", made[0], verify=False)
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["link", "link to a file", "link to nothing", "file"])
def test_what_stands_where_the_output_is_written_is_not_followed(kind: str, made, tmp_path: Path) -> None:
    """The hidden folder is cleared first: a link there would have another folder cleared."""
    hidden, victim = tmp_path / ".merged.unfinished", tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("mine")
    target = {"link": victim, "link to a file": victim / "precious", "link to nothing": tmp_path / "nothing"}
    if kind == "file":
        hidden.write_text("mine")
    else:
        hidden.symlink_to(target[kind])
    refused(made, r"\.merged\.unfinished is in the way: it is no folder", FileExistsError)
    assert (victim / "precious").read_text() == "mine"
    assert sorted(path.name for path in victim.iterdir()) == ["precious"]


def test_an_output_in_no_folder_is_refused(made, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        merge_adapter(made[1], tmp_path / "no" / "merged", made[0], verify=False)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_of_the_hub_only_what_is_merged_is_downloaded(allow_pickle: bool, made, tmp_path: Path, monkeypatch) -> None:
    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("someone/base", "v2")
        files = ["model-00001-of-00004.safetensors", INDEX, "config.json", "chat_template.jinja", "pytorch_model.bin"]
        files += ["consolidated.safetensors", "model.gguf", "original/weights.pth"]
        kept = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)]
        assert kept == files[: 5 if allow_pickle else 4]
        return str(made[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    report = merge_adapter(
        made[1], tmp_path / "merged", "someone/base", revision="v2", verify=False, allow_pickle=allow_pickle
    )
    assert report["base"] == "someone/base"


def test_a_hub_id_that_cannot_be_had_is_named(made, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing' is no folder, and the hub gives none"):
        merge_adapter(made[1], tmp_path / "merged", "nobody/nothing", verify=False)

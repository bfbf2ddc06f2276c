# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a merge, measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.merging.cases import Case, lora, save_case

MEASURE = """
import json, sys
import torch
torch.set_num_threads(1)
from frozen_peft import merge_adapter

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

# Whatever is imported at first use is not memory of the merge.
merge_adapter(sys.argv[4], sys.argv[2] + "-tiny", sys.argv[5], verify=False)
before = status("VmRSS")
# Resets the peak to what is resident now.
open("/proc/self/clear_refs", "w").write("5")
merge_adapter(sys.argv[1], sys.argv[2], sys.argv[3], verify=False)
print(json.dumps({"before": before, "peak": status("VmHWM")}))
"""


def make_base(folder: Path, num_layers: int, layers_per_shard: int) -> tuple[Path, Path]:
    """A bfloat16 checkpoint of 101 MB per layer, and an adapter on all its linear modules."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=num_layers,
        vocab_size=2048,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    config.save_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[int, list[str]] = {}
    for name in model.state_dict():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        shards.setdefault(layer // layers_per_shard, []).append(name)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weight_map = {}
    for number, names in shards.items():
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(
            {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in names}, base / file
        )
        weight_map.update(dict.fromkeys(names, file))
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    factors = {
        name: torch.randn(parameter.shape) * 0.01 for name, parameter in adapted.named_parameters() if "lora_" in name
    }
    adapted.peft_config["default"].save_pretrained(adapter)
    save_file(
        {name.replace(".default", ""): tensor for name, tensor in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    return base, adapter


def measure(folder: Path, num_layers: int, layers_per_shard: int) -> None:
    base, adapter = make_base(folder, num_layers, layers_per_shard)
    shards = [path.stat().st_size for path in base.glob("*.safetensors")]
    tiny_base, tiny_adapter = save_case(Case("llama", lora()), folder / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, adapter, folder / "merged", base, tiny_adapter, tiny_base],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    used = found["peak"] - found["before"]
    mib = 2**20
    print(
        f"{sum(shards) / 1e9:.2f} GB in {len(shards)} shards, the largest {max(shards) / mib:.0f} MiB; peak of the "
        f"process {found['peak'] / mib:.0f} MiB, of the merge {used / mib:.0f} MiB ({used / max(shards):.2f} of the "
        "largest shard)"
    )
    assert len(shards) >= 4
    assert used <= 1.5 * max(shards)
    written = sum(path.stat().st_size for path in (folder / "merged").glob("*.safetensors"))
    assert abs(written - sum(shards)) < 1e5


@pytest.mark.slow
def test_a_merge_of_400_mb_stays_below_one_and_a_half_shards(tmp_path: Path) -> None:
    measure(tmp_path, num_layers=4, layers_per_shard=1)


@pytest.mark.benchmark
@pytest.mark.long
def test_a_merge_of_2_gb_stays_below_one_and_a_half_shards(tmp_path: Path) -> None:
    measure(tmp_path, num_layers=20, layers_per_shard=4)

# SPDX-License-Identifier: Apache-2.0
"""What a run writes of itself: settings that give the same run, versions, and the memory it took."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from frozen_peft.cli.recipe_parser import RecipeParser
from frozen_peft.report.run_record import PeakMemory, versions, write_recipe

SECRET = "hf_abcdefghij"


def parsed(arguments: list[str]) -> dict[str, Any]:
    groups = RecipeParser().parse(arguments)
    return {
        field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group) if field.init
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "given.yaml"
    path.write_text(
        "model_name_or_path: demo\ndataset_name: demo\ntier: 2\nlearning_rate: 2.0e-5\nlora_roles: [query, gate]\n"
        "model_init_kwargs: {device_map: cpu}\nlogging_steps: 3\nseed: 7\nbf16: false\n"
    )
    return path


def test_a_written_recipe_gives_the_same_settings(recipe: Path, tmp_path: Path) -> None:
    arguments = [str(recipe), "--seed", "8", "--optim=sgd", "--lora_roles", "query", "beta", "--no_use_peft"]
    arguments += [
        "--chat_template_path",
        "ä: {x}",
        "--output_dir",
        str(tmp_path / "out"),
        "--gradient_checkpointing",
        "false",
    ]
    parser = RecipeParser()
    parser.parse(arguments)
    write_recipe(tmp_path / "recipe.yaml", parser.given(arguments))
    expected, found = parsed(arguments), parsed([str(tmp_path / "recipe.yaml")])
    assert found["seed"] == 8
    assert found["lora_roles"] == ["query", "beta"]
    assert found["use_peft"] is False
    changing = {"logging_dir", "run_name"}
    different = {name for name in expected if found[name] != expected[name]} - changing
    assert different == set()


def test_only_what_was_given_is_written(recipe: Path, tmp_path: Path) -> None:
    parser = RecipeParser()
    arguments = [str(recipe), "--output_dir", "out"]
    parser.parse(arguments)
    given = parser.given(arguments)
    assert given == yaml.safe_load(recipe.read_text()) | {"output_dir": "out"}
    write_recipe(tmp_path / "recipe.yaml", given)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == given


def test_a_token_is_never_written(recipe: Path, tmp_path: Path) -> None:
    parser = RecipeParser()
    arguments = [str(recipe), "--hub_token", SECRET, "--output_dir", "out"]
    arguments += ["--model_init_kwargs", f'{{"token": "{SECRET}", "device_map": "cpu"}}']
    parser.parse(arguments)
    given = parser.given(arguments)
    assert given["hub_token"] == SECRET
    write_recipe(tmp_path / "recipe.yaml", given)
    text = (tmp_path / "recipe.yaml").read_text()
    assert SECRET not in text
    assert "# Secret, and so to be given again: model_init_kwargs.token, hub_token\n" in text
    assert yaml.safe_load(text)["model_init_kwargs"] == '{"device_map": "cpu"}'


def test_versions_name_what_is_installed() -> None:
    import torch
    import transformers

    found = versions()
    assert found["torch"]
    assert torch.__version__.startswith(found["torch"])
    assert found["transformers"] == transformers.__version__
    assert set(found) == {"frozen_peft", "torch", "transformers", "trl", "peft", "bitsandbytes", "python", "device"}
    assert found["device"]


@pytest.mark.parametrize("mebibytes", [64, 160])
def test_the_peak_is_that_of_what_was_held_since(mebibytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # A larger peak before it, which must not count.
    np.ones(300 << 20, dtype=np.uint8)
    memory = PeakMemory()
    held = np.ones(mebibytes << 20, dtype=np.uint8)
    del held
    np.ones(16 << 20, dtype=np.uint8)
    found = memory.read()
    assert found["how"] == "rss"
    assert found["peak_bytes_above_model"] == pytest.approx(mebibytes << 20, abs=8 << 20)
    assert found["peak_bytes"] > found["peak_bytes_above_model"]


def test_where_no_peak_can_begin_only_a_new_one_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("frozen_peft.report.run_record._CLEAR", tmp_path / "no" / "file")
    held = np.ones(300 << 20, dtype=np.uint8)
    del held
    memory = PeakMemory()
    assert memory.read()["peak_bytes_above_model"] is None
    resident = memory._start
    held = np.ones(2 * max(memory._peak_before - resident, 1 << 20) + (64 << 20), dtype=np.uint8)
    size = held.nbytes
    del held
    assert memory.read()["peak_bytes_above_model"] == pytest.approx(size, abs=16 << 20)

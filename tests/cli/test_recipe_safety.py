# SPDX-License-Identifier: Apache-2.0
"""A recipe from anywhere gives a run or an error, and does nothing else."""

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frozen_peft import FrozenContextConfig
from frozen_peft.cli import main
from frozen_peft.cli.recipe_parser import RecipeParser
from frozen_peft.utils.recipe_files import read_recipe
from tests.tiny_models import tiny_model
from tests.training.runs import word_tokenizer

FIELDS = sorted(RecipeParser().fields)
SECRET = "hf_abcdefghij"


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def parse(folder: Path, text: str | bytes) -> tuple[Any, ...] | str:
    """What a recipe says, or the message of its error; anything else fails the test."""
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    environment, before = dict(os.environ), files(folder)
    try:
        found: tuple[Any, ...] | str = RecipeParser().parse([str(path)])
    except (ValueError, NotImplementedError, OSError) as error:
        found = str(error)
        assert found
    assert files(folder) == before
    assert {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} == {
        name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"
    }
    return found


def quick(max_examples: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=max_examples, deadline=5000, suppress_health_check=checks, derandomize=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=8),
    st.dates(),
    st.sampled_from(["../../out", "/dev/null", "~", "", "a" * 300, "\x00", "${HOME}", "1e9999", "auto", "all"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)


# TRL warns of fields of its own that will go.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=4))
@quick(40)
def test_any_values_of_known_fields(tmp_path: Path, values: dict[str, Any]) -> None:
    parse(tmp_path, yaml.safe_dump(values))


@given(st.text(max_size=80) | st.binary(max_size=80) | st.text(alphabet="a: -[]{}&*!|>'\"\n#?,<1", max_size=60))
@quick(100)
def test_any_text(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    try:
        values, lines = read_recipe(path)
    except ValueError as error:
        message = str(error)
    else:
        assert values.keys() == lines.keys()
        return
    assert message.startswith(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\n", "line 2: not valid YAML: a recipe has no aliases"),
        ("[" * 5000, "not valid YAML: maximum recursion depth exceeded"),
        ("lora_r: " + "{a: " * 5000, "not valid YAML: maximum recursion depth exceeded"),
        ("lora_r: \x01", "not valid YAML: unacceptable character"),
        (b"lora_r: \xff", "not valid YAML: 'utf-8' codec"),
        ("run_name: 2001-99-99", "not valid YAML: month must be"),
        ("1: 2", "line 1: a field's name is text, got '1'"),
        ("true: 2", "line 1: a field's name is text, got 'true'"),
        ("<<: {lora_r: 4}", "line 1: a field's name is text, got '<<'"),
        ("[a]: 2", "line 1: "),
        ("env: {HF_ENDPOINT: nowhere}", "line 1: `env`: a recipe sets no environment variables"),
        (f"hub_token: [{SECRET}, true]", "line 1: `hub_token` does not fit; its value is secret and not shown"),
        ("output_dir: !!python/name:os.system", "line 1: not valid YAML"),
    ],
)
def test_recipes_that_would_do_harm(text: str | bytes, message: str, tmp_path: Path) -> None:
    found = parse(tmp_path, text)
    assert isinstance(found, str)
    assert found.startswith(f"{tmp_path / 'recipe.yaml'}")
    assert message in found
    assert SECRET not in found


def test_no_field_that_holds_a_token_is_shown() -> None:
    names = {field.name for field in dataclasses.fields(FrozenContextConfig) if field.name.endswith("_token")}
    assert names - {"eos_token", "pad_token"} == {"hub_token"}


def test_the_hub_token_is_not_saved_with_the_weights(tmp_path: Path) -> None:
    config = FrozenContextConfig(str(tmp_path), hub_token=SECRET, bf16=False, use_cpu=True)
    assert SECRET.encode() not in pickle.dumps(config)
    assert SECRET not in str(config)
    assert SECRET not in config.to_json_string()
    assert config.hub_token == SECRET


def test_code_beside_a_dataset_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("data.py", "__init__.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'touched')!r}, 'w').close()")
    (folder / "rows.pkl").write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / "touched").encode() + b"\ntR.")
    for name in (folder, folder / "data.py", folder / "rows.pkl"):
        arguments = ["--model_name_or_path", str(tmp_path), "--dataset_name", str(name)]
        assert main(["train", *arguments, "--output_dir", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin"])
@pytest.mark.parametrize("field", ["model_name_or_path", "resume"])
def test_weights_that_are_pickles_are_refused(
    name: str, field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / name).write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / "touched").encode() + b"\ntR.")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    fields = {"model_name_or_path": str(tmp_path), "dataset_name": "rows.jsonl"} | {field: str(folder)}
    arguments = [argument for key, value in fields.items() for argument in (f"--{key}", value)]
    assert main(["train", *arguments, "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"{folder / name} is a pickle" in message
    assert "`allow_pickle: true`" in message
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("allowed", [False, True])
def test_a_pickled_base_needs_the_flag(allowed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, samples = tmp_path / "base", tmp_path / "rows.jsonl"
    model = tiny_model("llama")
    model.save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    samples.write_text('{"prompt": "w1 w2 w3", "completion": " w4 w5"}\n' * 2)
    arguments = [
        "--model_name_or_path",
        str(base),
        "--dataset_name",
        str(samples),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    arguments += ["--max_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    arguments += ["--allow_pickle", "true"] if allowed else []
    assert main(["train", *arguments]) == (0 if allowed else 2)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() == allowed

# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft recipes`, and recipes by name wherever a command takes one."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from frozen_peft.cli import main
from frozen_peft.cli.recipe_parser import RecipeParser
from frozen_peft.demo import CHECKPOINT, model_source
from frozen_peft.utils.recipe_files import find_recipe, shipped_files, shipped_recipes

SOURCE = Path(__file__).parents[2] / "recipes"
EVERY = sorted(path for path in SOURCE.rglob("*") if path.suffix in (".yaml", ".py"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_of_the_folder_ships_under_a_name_of_its_own() -> None:
    assert sorted(shipped_files().values()) == EVERY
    assert set(shipped_recipes()) == {path.stem for path in SOURCE.glob("*.yaml")}


def test_the_list_says_in_one_line_what_each_is_for(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, path in shipped_files().items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        sentence = line.strip().removeprefix(name).strip()
        # The header's own words, whole.
        start = path.read_text(encoding="utf-8").replace("\n# ", " ")
        assert sentence in start
        assert sentence.endswith(".")
        assert len(line) <= 130, line


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_printed_recipe_is_the_file_to_the_byte(path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    (name,) = [name for name, shipped in shipped_files().items() if shipped == path]
    assert main(["recipes", name]) == 0
    captured = capsysbinary.readouterr()
    assert captured.out == path.read_bytes()
    assert captured.err == b""


def test_a_name_that_is_none_lists_those_that_are(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "tier9"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(name in captured.err for name in shipped_files())


@pytest.mark.parametrize("command", ["train", "inspect", "plan"])
def test_a_recipe_that_is_neither_file_nor_name(
    command: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "recipes/tier2_behaviour.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"frozen-peft {command}: no recipe recipes/tier2_behaviour.yaml: it is neither a file")
    assert all(name in said for name in shipped_recipes())
    assert said.endswith("did you mean tier2_behavior?\n")


@pytest.mark.parametrize("name", ["minimal.py", "minimal", "accelerate/ddp", "ddp", ""])
def test_what_ships_and_is_no_recipe_of_train_is_refused(name: str, elsewhere: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a file"):
        find_recipe(name)


def test_a_name_gives_the_recipe_that_ships(elsewhere: Path) -> None:
    (elsewhere / "tier1_corrections").mkdir()  # a folder is no recipe
    by_name, by_file = (
        RecipeParser().parse([recipe, "--lora_r", "3"])
        for recipe in ("tier1_corrections", str(SOURCE / "tier1_corrections.yaml"))
    )
    assert by_name[:3] == by_file[:3]
    assert by_name[2].lora_r == 3
    given = RecipeParser().given(["tier1_corrections", "--lora_r", "3"])
    assert given["tier"] == 1
    assert given["lora_r"] == 3


def test_a_file_of_that_name_wins(elsewhere: Path) -> None:
    (elsewhere / "tier2_behavior").write_text("lora_r: 5\noutput_dir: mine\n")
    parser = RecipeParser()
    _, _, adapter, config, _ = parser.parse(["tier2_behavior"])
    assert adapter.lora_r == 5
    assert config.output_dir == "mine"
    assert parser.given(["tier2_behavior"]) == {"lora_r": 5, "output_dir": "mine"}


@pytest.mark.parametrize("ending", [".yaml", ".yml"])
def test_an_edited_copy_is_not_passed_over(ending: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`frozen-peft recipes tier2_reuse > tier2_reuse.yaml`, edited, and then `train tier2_reuse`."""
    copy, shipped = elsewhere / f"tier2_reuse{ending}", SOURCE / "tier2_reuse.yaml"
    copy.write_bytes(shipped.read_bytes())
    assert find_recipe("tier2_reuse").samefile(shipped)
    copy.write_bytes(shipped.read_bytes().replace(b"lora_r: 16", b"lora_r: 8"))
    assert main(["train", "tier2_reuse"]) == 2
    assert f"and tier2_reuse{ending} lies here and is another" in capsys.readouterr().err
    assert find_recipe(copy.name).samefile(copy)


def test_plan_takes_a_name(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    num_parameters = sum(weight.numel() for weight in load_file(CHECKPOINT / "model.safetensors").values())
    assert main(["plan", "tier2_behavior"]) == 0
    assert f"demo: {num_parameters:,} parameters" in capsys.readouterr().out


def test_another_model_of_that_name_is_not_passed_over(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "demo").mkdir()  # what `frozen-peft demo --output demo` makes is no model
    assert model_source("demo") == str(CHECKPOINT)
    assert model_source("./demo") == "./demo"
    (elsewhere / "demo" / "config.json").write_text("{}")
    for command in (["plan", "--model", "demo"], ["train", "tier2_behavior"]):
        assert main(command) == 2
        assert "demo is the model that ships" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""Parsing of recipes: what wins, and what is refused with which words."""

from pathlib import Path

import pytest

from frozen_peft.cli.recipe_parser import RecipeParser
from frozen_peft.utils.recipe_files import read_recipe


@pytest.fixture(scope="module")
def recipe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture
def parser() -> RecipeParser:
    # Not shared: TrlParser writes a recipe's values into the parser's defaults.
    return RecipeParser()


def recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_recipe_wins_over_default_and_command_line_over_recipe(parser: RecipeParser, recipe_dir: Path) -> None:
    path = recipe(
        recipe_dir,
        "model_name_or_path: base\nlora_r: 4\nlora_alpha: 9\nlearning_rate: 1e-3\nuse_peft: false\n"
        "gradient_horizon: 5\nlora_roles: [query, output]\noutput_dir: out\n",
    )
    model, _, adapter, config, _ = parser.parse([path, "--lora_r", "8", "--gradient_horizon", "-1"])
    assert model.model_name_or_path == "base"
    assert adapter.lora_r == 8
    assert adapter.lora_alpha == 9
    assert adapter.lora_dropout == 0.0
    assert adapter.use_peft is False
    assert adapter.lora_roles == ["query", "output"]
    assert config.gradient_horizon == -1
    assert config.learning_rate == 1e-3


def test_defaults_are_those_of_the_design(parser: RecipeParser) -> None:
    _, _, adapter, config, _ = parser.parse(["--output_dir", "out"])
    assert adapter.use_peft is True
    assert adapter.lora_preset == "response"
    assert config.max_length is None
    assert config.bf16 is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r: 4\nlernin_rate: 1\n", "line 2: unknown field `lernin_rate`; did you mean `learning_rate`?"),
        ("gradient_horzon: 4\n", "line 1: unknown field `gradient_horzon`; did you mean `gradient_horizon`?"),
        ("zzzzzz: 4\n", "line 1: unknown field `zzzzzz`; frozen-peft train --help-all lists the fields"),
        ("lora_r: 4\n\nlora_r: 5\n", "line 3: `lora_r` is already given on line 1"),
        ("lora_r: four\n", "line 1: `lora_r` takes int, got 'four'"),
        ("lora_r: 1.5\n", "line 1: `lora_r` takes int, got 1.5"),
        ("lora_r: [1, 2]\n", "line 1: `lora_r` takes one value, got the list [1, 2]"),
        ("use_peft: perhaps\n", "line 1: `use_peft` takes true or false, got 'perhaps'"),
        ("verify_context: sometimes\n", "line 1: `verify_context` takes one of first_batch, always, never"),
        ("save_strategy: no\n", "line 1: `save_strategy` takes"),
        ("lora_r: 4\n  lora_alpha: 5\n", "line 2: not valid YAML"),
        ("- lora_r\n", "a recipe is a mapping of fields to values, got list"),
        ("", "a recipe is a mapping of fields to values, got NoneType"),
    ],
)
def test_recipes_that_are_refused(parser: RecipeParser, recipe_dir: Path, text: str, message: str) -> None:
    path = recipe(recipe_dir, text)
    with pytest.raises(ValueError) as refusal:
        parser.parse([path])
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(path)


def test_yaml_is_read_as_data_only(parser: RecipeParser, recipe_dir: Path) -> None:
    target = recipe_dir / "touched"
    path = recipe(recipe_dir, f"output_dir: !!python/object/apply:os.mkdir ['{target}']\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        parser.parse([path])
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lernin_rate", "1"], "command line: unknown field `lernin_rate`; did you mean `learning_rate`?"),
        (["--gradient-horzon=1"], "command line: unknown field `gradient_horzon`; did you mean `gradient_horizon`?"),
        (["--lora", "1"], "command line: unknown field `lora`"),
        (["--lora_r", "four"], "invalid int value: 'four'"),
    ],
)
def test_command_lines_that_are_refused(parser: RecipeParser, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parser.parse(["--output_dir", "out", *arguments])
    assert message in str(refusal.value)


def test_a_second_recipe_is_refused(parser: RecipeParser, recipe_dir: Path) -> None:
    path = recipe(recipe_dir, "output_dir: out\n")
    with pytest.raises(ValueError, match="at most one recipe"):
        parser.parse([path, "other.yaml"])


def test_read_recipe_gives_values_and_lines(recipe_dir: Path) -> None:
    path = recipe(recipe_dir, "# a comment\nlora_r: 4\noutput_dir: out\n")
    assert read_recipe(path) == ({"lora_r": 4, "output_dir": "out"}, {"lora_r": 2, "output_dir": 3})


def test_help_begins_with_our_fields_and_stays_short() -> None:
    brief, full = RecipeParser().format_help(), RecipeParser(every_field=True).format_help()
    assert len(brief.splitlines()) < 130
    assert len(full.splitlines()) > 200
    for name in ("gradient_horizon", "context_adapters", "prefill_chunk_size", "verify_context", "max_length"):
        assert brief.index(f"--{name} ") < brief.index("--model_name_or_path ")
    assert "--help-all" in brief
    assert "--adam_beta1 " in full
    assert "--adam_beta1 " not in brief


def test_every_own_field_has_a_help_text(parser: RecipeParser) -> None:
    silent = [name for name, action in parser.fields.items() if not action.help]
    assert not silent


@pytest.mark.parametrize(("value", "kept"), [("system", "system"), ("64", "64")])
def test_what_a_context_keeps_of_its_start_is_a_word_or_a_number(value: str, kept: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"keep_context_start: {value}\nmax_context_length: 100\noutput_dir: {tmp_path}\n")
    assert RecipeParser().parse([str(recipe)])[3].keep_context_start == kept
    recipe.write_text(f"max_context_length: 100\noutput_dir: {tmp_path}\n")
    assert RecipeParser().parse([str(recipe), "--keep_context_start", value])[3].keep_context_start == kept

# SPDX-License-Identifier: Apache-2.0
"""What a user has after `pip install`, far from any checkout. `tests/demo` runs the demo there."""

import json
import tomllib
from pathlib import Path

import pytest

from frozen_peft.cli import COMMANDS
from tests.installed_package import ROOT, InstalledPackage

pytestmark = pytest.mark.slow

EVERYTHING = """
import importlib, pkgutil, sys
import frozen_peft
from frozen_peft.cli import COMMANDS, main

for module in pkgutil.walk_packages(frozen_peft.__path__, "frozen_peft."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for command in COMMANDS:
    print("::", command)
    try:
        sys.exit(main([command, "--help"]))
    except SystemExit as end:
        assert end.code == 0, command
"""


def test_it_has_what_it_asks_for_and_nothing_for_development(
    installed_package: InstalledPackage, tmp_path: Path
) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = {text.partition(">=")[0].partition("[")[0] for text in extras["dev"]} - {"transformers"}
    script = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    there = set(installed_package.run("python", "-c", script, cwd=tmp_path).stdout.lower().split())
    assert {"frozen-peft", "transformers", "bitsandbytes"} <= there
    assert names >= {"pytest", "openai"}
    assert not names & there


def test_every_module_imports_and_every_command_explains_itself(
    installed_package: InstalledPackage, tmp_path: Path
) -> None:
    done = installed_package.run("python", "-c", EVERYTHING, cwd=tmp_path)
    explained = dict(part.split("\n", 1) for part in done.stdout.split(":: ")[1:])
    assert list(explained) == list(COMMANDS)
    for command, text in explained.items():
        assert f"usage: frozen-peft {command} " in text
    # Nothing that a newcomer has to read past, of our own or of what we build on.
    assert done.stderr == ""
    assert installed_package.run("frozen-peft", cwd=tmp_path).stderr == ""


def test_the_recipes_are_there(installed_package: InstalledPackage, tmp_path: Path) -> None:
    for path in (path for path in (ROOT / "recipes").rglob("*") if path.suffix in (".yaml", ".py")):
        name = path.relative_to(ROOT / "recipes")
        name = name if path.suffix == ".py" else name.with_suffix("")
        assert installed_package.run("frozen-peft", "recipes", str(name), cwd=tmp_path).stdout == path.read_text()


def test_a_recipe_trains_by_its_name(installed_package: InstalledPackage, tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "today we have pine."}, {"role": "user", "content": "use oak."}],
        "completion": [{"role": "assistant", "content": "ok, using oak."}],
    }
    (tmp_path / "rows.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    arguments = ["--dataset_name", "rows.jsonl", "--eval_dataset_name", "rows.jsonl", "--max_steps", "2"]
    arguments += ["--gradient_accumulation_steps", "1", "--output_dir", "run", "--max_example_tokens", "4"]
    arguments += ["--group_by_context", "false"]  # which says that it has no use with four rows
    done = installed_package.run("frozen-peft", "train", "tier2_behavior", *arguments, cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    assert done.stderr == ""

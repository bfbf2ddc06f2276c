# SPDX-License-Identifier: Apache-2.0
"""Puts the recipes, whose source is the top-level folder, into the package; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

SOURCE, TARGET = Path("recipes"), Path("frozen_peft") / "recipes"


class BuildRecipes(Command):
    """Copies `recipes/` to `frozen_peft/recipes/` in what is built: wheels, sdists and editable installs know it."""

    description = "copy the recipes into the package"
    user_options = []

    def initialize_options(self) -> None:
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        for built, source in self.get_output_mapping().items():
            self.mkpath(str(Path(built).parent))
            self.copy_file(source, built)

    def get_source_files(self) -> list[str]:
        return sorted(str(path) for ending in ("yaml", "py") for path in SOURCE.rglob(f"*.{ending}"))

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping())

    def get_output_mapping(self) -> dict[str, str]:
        return {
            str(Path(self.build_lib) / TARGET / Path(source).relative_to(SOURCE)): source
            for source in self.get_source_files()
        }


class Build(build):
    """The usual build, and the recipes."""

    sub_commands = [*build.sub_commands, ("build_recipes", None)]


setup(cmdclass={"build": Build, "build_recipes": BuildRecipes})

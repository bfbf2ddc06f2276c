# SPDX-License-Identifier: Apache-2.0
"""The files of a run's folder, read as far as they are there and can be read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from frozen_peft.report.secrecy import without_secrets
from frozen_peft.report.values import Found

__all__ = ["EXPECTED", "RunFolder", "read_run_folder"]

# What a run's folder may hold, and what writes it.
EXPECTED = {
    "trainer_state.json": "`frozen-peft train`, at its end and in every checkpoint",
    "eval_before_results.json": "`frozen-peft train` with held-out samples, before training",
    "eval_results.json": "`frozen-peft train` with held-out samples, after training",
    "recipe.yaml": "`frozen-peft train`, at its start",
    "versions.json": "`frozen-peft train`, at its start",
    "memory.json": "`frozen-peft train`, after training",
    "plan.json": "`frozen-peft train`, from the planner",
    "gradient_flow.json": "`frozen-peft inspect RUN_DIR/recipe.yaml`",
    "examples.json": "`frozen-peft train` with `num_examples` above 0",
    "evaluation.json": "`frozen-peft evaluate ... --output RUN_DIR/evaluation.json`",
    "merge_report.json": "`frozen-peft merge RUN_DIR RUN_DIR/merged`",
}
_STATE, _EVALUATION, _MERGE = "trainer_state.json", "evaluation.json", "merge_report.json"
# By name or, since evaluation may be written under any, by what they hold.
_JSON_FILES = tuple(name for name in EXPECTED if name.endswith(".json") and name not in (_STATE, _EVALUATION, _MERGE))
_EVALUATION_KEYS = {"results", "measures", "confidence"}
# A file beyond this is not what these commands write.
_MAX_BYTES = 256 * 2**20


@dataclass(eq=False)
class RunFolder:
    """What was found.

    Attributes:
        path: The folder.
        files: Content of each file that is there once, by its name in `EXPECTED`.
        evaluations: Content of each file of `frozen-peft evaluate`, by the name that it has.
        merges: Content of each merge report, by its path within the folder.
        recipe: The recipe's text, without secrets; None where there is none.
        missing: Names in `EXPECTED` that are not there.
        problems: What is there and cannot be read, or is not as expected, in sentences.
    """

    path: Path
    files: dict[str, Found] = field(default_factory=dict)
    evaluations: dict[str, Found] = field(default_factory=dict)
    merges: dict[str, Found] = field(default_factory=dict)
    recipe: str | None = None
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_run_folder(path: Path, evaluations: Sequence[Path] = (), merges: Sequence[Path] = ()) -> RunFolder:
    """Reads what there is.

    Args:
        path: `output_dir` of a run.
        evaluations: Files of `frozen-peft evaluate` beside those in the folder.
        merges: Merge reports beside those in it, or folders that hold one.

    Raises:
        FileNotFoundError: There is no such folder, or no file that was named.
        NotADirectoryError: It is a file.
    """
    if not path.exists():
        raise FileNotFoundError(f"no folder {path} (looked in {Path.cwd()})")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; give the folder of a run, its `output_dir`")
    run = RunFolder(path)
    for name in _JSON_FILES:
        _keep(run, name, path / name)
    _read_state(run)
    for file in sorted(path.glob("*.json")):
        if file.name == _EVALUATION or file.name not in EXPECTED:
            _read_evaluation(run, file, file.name, asked=file.name == _EVALUATION)
    for file in sorted({*path.glob(_MERGE), *path.glob(f"*/{_MERGE}")}):
        _read_merge(run, file, str(file.relative_to(path)))
    for file in evaluations:
        _read_evaluation(run, _there(file), str(file), asked=True)
    for file in merges:
        _read_merge(run, _there(file / _MERGE if file.is_dir() else file), str(file))
    _read_recipe(run)
    found = {*run.files, *([_EVALUATION] if run.evaluations else []), *([_MERGE] if run.merges else [])}
    run.missing = [name for name in EXPECTED if name not in found and not (path / name).exists()]
    return run


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (looked in {Path.cwd()})")
    return path


def _keep(run: RunFolder, name: str, path: Path) -> None:
    if path.is_file() and (found := _read_json(run, path, name)) is not None:
        run.files[name] = found


def _read_state(run: RunFolder) -> None:
    """The trainer's state: the run's own, or the last checkpoint's where it did not come to its end."""
    _keep(run, _STATE, run.path / _STATE)
    if _STATE in run.files:
        return
    steps = {
        int(number): folder
        for folder in run.path.glob("checkpoint-*")
        if (number := folder.name.removeprefix("checkpoint-")).isdecimal() and (folder / _STATE).is_file()
    }
    if steps:
        last = steps[max(steps)]
        _keep(run, _STATE, last / _STATE)
        run.problems.append(
            f"{_STATE} is read from {last.name}, the last checkpoint: the run has none of its own, so it was stopped "
            "before its end, or is still going on"
        )


def _read_evaluation(run: RunFolder, path: Path, name: str, *, asked: bool) -> None:
    """Keeps a file that `frozen-peft evaluate` wrote; any other is a problem only where one was asked for."""
    problems = len(run.problems)
    found = _read_json(run, path, name)
    if found is not None and isinstance(found.value, dict) and found.value.keys() >= _EVALUATION_KEYS:
        run.evaluations[name] = found
    elif not asked:
        del run.problems[problems:]
    elif found is not None:
        run.problems.append(f"{name}: not what `frozen-peft evaluate --output` writes")


def _read_merge(run: RunFolder, path: Path, name: str) -> None:
    found = _read_json(run, path, name)
    if found is not None:
        run.merges[name] = found


def _read_json(run: RunFolder, path: Path, name: str) -> Found | None:
    """A file's content; None, and a problem, where it has none that can be read."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES >> 20} MiB")
        return Found(json.loads(path.read_bytes().decode("utf-8")), name)
    except json.JSONDecodeError as error:
        run.problems.append(f"{name}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}")
    except (ValueError, RecursionError, OSError) as error:
        run.problems.append(f"{name}: cannot be read: {_reason(error)}")
    return None


def _read_recipe(run: RunFolder) -> None:
    path = run.path / "recipe.yaml"
    if not path.is_file():
        return
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no mapping of fields to values")
        kept, left_out = without_secrets(values)
        run.recipe = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        run.problems.append(f"recipe.yaml: cannot be read: {_reason(error)}")
        return
    run.files["recipe.yaml"] = Found(kept, "recipe.yaml")
    if left_out:
        run.problems.append(f"recipe.yaml: not shown, since they may be secret: {', '.join(left_out)}")


def _reason(error: Any) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

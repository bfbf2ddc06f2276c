# SPDX-License-Identifier: Apache-2.0
"""The files of a run's folder, read as far as they are there and can be read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from frozen_peft.report.secrecy import without_secrets

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
# What tells an evaluation, which may be written under any name.
_EVALUATION_KEYS = {"results", "measures", "confidence"}


@dataclass
class RunFolder:
    """What was found.

    Attributes:
        path: The folder.
        files: Content of each file by its name in `EXPECTED`; of `evaluation.json` and `merge_report.json`, of which
            there may be several, the content of each by the name or path that it has. The recipe is without secrets.
        missing: Names in `EXPECTED` that are not there.
        problems: What is there and cannot be read, or is not as expected, in sentences.
    """

    path: Path
    files: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def why_absent(self, name: str) -> str:
        """A sentence on a file that is not in `files`."""
        state = "is not there" if name in self.missing else "cannot be read"
        return f"{name} {state}. It is written by {EXPECTED[name]}."


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
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file; give the folder of a run, its `output_dir`")
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path} (looked in {Path.cwd()})")
    run = RunFolder(path)
    found: dict[str, Any] = {}
    for name in EXPECTED:
        file = _last_state(run) if name == _STATE else path / name
        if file.is_file() and name not in (_EVALUATION, _MERGE):
            found[name] = _read(run, file, name)
    found |= {_EVALUATION: _evaluations(run, evaluations), _MERGE: _merges(run, merges)}
    run.files = {name: content for name, content in found.items() if content is not None}
    run.missing = [name for name in EXPECTED if name not in run.files and not (path / name).exists()]
    return run


def _last_state(run: RunFolder) -> Path:
    """The trainer's state: the run's own, or the last checkpoint's where it did not come to its end."""
    own = run.path / _STATE
    steps = {
        int(number): file
        for file in run.path.glob(f"checkpoint-*/{_STATE}")
        if (number := file.parent.name.removeprefix("checkpoint-")).isdecimal()
    }
    if own.is_file() or not steps:
        return own
    last = steps[max(steps)]
    run.problems.append(
        f"{_STATE} is read from {last.parent.name}, the last checkpoint: the run has none of its own, so it was "
        "stopped before its end, or is still going on"
    )
    return last


def _evaluations(run: RunFolder, more: Sequence[Path]) -> dict[str, Any] | None:
    """What `frozen-peft evaluate` wrote; any other file is a problem only where one was asked for."""
    asked = {str(file): _there(file) for file in more}
    if (run.path / _EVALUATION).is_file():
        asked[_EVALUATION] = run.path / _EVALUATION
    others = {file.name: file for file in sorted(run.path.glob("*.json")) if file.name not in EXPECTED}
    found = {}
    for name, file in {**others, **asked}.items():
        problems = run.problems.copy()
        content = _read(run, file, name)
        if isinstance(content, dict) and content.keys() >= _EVALUATION_KEYS:
            found[name] = content
        elif name not in asked:
            run.problems = problems
        elif content is not None:
            run.problems.append(f"{name}: not what `frozen-peft evaluate --output` writes")
    return found or None


def _merges(run: RunFolder, more: Sequence[Path]) -> dict[str, Any] | None:
    """Merge reports in the folder, in the folders in it, and elsewhere."""
    files = {str(file.relative_to(run.path)): file for place in ("", "*/") for file in run.path.glob(place + _MERGE)}
    files |= {str(place): _there(place / _MERGE if place.is_dir() else place) for place in more}
    found = {name: content for name, file in files.items() if (content := _read(run, file, name)) is not None}
    return found or None


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (looked in {Path.cwd()})")
    return path


def _read(run: RunFolder, path: Path, name: str) -> Any:
    """A file's content; None, and a problem, where it has none that can be read."""
    try:
        text = path.read_bytes().decode("utf-8")
        return _without_secrets(run, yaml.safe_load(text)) if path.suffix == ".yaml" else json.loads(text)
    except json.JSONDecodeError as error:
        run.problems.append(f"{name}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}")
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        run.problems.append(f"{name}: cannot be read: {reason}")
    return None


def _without_secrets(run: RunFolder, recipe: Any) -> dict[str, Any]:
    if not isinstance(recipe, dict):
        raise ValueError("it is no mapping of fields to values")
    kept, left_out = without_secrets(recipe)
    if left_out:
        run.problems.append(f"recipe.yaml: not shown, since they may be secret: {', '.join(left_out)}")
    return kept

# SPDX-License-Identifier: Apache-2.0
"""The sections of the page in their order, each of them there whatever is missing."""

from collections.abc import Callable

import yaml

from frozen_peft.report.behavior_sections import examples_section, gradient_section, merged_section, probes_section
from frozen_peft.report.blocks import Section, Table
from frozen_peft.report.run_folder import EXPECTED, RunFolder
from frozen_peft.report.training_sections import loss_section, memory_section, time_section, tokens_section

__all__ = ["build_sections"]

_LOSS_FILES = ("trainer_state.json", "eval_before_results.json", "eval_results.json")
# What a file raises that holds something else than it should.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def build_sections(run: RunFolder) -> list[Section]:
    """All sections; adds to the run's problems."""
    builders: tuple[tuple[Section, Callable[[RunFolder, Section], None]], ...] = (
        (Section("loss", "Loss", _LOSS_FILES), loss_section),
        (Section("time", "Where the time went", ("trainer_state.json",)), time_section),
        (Section("tokens", "Context tokens", ("trainer_state.json",)), tokens_section),
        (Section("memory", "Memory against plan", ("memory.json", "plan.json")), memory_section),
        (Section("gradient-flow", "Gradient flow", ("gradient_flow.json",)), gradient_section),
        (Section("probes", "Probes before and after", ("evaluation.json",)), probes_section),
        (Section("merged", "The merged model", ("merge_report.json",)), merged_section),
        (Section("examples", "Decisions side by side", ("examples.json",)), examples_section),
        (Section("recipe", "Recipe", ("recipe.yaml",)), _recipe_section),
        (Section("versions", "Versions", ("versions.json",)), _versions_section),
    )
    for section, build in builders:
        _fill(run, section, build)
    sections = [section for section, _ in builders]
    summary = Section("summary", "Summary", tiles=[tile for section in sections for tile in section.tiles])
    if not summary.tiles:
        summary.absent.append("None of the files that a run leaves behind could be read; what is missing is below.")
    return [summary, *sections, _missing_section(run)]


def _fill(run: RunFolder, section: Section, build: Callable[[RunFolder, Section], None]) -> None:
    """Has a section hold what its files give, and say which of them are not there."""
    first, *others = section.files
    there = [name for name in section.files if name in run.files]
    if there:
        try:
            build(run, section)
        except _MALFORMED as error:
            problem = f"{', '.join(there)}: not as expected ({type(error).__name__}: {error})"
            section.absent.append(f"Not all can be shown. {problem}.")
            run.problems += [problem] if problem not in run.problems else []
    if first not in there:
        section.absent.insert(0, run.why_absent(first))
    section.notes += [run.why_absent(name) for name in others if name not in there]


def _recipe_section(run: RunFolder, section: Section) -> None:
    section.text = yaml.safe_dump(run.files["recipe.yaml"], sort_keys=False, allow_unicode=True, width=100)
    section.notes.append(
        "`frozen-peft train recipe.yaml` runs it again. Fields that are not there had their defaults; secrets are "
        "never written."
    )


def _versions_section(run: RunFolder, section: Section) -> None:
    rows = [(name, value or "not installed") for name, value in run.files["versions.json"].items()]
    section.tables.append(Table("What it ran with", ("what", "version"), rows, num_names=2))


def _missing_section(run: RunFolder) -> Section:
    section = Section("files", "What is missing", notes=list(run.problems))
    if run.missing:
        rows = [(name, EXPECTED[name]) for name in run.missing]
        section.tables.append(Table("Files that are not in the folder", ("file", "written by"), rows, num_names=2))
    else:
        section.notes.insert(0, "Nothing: every file is there.")
    return section

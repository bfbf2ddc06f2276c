# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that refers to nothing outside it and runs no script.

Its sections are there in their order, whatever is missing.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from frozen_peft.report.behavior_sections import examples_section, gradient_section, merged_section, probes_section
from frozen_peft.report.blocks import Section, Table
from frozen_peft.report.formats import visible
from frozen_peft.report.run_folder import EXPECTED, RunFolder, read_run_folder
from frozen_peft.report.training_sections import loss_section, memory_section, time_section, tokens_section
from frozen_peft.utils.files import whole_file

__all__ = ["REPORT_FILE", "render_page", "write_report"]

REPORT_FILE = "report.html"
_TITLE_FIELDS = ("model_name_or_path", "dataset_name", "tier")
_LOSS_FILES = ("trainer_state.json", "eval_before_results.json", "eval_results.json")
# What a file raises that holds something else than it should.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def write_report(
    run_dir: Path, output: Path | None = None, evaluations: Sequence[Path] = (), merges: Sequence[Path] = ()
) -> tuple[Path, RunFolder]:
    """Writes the report on a run, which appears whole or not at all.

    Args:
        run_dir: `output_dir` of `frozen-peft train`.
        output: The file; None: `report.html` in the run's folder.
        evaluations: See `read_run_folder`.
        merges: Likewise.

    Returns:
        The file, and what was found in the folder.

    Raises:
        OSError: There is no such folder or file, or none to write to.
    """
    run = read_run_folder(run_dir, evaluations, merges)
    page = render_page(run)
    output = run_dir / REPORT_FILE if output is None else output
    with whole_file(output) as file:
        file.write(page)
    return output, run


def render_page(run: RunFolder) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("frozen_peft.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # A drawn figure is SVG that this package has made, in which texts are escaped.
    environment.filters["drawn"] = Markup
    environment.filters["prose"] = _prose
    recipe = run.files.get("recipe.yaml", {})
    return environment.get_template("page.html.jinja").render(
        name=run.path.resolve().name,
        style=Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),
        about=[(name.partition("_")[0], str(recipe[name])) for name in _TITLE_FIELDS if recipe.get(name) is not None],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sections=_build_sections(run),
    )


def _prose(value: Any) -> Markup:
    """A sentence of this package, in which backticks set off names of files, fields and commands."""
    text = visible(str(value))
    parts = text.split("`")
    # One without a partner, in a file's own text, is a backtick.
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts))


def _shown(value: Any) -> Any:
    """What an expression of the template becomes: text in which every character is seen, escaped after this."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _build_sections(run: RunFolder) -> list[Section]:
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

# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that refers to nothing outside it and runs no script."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from frozen_peft.report.formats import visible
from frozen_peft.report.run_folder import RunFolder, read_run_folder
from frozen_peft.report.sections import build_sections
from frozen_peft.utils.files import whole_file

__all__ = ["REPORT_FILE", "render_page", "write_page", "write_report"]

REPORT_FILE = "report.html"
_TEMPLATE, _STYLE = "page.html.jinja", "page.css"
_TITLE_FIELDS = ("model_name_or_path", "dataset_name", "tier")


def write_report(run: Path) -> Path:
    """Writes the report on a run into its folder, and returns the file.

    Args:
        run: `output_dir` of `frozen-peft train`.

    Raises:
        OSError: There is no such folder, or it cannot be written to.
    """
    found = read_run_folder(run)
    return write_page(found, render_page(found))


def write_page(run: RunFolder, text: str, output: Path | None = None) -> Path:
    """Writes a page, which appears whole or not at all, and returns the file.

    Args:
        run: Of what it is the page.
        text: What `render_page` gave.
        output: The file; None: `report.html` in the run's folder.

    Raises:
        OSError: There is no folder to write to.
    """
    output = run.path / REPORT_FILE if output is None else output
    with whole_file(output) as file:
        file.write(text)
    return output


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
    sections = build_sections(run)
    # A drawn figure is SVG that this package has made, in which texts are escaped.
    environment.filters["drawn"] = Markup
    environment.filters["prose"] = _prose
    recipe = run.files.get("recipe.yaml")
    values = recipe.value if recipe is not None else {}
    return environment.get_template(_TEMPLATE).render(
        name=run.path.resolve().name,
        style=Markup(_style()),
        about=[(name.partition("_")[0], str(values[name])) for name in _TITLE_FIELDS if values.get(name) is not None],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sections=sections,
    )


def _style() -> str:
    return (Path(__file__).parent / _STYLE).read_text(encoding="utf-8")


def _prose(text: str) -> Markup:
    """A sentence of this package, in which backticks set off names of files, fields and commands."""
    parts = visible(text).split("`")
    # One without a partner, in a file's own text, is a backtick.
    if len(parts) % 2 == 0:
        return escape(visible(text))
    return Markup("").join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts))


def _shown(value: Any) -> Any:
    """What an expression of the template becomes: text in which every character is seen, escaped after this."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

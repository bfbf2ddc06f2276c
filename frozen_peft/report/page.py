# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that refers to nothing outside it and runs no script."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from frozen_peft.report.formats import visible
from frozen_peft.report.run_folder import RunFolder, read_run_folder
from frozen_peft.report.sections import build_sections
from frozen_peft.utils.files import whole_file

__all__ = ["REPORT_FILE", "render_page", "write_report"]

REPORT_FILE = "report.html"
_TITLE_FIELDS = ("model_name_or_path", "dataset_name", "tier")


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
        sections=build_sections(run),
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

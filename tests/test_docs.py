# SPDX-License-Identifier: Apache-2.0
"""What the documents say is what the code says."""

import re
import runpy
from pathlib import Path

import pytest
import trl

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_configuration_page_is_rendered_from_the_fields() -> None:
    rendered = runpy.run_path(str(ROOT / "docs" / "render.py"))["render"]()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == rendered, "run `python docs/render.py`"


def test_table_of_templates_is_rendered_from_them() -> None:
    page = (ROOT / "docs" / "turns.md").read_text(encoding="utf-8")
    made = runpy.run_path(str(ROOT / "docs" / "render_turns.py"))
    if f"Of trl {trl.__version__}:" not in page:
        pytest.skip("the table is of another release of TRL")
    assert made["with_table"](page) == page, "run `python docs/render_turns.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_readme_can_be_read_in_a_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_minimal_is_short() -> None:
    assert len((ROOT / "recipes" / "minimal.py").read_text(encoding="utf-8").splitlines()) < 120


def test_the_ways_through_the_code_name_files_that_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    ways = text.partition("## The ways through the code")[2].partition("\n## ")[0]
    files = re.findall(r"`([a-z_/]+\.py)`", ways)
    assert len(files) > 40
    assert [name for name in files if not (ROOT / "frozen_peft" / name).is_file()] == []

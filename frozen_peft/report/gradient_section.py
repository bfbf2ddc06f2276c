# SPDX-License-Identifier: Apache-2.0
"""The section on gradient flow: what reaches the adapters, by layer and role."""

from collections import defaultdict
from collections.abc import Callable

from frozen_peft.adapters import ROLES
from frozen_peft.report.blocks import Plot, Section, Table
from frozen_peft.report.formats import count_text, share_text
from frozen_peft.report.heatmap import draw_heatmap
from frozen_peft.report.run_folder import EXPECTED, RunFolder
from frozen_peft.report.svg import paper_svg
from frozen_peft.report.values import Found

__all__ = ["gradient_section"]


def gradient_section(run: RunFolder, section: Section) -> None:
    """A heat map, the totals, and figures by role and by layer."""
    if "gradient_flow.json" not in run.files:
        section.absent.append(f"gradient_flow.json is not there. It is written by {EXPECTED['gradient_flow.json']}.")
        return
    found = run.files["gradient_flow.json"]
    total, tokens = found["total"], found["tokens"]
    rows = found["gradient"].rows()
    for row in rows:
        _check(row)
    if rows:
        caption = (
            "By layer and role: the share of the full gradient that passes through context positions, which a frozen "
            "context leaves out, and the cosine of the two gradients. White cells have no adapter or no gradient."
        )
        svg = paper_svg(draw_heatmap(found.value), "plot-gradient", f"{caption} The figures by role are in the table.")
        section.plots.append(Plot(svg, caption, is_wide=True, is_paper=True))
    section.tables += _tables(found)
    section.notes.append(
        f"Measured on {count_text(found['samples'].number())} samples with {count_text(tokens['context'].number())} "
        f"tokens of context and {count_text(tokens['decision'].number())} of decisions. Of the full gradient, "
        f"{_total(total, 'context_share', share_text)} passes through context positions; its cosine with the frozen "
        f"gradient is {_total(total, 'cosine', '{:.3f}'.format)}."
    )


def _check(row: Found) -> None:
    """Refuses what could not be drawn."""
    row["layer"].count()
    row["role"].one_of((*ROLES, "other"))
    for name in ("frozen_norm", "full_norm"):
        row[name].number_from(0.0, 1e100)
    for name, low, high in (("cosine", -1.001, 1.001), ("context_share", 0.0, 1e9)):
        if (value := row[name]).value is not None:
            value.number_from(low, high)


def _total(total: Found, name: str, text: Callable[[float], str]) -> str:
    value = total.get(name)
    return "not known" if value is None else text(value.number())


def _tables(found: Found) -> list[Table]:
    roles: dict[str, list[Found]] = defaultdict(list)
    for row in found["gradient"].rows():
        roles[row["role"].text()].append(row)
    rows = [
        (
            role,
            str(len(own)),
            _norm(own, "frozen_norm"),
            _norm(own, "full_norm"),
            _range(own, "cosine"),
            _range(own, "context_share"),
        )
        for role, own in roles.items()
    ]
    columns = ("role", "projections", "frozen norm", "full norm", "cosine", "share through context")
    tables = [Table("Gradient by role: norms over all layers, and the least and the most of a layer", columns, rows)]
    attention = [
        (str(row["layer"].count()), share_text(row["context_mass"].number()), f"{row['moved'].number():+.2g}")
        for row in found["attention"].rows()
    ]
    if attention:
        titles = ("layer", "on the context", "moved by a step")
        tables.append(Table("Attention of decision tokens", titles, attention))
    linear = [
        (
            str(row["layer"].count()),
            share_text(row["state_share"].number()),
            f"{row['state_gradient_norm'].number():.3g}",
        )
        for row in found["gdn"].rows()
    ]
    if linear:
        titles = ("layer", "read from the frozen state", "norm of the state's gradient")
        tables.append(Table("Gated DeltaNet layers", titles, linear))
    return tables


def _norm(rows: list[Found], name: str) -> str:
    return f"{sum(row[name].number() ** 2 for row in rows) ** 0.5:.3g}"


def _range(rows: list[Found], name: str) -> str:
    values = [value.number() for row in rows if (value := row.get(name)) is not None]
    if not values:
        return "-"
    return f"{min(values):.3f}" if len(values) == 1 else f"{min(values):.3f} to {max(values):.3f}"

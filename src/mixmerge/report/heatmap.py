"""A heat map as static SVG: rows by columns, a number in every cell, drawn in the page's own colours.

How strong a colour is says how large a value is, by opacity over the page's paper, so that one picture serves light and
dark; its hue says the sign. A cell that there is nothing for stays empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixmerge.report.charts import svg

STRONGEST = 0.5  # opacity: text over it is still easy to read


@dataclass(frozen=True, slots=True)
class HeatCell:
    """A cell: its row and column, the number as text, and its strength from -1 to 1."""

    row: str
    column: str
    text: str
    strength: float


def heat_map(
    cells: Sequence[HeatCell], *, rows: Sequence[str], columns: Sequence[str], width: int, letters: int = 11
) -> str:
    """Draw cells in the order of `rows` and `columns`; `width` is that of the cells, `letters` the size of their text."""
    import altair as alt

    values = [
        {
            "row": cell.row,
            "column": cell.column,
            "text": cell.text.replace("-", "\u2212"),
            "fill": "var(--good)" if cell.strength >= 0 else "var(--bad)",
            "opacity": STRONGEST * min(1.0, abs(cell.strength)),
        }
        for cell in cells
    ]
    across = alt.Axis(orient="top", labelAngle=-40, ticks=False, domain=False, grid=False, labelLimit=0, labelPadding=4)
    down = alt.Axis(ticks=False, domain=False, grid=False, labelLimit=150)
    x = alt.X("column:N", title=None, sort=list(columns), scale=alt.Scale(domain=list(columns)), axis=across)
    y = alt.Y("row:N", title=None, sort=list(rows), scale=alt.Scale(domain=list(rows)), axis=down)
    data = alt.Chart(alt.Data(values=values))
    fill, opacity = alt.Fill("fill:N", scale=None), alt.FillOpacity("opacity:Q", scale=None)
    boxes = data.mark_rect(stroke="var(--grid)", strokeWidth=1).encode(x=x, y=y, fill=fill, fillOpacity=opacity)
    texts = data.mark_text(fontSize=letters, color="var(--ink)").encode(x=x, y=y, text="text:N")
    return svg(alt.layer(boxes, texts).properties(width=width, height=22 * len(rows)))

"""A sheet to draw on: figures in CSS pixels that come out as inline SVG in the page's own fonts and colours.

matplotlib is imported on first use; nothing of pyplot, no global state is left changed.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW = 920, 360
"""Widths every plot is drawn in: for a desk or paper, and for a phone."""
FONT = 12.0
SMALL = 11.0

INK, MUTED, GRID, PAPER, WARN = "#23262b", "#63676e", "#dfddd6", "#fdfcfa", "#b3261e"
SERIES = ("#1f5f9e", "#b8500c", "#13795b", "#93417a", "#876200", "#4f5b66")
"""Told apart by people with any colour vision; lines also differ in their markers."""
MARKERS = ("o", "s", "^", "D", "v", "P")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", WARN: "warn"} | {
    color: f"s{i}" for i, color in enumerate(SERIES)
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": FONT,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.major.width": 0.8,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "lines.markeredgewidth": 0.0,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "path.simplify": False,
}


class Box(NamedTuple):
    """Where axes lie on a sheet, in pixels from its upper left corner."""

    left: float
    top: float
    width: float
    height: float


class Sheet:
    """A figure of ``width`` x ``height`` CSS pixels; axes are placed in pixels from the upper left corner."""

    def __init__(self, width: int, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        # One inch is 72 points and a unit of matplotlib's SVG is one point: this makes one unit one CSS pixel.
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none", edgecolor="none")

    @property
    def is_narrow(self) -> bool:
        return self.width < 600

    def axes(
        self, left: float, top: float, width: float, height: float, *, title: str = "", share_x: Axes | None = None
    ) -> Axes:
        """Axes whose vertical axis is named by a line above them, so that nobody has to tilt their head."""
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        ax = self.figure.add_axes(box, sharex=share_x)
        if title:
            ax.annotate(
                title,
                (0, 1),
                (0, 7),
                xycoords=("figure fraction", "axes fraction"),
                textcoords="offset points",
                fontsize=FONT,
                fontweight="bold",
                va="bottom",
                ha="left",
                annotation_clip=False,
            )
        return ax

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text at pixels from the upper left corner; ``y`` is its middle."""
        style = {"va": "center", "ha": "left", "fontsize": SMALL, **style}
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)

    def title(self, x: float, y: float, text: str) -> None:
        """The name of a panel."""
        self.text(x, y, text, fontsize=FONT, fontweight="bold")

    def svg(self, name: str, alt: str) -> str:
        """The figure as one ``<svg>`` element; ``name`` makes its ids unique on the page."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        buffer = io.StringIO()
        with warnings.catch_warnings():
            # The browser has fonts for scripts that matplotlib, which only measures, has no glyphs of.
            warnings.filterwarnings("ignore", message=r".*[Gg]lyph .* missing", category=UserWarning)
            FigureCanvasSVG(self.figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
        return _inline(buffer.getvalue(), name, alt, self.width, self.height)


def draw(paint: Callable[[int], Sheet], width: int, name: str, alt: str) -> str:
    """The SVG of a sheet of the given width, painted in the report's style; the same input gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        return paint(width).svg(name, alt)


def _inline(svg: str, name: str, alt: str, width: float, height: float) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)  # would style the whole page
    body = svg[svg.index(">") + 1 :]
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(?:xlink:)?href="#([^"]*)"', rf'href="#{name}-\1"', body)
    body = body.replace("url(#", f"url(#{name}-")
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"font: ((?:[\w.]+ )*)([\d.]+px) [^;\"]*", r"font-size: \2; font-weight: \1", body)
    body = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", body)
    # A hundredth of a pixel is enough in coordinates; what stands between tags is text and stays.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var(--{variable}, {color})")
    alt = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{alt}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}'
    )


def grid(ax: Axes, axis: Literal["x", "y"] = "y") -> None:
    """Quiet lines across, and no axis line where they make it superfluous."""
    ax.grid(axis=axis)
    ax.spines["left" if axis == "y" else "bottom"].set_visible(False)


def legend(ax: Axes, sheet: Sheet, top: float, columns: int | None = None) -> None:
    """The legend of some axes, in rows from the left edge, ``top`` pixels below the sheet's upper edge."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        sheet.figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0, 1 - top / sheet.height), ncols=columns or len(handles)
        )

"""The plot of the layers: a heat map of sparsity by layer and corpus, and the neurons that never fired."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from prosparse_core.report.data import MIXED, SETTINGS, Record, ReportData
from prosparse_core.report.format import clip, is_number, pct
from prosparse_core.report.plot import Plot
from prosparse_core.report.sheet import MUTED, SERIES, SMALL, Sheet, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = ("prosparse_star", "prosparse")
COLORS = "cividis"
"""Rises evenly in lightness and reads the same with any colour vision, on paper and on a dark screen."""
ROW_PX = 30


def layers(data: ReportData) -> Plot:
    """Sparsity by layer and corpus, before and after threshold shifting, on one colour scale."""
    chosen = set(one_each(data).values())
    measured = [r for r in data["layers"] if r["variant"] in chosen]
    rows = [r for r in measured if r["setting"] in SHOWN] or [r for r in measured if (r["sparsity"] or 0) > 0]
    rows = [{k: v for k, v in r.items() if k != "variant"} for r in rows]
    settings = [s for s in (*SHOWN, *sorted({r["setting"] for r in rows})) if any(r["setting"] == s for r in rows)]
    settings = list(dict.fromkeys(settings))[:3]
    corpora = [c for c in (*data.corpora, MIXED) if any(r["corpus"] == c for r in rows)]
    num_layers = 1 + max((r["layer"] for r in rows), default=0)
    dead = _dead(rows, settings[-1], num_layers) if settings else {}
    is_any_dead = any(share > 0 for share in dead.values())
    values = [r["sparsity"] for r in rows if r["setting"] in settings and is_number(r["sparsity"])]
    low, high = _bounds(values)

    def paint(width: int) -> Sheet:
        narrow = width < 600
        left = 8 + min(6.4 * max(len(_short(c, narrow)) for c in corpora), 150 if not narrow else 96)
        rows_px = ROW_PX * len(corpora)
        block = rows_px + 42
        begin = 82
        sheet = Sheet(width, begin + len(settings) * block + (110 if is_any_dead else 24))
        _scale(sheet, width, left, low, high)
        ax = None
        for i, setting in enumerate(settings):
            ax = sheet.axes(left, begin + i * block, width - left - 4, rows_px, share_x=ax)
            sheet.title(0, begin + i * block - 14, _named(setting))
            found = {(r["corpus"], r["layer"]): r["sparsity"] for r in rows if r["setting"] == setting}
            grid_values = [[found.get((c, k)) for k in range(num_layers)] for c in corpora]
            _heat(ax, grid_values, low, high, (width - left - 4) / num_layers)
            ax.set_yticks(range(len(corpora)), [_short(c, narrow) for c in corpora])
            ax.tick_params(labelbottom=i == len(settings) - 1 and not is_any_dead, bottom=False)
        assert ax is not None
        if is_any_dead:
            top = begin + len(settings) * block
            ax = sheet.axes(left, top, width - left - 4, 66, share_x=ax)
            name = SETTINGS.get(settings[-1], (settings[-1],))[0]
            sheet.title(0, top - 14, f"Neurons that never fired, {name} (%)")
            ax.bar(list(dead), [100 * v for v in dead.values()], color=SERIES[4], width=0.8)
            ax.locator_params(axis="y", nbins=3)
            grid(ax)
        layer_axis(ax, num_layers, 6 if narrow else 15)
        ax.set_xlabel("layer")
        return sheet

    aid = (
        "Each cell is one layer on one corpus, the lighter the more zeros; "
        f"the colour scale runs from {pct(low, 0)} to {pct(high, 0)} and is the same in every map."
    )
    if is_any_dead:
        aid = f"{aid[:-1]}; the bars count the neurons zero at every token, on the corpus where they are fewest."
    return Plot(
        "layers",
        "Sparsity by layer and corpus",
        aid,
        _alt(rows, settings, corpora, num_layers),
        data.sql["layers"],
        rows,
        paint if values else None,
        data.why_missing("evaluate", "prosparse"),
        _remarks(dead, is_any_dead, settings),
    )


def one_each(data: ReportData) -> dict[str, str]:
    """The first measured variant of every setting, in the order of the settings."""
    measured = {r["variant"] for r in data["layers"]}
    first: dict[str, str] = {}
    for setting, variant in data.settings:
        if variant in measured:
            first.setdefault(setting, str(variant))
    return first


def _named(setting: str) -> str:
    name, about = SETTINGS.get(setting, (setting, ""))
    return f"{name}, {about}" if about else name


def _short(corpus: str, is_narrow: bool) -> str:
    return clip(corpus, 14 if is_narrow else 22)


def _dead(rows: list[Record], setting: str, num_layers: int) -> dict[int, float]:
    """Per layer the share of neurons that never fired, on the corpus that woke the most of them."""
    shares: dict[int, dict[str, float]] = {k: {} for k in range(num_layers)}
    for row in rows:
        if row["setting"] == setting and is_number(row["dead_frac"]):
            shares[row["layer"]][row["corpus"]] = row["dead_frac"]
    return {k: found.get(MIXED, min(found.values())) for k, found in shares.items() if found}


def _remarks(dead: dict[int, float], is_any_dead: bool, settings: list[str]) -> list[str]:
    if not settings:
        return []
    if not dead:
        return ["Dead neurons: n/a, the ledger has no dead_frac for these layers."]
    if not is_any_dead:
        name = SETTINGS.get(settings[-1], (settings[-1],))[0]
        return [f"No layer of {name} has a neuron that stayed at zero on every token of every corpus."]
    worst = max(dead, key=lambda k: dead[k])
    return [f"Most of them are in layer {worst}: at most {pct(dead[worst])} of its neurons."]


def _bounds(values: list[float]) -> tuple[float, float]:
    """The colour scale: the values' range, widened to whole steps of five per cent."""
    if not values:
        return 0.0, 1.0
    low = max(0.0, math.floor(20 * min(values) + 1e-9) / 20)
    high = min(1.0, math.ceil(20 * max(values) - 1e-9) / 20)
    return (low, high) if high > low else (max(0.0, high - 0.05), max(high, 0.05))


def _heat(ax: Axes, values: list[list[Any]], low: float, high: float, cell_px: float) -> None:
    import numpy as np
    from matplotlib import colormaps

    array = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    ax.pcolormesh(
        np.arange(array.shape[1] + 1) - 0.5,
        np.arange(array.shape[0] + 1) - 0.5,
        np.ma.masked_invalid(array),
        cmap=COLORS,
        vmin=low,
        vmax=high,
        edgecolors="face",
        linewidth=0.8,
    )
    ax.invert_yaxis()
    for spine in ax.spines.values():
        spine.set_visible(False)
    if cell_px < 40:
        return
    for (row, layer), value in np.ndenumerate(array):
        if np.isfinite(value):
            red, green, blue, _ = colormaps[COLORS]((value - low) / (high - low))
            is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            color = "#101010" if is_light else "#f8f8f8"
            ax.text(layer, row, pct(value).removesuffix(" %"), ha="center", va="center", fontsize=SMALL, color=color)


def _scale(sheet: Sheet, width: int, left: float, low: float, high: float) -> None:
    """The colour bar, with its ends and its middle named."""
    import numpy as np

    length = min(300.0, width - left - 40)
    ax = sheet.axes(left, 16, length, 10)
    edges = np.linspace(low, high, 61)
    ax.pcolormesh(
        100 * edges,
        [0, 1],
        ((edges[:-1] + edges[1:]) / 2)[None, :],
        cmap=COLORS,
        vmin=low,
        vmax=high,
        edgecolors="face",
        linewidth=1.0,
    )
    ax.set_yticks([])
    ax.locator_params(axis="x", nbins=5)
    ax.spines[:].set_visible(False)
    sheet.text(0, 21, "sparsity (%)", color=MUTED)


def layer_axis(ax: Axes, num_layers: int, most: int) -> None:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if num_layers / s <= most or s == 1000)
    ax.set_xticks(range(0, num_layers, step))
    ax.set_xlim(-0.5, num_layers - 0.5)


def _alt(rows: list[Record], settings: list[str], corpora: list[str], num_layers: int) -> str:
    parts = []
    for setting in settings:
        found = [r for r in rows if r["setting"] == setting and is_number(r["sparsity"])]
        if found:
            least, most = min(found, key=lambda r: r["sparsity"]), max(found, key=lambda r: r["sparsity"])
            parts.append(
                f"{_named(setting)}: from {pct(least['sparsity'])} (layer {least['layer']}, {least['corpus']}) to "
                f"{pct(most['sparsity'])} (layer {most['layer']}, {most['corpus']})."
            )
    return f"Heat maps of {num_layers} layers by {len(corpora)} corpora. " + " ".join(parts) if parts else ""

"""The plots of training against tokens: every setting in a panel of its own, and one course by itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from prosparse_core.report.courses import grouped
from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import clip, count, is_number, number, pct, plain
from prosparse_core.report.names import factor, name_of, seed
from prosparse_core.report.plot import Plot
from prosparse_core.report.plot_comparison import log_ticks, style_of
from prosparse_core.report.plot_training import smoothed, thinned
from prosparse_core.report.sheet import GRID, INK, MUTED, SERIES, SMALL, Sheet, grid, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 120
"""A small panel shows no more."""
REFERENCE = "prosparse_star"
_HELD_OUT: dict[str, Any] = {
    "color": INK,
    "linestyle": "none",
    "marker": "D",
    "markersize": 6,
    "label": "held-out text",
    "zorder": 5,
    "clip_on": False,
}
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def courses(data: ReportData) -> Plot:
    """Sparsity and loss of every setting against tokens in small multiples on common axes."""
    rows = data["courses"]
    by_course = grouped(rows)
    settings = list(dict.fromkeys(setting for setting, _, _ in by_course))
    reference = next((part for (setting, _, _), part in by_course.items() if setting == REFERENCE), [])
    tokens = [r["tokens"] for r in rows if is_number(r["tokens"])]

    def paint(width: int) -> Sheet:
        across = 2 if width < 600 else 4
        down = math.ceil(len(settings) / across)
        side, gap, cell = 40, 16, 206
        each = (width - side - gap * (across - 1) - 6) / across
        sheet = Sheet(width, 58 + down * cell)
        sheet.title(0, 8, "Above: sparsity of x1 (%). Below: loss (nats per token)")
        shared: list[Axes | None] = [None, None]
        for i, setting in enumerate(settings):
            left, top = side + (i % across) * (each + gap), 58 + (i // across) * cell
            sheet.text(left, top - 14, clip(name_of(setting), int(each / 6.5)), fontweight="bold")
            own = {key: part for key, part in by_course.items() if key[0] == setting}
            for k, (column, height) in enumerate((("sparsity", 84), ("lm_loss", 70))):
                ax = sheet.axes(left, top + k * 92, each, height, share_x=shared[0])
                first = shared[k]
                if first is None:
                    shared[k] = ax
                else:
                    ax.sharey(first)
                grid(ax)
                if setting != REFERENCE:
                    _line(ax, reference, column, GRID, 3.0, "-")
                for j, part in enumerate(own.values()):
                    _line(ax, part, column, style_of(setting)[0], 1.6, _DASHES[j % len(_DASHES)])
                ax.tick_params(labelleft=i % across == 0, labelbottom=k == 1 and i + across >= len(settings))
                ax.locator_params(axis="y", nbins=4)
        if shared[0] is not None:
            _token_axis(shared[0], max(tokens), 3)
        sheet.text(side, sheet.height - 9, "training tokens seen", color=MUTED)
        return sheet

    several = [name_of(s) for s in settings if sum(key[0] == s for key in by_course) > 1]
    aid = "All panels share their axes; the broad pale line is ProSparse* (the recipe's stages), for comparison. "
    aid += "Lines are means over neighbouring steps of the training batches."
    aid += f" Several lines in a panel ({', '.join(several)}) are its factors or seeds." if several else ""
    return Plot(
        "courses",
        "Training of every setting",
        aid,
        _alt_courses(by_course),
        data.sql["training"],
        rows,
        paint if tokens else None,
        data.why_missing("stage"),
    )


def course(data: ReportData) -> Plot:
    """Sparsity and perplexity of a run's main course against tokens, with the held-out text where it was measured."""
    rows = [{k: v for k, v in r.items() if k != "artifact"} for r in data["training"] if is_number(r["tokens"])]
    panels = (("sparsity", "Sparsity of x1 (%)", 100.0), ("perplexity", "Perplexity (log scale)", 1.0))
    held_out = _held_out(data)
    reach = max(2, min(len(rows) // 40, 60))
    stages: dict[Any, list[Record]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)

    def paint(width: int) -> Sheet:
        sheet = Sheet(width, 600)
        ax = None
        for k, (column, title, scale) in enumerate(panels):
            ax = sheet.axes(52, 58 + k * 270, width - 60, 216, title=title, share_x=ax)
            grid(ax)
            points = _course(rows, column, scale, reach)
            if points:
                x, y = zip(*thinned(points, 400), strict=True)
                ax.plot(x, y, color=SERIES[k], label="training batches, mean over neighbours")
            marks = [(r["tokens_seen"], scale * r[column]) for r in held_out if is_number(r[column]) and r[column] > 0]
            if marks:  # the dense model has no zeros to show
                x, y = zip(*marks, strict=True)
                ax.plot(x, y, **_HELD_OUT)
            if column == "perplexity" and ax.dataLim.y0 > 0 and ax.has_data():
                _log_axis(ax)
            for i, part in enumerate(stages.values()):
                if i % 2:
                    ax.axvspan(part[0]["tokens"], part[-1]["tokens"], color=GRID, alpha=0.45, linewidth=0, zorder=0)
        assert ax is not None
        _token_axis(ax, max([r["tokens"] for r in rows] + [r["tokens_seen"] for r in held_out]), 6)
        ax.set_xlabel("training tokens seen")
        legend(ax, sheet, 0, 1 if sheet.is_narrow else 2)
        return sheet

    aid = f"The lines are means over up to {2 * reach + 1} neighbouring steps on the training mixture, every second "
    aid += "stage is shaded; the diamonds were measured on held-out text, which is another mixture, before thresholds."
    return Plot(
        "course",
        "Sparsity and perplexity against tokens",
        aid,
        _alt_course(rows),
        data.sql["training"],
        rows,
        paint if rows else None,
        data.why_missing("stage"),
    )


def _held_out(data: ReportData) -> list[Record]:
    """The measured points of the main course: the dense model, the end of stage 0, the end."""
    board = [data.main_row(s) for s in ("original", "vanilla_relu", REFERENCE)]
    rows = [r for r in board if r and is_number(r["tokens_seen"]) and is_number(r["perplexity"])]
    return [r for r in rows if not (r["setting"] == "vanilla_relu" and data.is_comparison)]


def _course(rows: list[Record], column: str, scale: float, reach: int) -> list[tuple[float, float]]:
    """Smoothed (tokens, value); a perplexity is the exponential of the mean loss."""
    source = "lm_loss" if column == "perplexity" else column
    found = [(r["tokens"], r[source]) for r in rows if is_number(r["tokens"]) and is_number(r[source])]
    means = smoothed([v for _, v in found], reach)
    values = [math.exp(min(v, 50.0)) for v in means] if column == "perplexity" else [scale * v for v in means]
    return [(t, v) for (t, _), v in zip(found, values, strict=True)]


def _line(ax: Axes, rows: list[Record], column: str, color: str, width: float, dashes: Any) -> None:
    points = _course(rows, column, 100.0 if column == "sparsity" else 1.0, max(2, len(rows) // 40))
    if points:
        x, y = zip(*thinned(points, POINTS), strict=True)
        ax.plot(x, y, color=color, linewidth=width, linestyle=dashes, zorder=2 if color == GRID else 3)


def _log_axis(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    ax.set_yscale("log")
    low, high = ax.dataLim.y0, ax.dataLim.y1
    ax.set_ylim(low / 1.06, high * 1.06)
    ax.set_yticks(log_ticks(low / 1.06, high * 1.06, 6))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())


def _token_axis(ax: Axes, last: float, marks: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_xlim(0, max(last, 1))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=marks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short_count(v)))
    ax.tick_params(axis="x", labelsize=SMALL)


def _short_count(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{plain(value / unit)}{name}"
    return plain(value)


def _alt_courses(by_course: dict[tuple[str, Any, Any], list[Record]]) -> str:
    said = []
    for (setting, l1, own_seed), rows in by_course.items():
        name = ", ".join(p for p in (name_of(setting), factor(l1), seed(own_seed)) if p)
        said.append(f"{name} ends with sparsity {pct(rows[-1]['sparsity'])} and loss {number(rows[-1]['lm_loss'])}")
    number_ = f"{len(said)} training run{'' if len(said) == 1 else 's'}"
    return f"Small line charts of {number_}: {'; '.join(said)}." if said else ""


def _alt_course(rows: list[Record]) -> str:
    if not rows:
        return ""
    first, last = rows[0], rows[-1]
    return (
        f"Two line charts over {count(last['tokens'])} training tokens: sparsity goes from {pct(first['sparsity'])} to "
        f"{pct(last['sparsity'])}, the loss from {number(first['lm_loss'])} to {number(last['lm_loss'])} nats."
    )

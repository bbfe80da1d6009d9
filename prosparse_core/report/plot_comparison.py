"""The plot of a comparison: every variant by its sparsity and perplexity, with both arms as lines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from prosparse_core.report.courses import course_order
from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import is_number, number, pct, plain
from prosparse_core.report.names import SHIFTED, name_of
from prosparse_core.report.plot import Plot
from prosparse_core.report.sheet import INK, MUTED, PAPER, SERIES, SMALL, Sheet, grid, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSE = 0.05
"""Below this share of zeros a setting is drawn as a level, not as a point: it would squeeze all others together."""
COLUMNS = ("setting", "l1", "seed", "tokens_seen", "sparsity", "perplexity", "perplexity_stderr", "variant")


_STYLES = {
    "original": (5, "o"),
    "original_continued": (5, "s"),
    "vanilla_relu": (2, "^"),
    "shifted_relu": (2, "v"),
    "fixed_l1": (1, "s"),
    "prosparse_star": (0, "o"),
    "prosparse": (0, "D"),
    "linear_ramp": (3, "^"),
    "exponential_ramp": (3, "v"),
    "drelu": (4, "P"),
    "distilled": (3, "D"),
    "distilled_equal_time": (3, "s"),
    "closed_loop": (4, "o"),
}


def style_of(setting: str) -> tuple[str, str]:
    """(colour, marker) of a setting, the same in every plot: kin share a colour, no two settings both; what thresholds
    make of a setting is drawn like it, but hollow."""
    color, marker = _STYLES.get(setting.removesuffix(SHIFTED), (None, "X"))
    return (INK if color is None else SERIES[color]), marker


def comparison(data: ReportData) -> Plot:
    """Perplexity against sparsity: one marker per variant, the points of each arm joined, dense settings as levels."""
    rows = [{c: r[c] for c in COLUMNS} for r in data["leaderboard"]]
    rows = [r for r in rows if is_number(r["sparsity"]) and is_number(r["perplexity"]) and r["perplexity"] > 0]
    rows.sort(key=lambda r: (*course_order(r, data.recipe.get("seed")), r["variant"]))
    sparse = [r for r in rows if r["sparsity"] >= DENSE]
    levels = _levels(rows)
    line = fixed_line(data["comparison"])
    others = [arm_line(data["comparison"], arm) for arm in ARMS]
    settings = list(dict.fromkeys(r["setting"] for r in sparse))

    def paint(width: int) -> Sheet:
        narrow = width < 600
        columns = 2 if narrow else 4
        begin = 20 * math.ceil(len(settings) / columns) + 36
        tall = 380 if narrow else 400
        sheet = Sheet(width, begin + tall + 50)
        ax = sheet.axes(52, begin, width - 64, tall)
        sheet.title(0, begin - 14, "Perplexity on held-out text, log scale: lower is better")
        grid(ax)
        ax.set_yscale("log")
        if len(line) > 1:
            ax.plot(*zip(*[(100 * s, p) for s, p, _ in line], strict=True), **_LINE)
        for name, drawn in zip(ARMS, others, strict=True):
            if len(drawn) > 1:
                style = {**_LINE, "color": style_of(name)[0], "linestyle": _DOTS if name in SHIFTED_ARMS else "-"}
                ax.plot(*zip(*[(100 * s, p) for s, p, _ in drawn], strict=True), **style)
        for setting in settings:
            _points(ax, setting, [r for r in sparse if r["setting"] == setting])
        _frame(ax, sparse, levels)
        for i, (name, value) in enumerate(levels):
            _level(ax, name, value, is_above=i < len(levels) - 1 or i == 0)
        _name_factors(ax, line, narrow)
        _better(ax)
        ax.set_xlabel("share of exact zeros in x1 (%): further right is sparser")
        legend(ax, sheet, 0, columns)
        return sheet

    aid = "Each marker is one trained model: the lower and the further right, the better. "
    aid += "The grey line joins the fixed factors, so whatever lies below it costs less than a fixed factor at the "
    aid += "same sparsity; the coloured line joins the progressive stages, and dotted ones either with thresholds. "
    aid += "Error bars are one standard error of the evaluation, and all models read the same text."
    return Plot(
        "comparison",
        "Perplexity and sparsity of every setting",
        aid,
        _alt(sparse, levels),
        data.sql["leaderboard"],
        rows,
        paint if sparse else None,
        data.why_missing("evaluate"),
    )


_LINE: dict[str, Any] = {"color": MUTED, "linewidth": 1.4, "linestyle": (0, (6, 3)), "zorder": 2}


SHIFTED_ARMS = ("fixed_l1_fatrelu", "prosparse")
ARMS = ("prosparse_star", *SHIFTED_ARMS)
"""What is joined besides the fixed factors."""
_DOTS = (0, (1, 2))


def fixed_line(rows: list[Record]) -> list[tuple[float, float, float]]:
    """See :func:`arm_line`; of fixed factors."""
    return arm_line(rows, "fixed_l1")


def arm_line(rows: list[Record], arm: str) -> list[tuple[float, float, float]]:
    """(sparsity, perplexity, factor) of an arm by rising sparsity, with plain ReLU as the factor 0; empty for one point
    of a progressive arm, which is no course of factors."""
    zero = "vanilla_relu" + (SHIFTED if arm in SHIFTED_ARMS else "")
    own = [r for r in rows if r["setting"] == arm]
    if not own or (len(own) < 2 and not arm.startswith("fixed")):
        return []
    found = [(r["sparsity"], r["perplexity"], r["l1"]) for r in [*own, *(r for r in rows if r["setting"] == zero)]]
    return sorted((s, p, 0.0 if l1 is None else l1) for s, p, l1 in found if is_number(s) and is_number(p) and p > 0)


def _levels(rows: list[Record]) -> list[tuple[str, float]]:
    """(name, perplexity) of the settings that are not sparse, the highest first, seeds averaged."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["sparsity"] < DENSE:
            found.setdefault(row["setting"], []).append(row["perplexity"])
    means = [(name_of(setting), sum(v) / len(v)) for setting, v in found.items()]
    return sorted(means, key=lambda level: -level[1])


def _points(ax: Axes, setting: str, rows: list[Record]) -> None:
    color, marker = style_of(setting)
    x, y = [100 * r["sparsity"] for r in rows], [r["perplexity"] for r in rows]
    errors = [r["perplexity_stderr"] if is_number(r["perplexity_stderr"]) else 0.0 for r in rows]
    below = [min(e, 0.9 * p) for e, p in zip(errors, y, strict=True)]
    ax.vlines(x, [p - b for p, b in zip(y, below, strict=True)], [p + e for p, e in zip(y, errors, strict=True)],
              colors=color, alpha=0.4, linewidth=1.2, zorder=3)  # fmt: skip
    filled: dict[str, Any] = {"markerfacecolor": PAPER, "markeredgewidth": 1.6} if setting.endswith(SHIFTED) else {}
    ax.plot(
        x, y, linestyle="none", marker=marker, color=color, markersize=8, label=name_of(setting), zorder=5, **filled
    )


def _frame(ax: Axes, rows: list[Record], levels: list[tuple[str, float]]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    zeros = [100 * r["sparsity"] for r in rows]
    margin = max(1.0, 0.09 * (max(zeros) - min(zeros)))
    ax.set_xlim(max(0.0, min(zeros) - margin), min(100.0, max(zeros) + margin))
    values = [r["perplexity"] for r in rows] + [p for _, p in levels]
    room = max(0.04, 0.16 * math.log(max(values) / min(values)))
    low, high = min(values) * math.exp(-room), max(values) * math.exp(room)
    ax.set_ylim(low, high)
    ax.set_yticks(log_ticks(low, high))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """At most ``most`` round values from ``low`` to ``high``, for an axis that may span a hair or many decades."""
    exponent = math.floor(math.log10(high - low))
    for steps in (m * 10.0**e for e in range(exponent - 2, exponent + 2) for m in (1, 2, 5)):
        if steps * math.floor(high / steps) > low and high / low < 4:
            ticks = [steps * k for k in range(math.ceil(low / steps), math.floor(high / steps) + 1)]
            if len(ticks) <= most:
                return ticks
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for marks in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in decades for m in marks if low <= m * 10.0**e <= high]
        if len(ticks) <= most:
            break
    return ticks


def _level(ax: Axes, name: str, value: float, is_above: bool) -> None:
    """A dotted line with its name above it, or below where another level is above."""
    ax.axhline(value, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
    ax.annotate(
        f"{name}, not sparse: {number(value)}",
        (0, value),
        (4, 3 if is_above else -4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=SMALL,
        color=MUTED,
        va="bottom" if is_above else "top",
    )


def _name_factors(ax: Axes, line: list[tuple[float, float, float]], narrow: bool) -> None:
    """λ beside the points of the line, as many as fit."""
    last = -1e9
    for zeros, perplexity, l1 in line:
        x = ax.transData.transform((100 * zeros, perplexity))[0]
        if x - last > (48 if narrow else 40):
            last = x
            ax.annotate(
                f"λ {plain(l1)}",
                (100 * zeros, perplexity),
                (-7, 7),
                textcoords="offset points",
                ha="right",
                fontsize=SMALL,
                color=MUTED,
                zorder=6,
                bbox={"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.4},
            )


def _better(ax: Axes) -> None:
    arrow = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 1.4}
    ax.annotate("", (0.085, 0.87), (0.015, 0.97), xycoords="axes fraction", arrowprops=arrow, zorder=1)
    ax.annotate("better", (0.065, 0.93), xycoords="axes fraction", color=MUTED, fontsize=SMALL, zorder=1)


def _alt(rows: list[Record], levels: list[tuple[str, float]]) -> str:
    if not rows:
        return ""
    said = [f"{name_of(r['setting'])} {pct(r['sparsity'])} at {number(r['perplexity'])}" for r in rows]
    said += [f"{name} (not sparse) at {number(value)}" for name, value in levels]
    models = f"{len(rows)} model{'' if len(rows) == 1 else 's'}"
    return f"A scatter chart of {models} by sparsity and perplexity: {', '.join(said)}."

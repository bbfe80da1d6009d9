"""The plot of the training: loss, lambda, learning rate and sparsity over steps, with the stages marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import is_number, number, pct, plain
from prosparse_core.report.plot import Plot
from prosparse_core.report.sheet import GRID, INK, MUTED, PAPER, SERIES, SMALL, Sheet, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SET = ("l1_lambda", "lr")
"""What is set and not measured: drawn as it is."""
HELD_OUT = {"lm_loss": "held_out_loss", "sparsity": "held_out_sparsity"}
"""Which column lies beside a panel's own, from the looks at held-out text."""
MAX_POINTS = 900
"""More raw points than this are drawn as the least and the greatest of each stretch; the data file has all."""


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """The mean over up to ``reach`` neighbours on each side: fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    result = []
    for i in range(len(values)):
        first, last = max(0, i - reach), min(len(values), i + reach + 1)
        result.append((sums[last] - sums[first]) / (last - first))
    return result


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most about ``most`` points that keep the outline: the least and the greatest of each stretch, and the ends."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * len(points) / most)
    kept = [points[0]]
    for start in range(1, len(points) - 1, stretch):
        part = points[start : min(start + stretch, len(points) - 1)]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def training(data: ReportData) -> Plot:
    """Loss, lambda, learning rate and sparsity over steps on aligned panels, with the stages marked."""
    rows = [{k: v for k, v in row.items() if k != "artifact"} for row in data["training"]]
    by_stage: dict[Any, list[Record]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"], []).append(row)
    longest = max((len(part) for part in by_stage.values()), default=0)
    reach = min(longest // 24, 50) if longest >= 48 else 0
    losses = [r[c] for r in rows for c in ("lm_loss", "held_out_loss") if is_number(r.get(c))]
    # Logarithmic where the loss spans more than a factor of three, so that its end is not a flat line.
    is_log = bool(losses) and 0 < 3 * min(losses) < max(losses)
    panels = [
        ("lm_loss", f"Loss (nats per token{', log scale' if is_log else ''})", 1.0),
        ("l1_lambda", "Lambda", 1.0),
        ("lr", "Learning rate", 1.0),
        ("sparsity", "Sparsity of x1 (%)", 100.0),
    ]

    def paint(width: int) -> Sheet:
        sheet = Sheet(width, 728)
        left, right, ax = 52, 8, None
        for number_, ((column, title, factor), top, height) in enumerate(
            zip(panels, (48, 268, 406, 544), (170, 88, 88, 140), strict=True)
        ):
            ax = sheet.axes(left, top, width - left - right, height, title=title, share_x=ax)
            grid(ax)
            for part in by_stage.values():
                points = [(r["step"], factor * r[column]) for r in part if is_number(r[column])]
                # A short stage is smoothed over less: its own course must stay visible.
                _trace(ax, points, SERIES[number_], min(reach, len(part) // 8) if column not in SET else 0)
            if column in HELD_OUT:
                _held_out(ax, [(r["step"], factor * r[c]) for r in rows if is_number(r.get(c := HELD_OUT[column]))])
            _scale(ax, column, is_log)
            ax.tick_params(labelbottom=column == "sparsity")
            _stages(ax, by_stage, sheet if number_ == 0 else None, width - left - right)
        assert ax is not None
        _whole_numbers(ax)
        ax.set_xlabel("optimizer step, counted over all stages")
        return sheet

    aid = "The four panels share the step axis and each band is one stage of the recipe; "
    aid += (
        "the light trace is every logged step, the dark one its mean over up to "
        f"{2 * reach + 1} neighbouring steps of the same stage."
        if reach
        else "every logged step is drawn as it was measured."
    )
    if any(is_number(r.get("held_out_loss")) for r in rows):
        aid += " The dots are held-out text, a few fixed windows of the calibration files."
    return Plot(
        "training",
        "Training",
        aid,
        _alt_training(rows, by_stage),
        data.sql["training"],
        rows,
        paint if rows else None,
        data.why_missing("stage"),
    )


def _trace(ax: Axes, points: list[tuple[float, float]], color: str, reach: int) -> None:
    if not points:
        return
    x, y = zip(*thinned(points), strict=True)
    marker = "o" if len(points) < 3 else ""
    if not reach:
        ax.plot(x, y, color=color, marker=marker)
        return
    ax.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
    means = smoothed([v for _, v in points], reach)
    x, y = zip(*thinned([(p[0], m) for p, m in zip(points, means, strict=True)], 300), strict=True)
    ax.plot(x, y, color=color)


def _held_out(ax: Axes, points: list[tuple[float, float]]) -> None:
    if points:
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=INK, marker="o", markersize=2.5, linewidth=0.8)


def _scale(ax: Axes, column: str, is_log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if column == "lm_loss" and is_log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif column in SET:
        top = ax.dataLim.y1
        ax.set_ylim(0, 1.12 * top if 0 < top < 1e30 else 1.0)
        ax.locator_params(axis="y", nbins=4)
    else:
        ax.locator_params(axis="y", nbins=5)


def _stages(ax: Axes, by_stage: dict[Any, list[Record]], sheet: Sheet | None, width: float) -> None:
    """Every second stage shaded; on the uppermost panel its number, and its lambda where there is room for it."""
    begins = [min(r["step"] for r in part) for part in by_stage.values()]
    end = max(r["step"] for part in by_stage.values() for r in part)
    ax.set_xlim(begins[0], max(end, begins[0] + 1))
    span = max(end - begins[0], 1)
    room_until = -1e9
    for i, (stage, part) in enumerate(by_stage.items()):
        after = begins[i + 1] if i + 1 < len(begins) else end
        if i % 2:
            ax.axvspan(begins[i], after, color=GRID, alpha=0.45, linewidth=0, zorder=0)
        if sheet is None:
            continue
        x, pixels = (begins[i] + after) / 2, width * (after - begins[i]) / span
        middle = width * (x - begins[0]) / span
        factor = next((r["l1_lambda"] for r in reversed(part) if is_number(r["l1_lambda"])), None)
        full = f"stage {stage} · λ {plain(factor)}" if factor else f"stage {stage} · ReLU"
        text = full if pixels > 6.6 * len(full) else f"stage {stage}" if pixels > 48 else str(stage)
        if middle - 3.2 * len(text) > room_until:
            ax.annotate(
                text,
                (x, 1),
                (0, -4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=SMALL,
                color=MUTED,
                bbox={"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 1.0},
            )
            room_until = middle + 3.2 * len(text) + 4


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def _alt_training(rows: list[Record], by_stage: dict[Any, list[Record]]) -> str:
    if not rows:
        return ""
    first, last = rows[0], rows[-1]
    return (
        f"Four line charts over {len(rows):,} logged steps in {len(by_stage)} stages: "
        f"the loss goes from {number(first['lm_loss'])} to {number(last['lm_loss'])} nats, "
        f"lambda from {plain(first['l1_lambda'])} to {plain(last['l1_lambda'])}, "
        f"the learning rate from {plain(first['lr'])} to {plain(last['lr'])}, "
        f"batch sparsity from {pct(first['sparsity'])} to {pct(last['sparsity'])}." + _alt_held_out(rows)
    )


def _alt_held_out(rows: list[Record]) -> str:
    seen = [r for r in rows if is_number(r.get("held_out_loss"))]
    if not seen:
        return ""
    return (
        f" Held-out text, looked at {len(seen)} times, ends at {number(seen[-1]['held_out_loss'])} nats "
        f"and {pct(seen[-1]['held_out_sparsity'])}."
    )

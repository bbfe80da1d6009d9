"""The plot of the speed-ups: bars with their spread and the ratio of bytes, beside the conditions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import NA, clip, is_number, pct, ratio
from prosparse_core.report.plot import Plot
from prosparse_core.report.sheet import FONT, GRID, INK, MUTED, PAPER, SERIES, SMALL, WARN, Sheet
from prosparse_core.report.speed_rows import (
    OWN,
    bars,
    baseline_name,
    kernel_name,
    marked,
    own_conditions,
    provider_name,
    shared_conditions,
    why_refused,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def speed(data: ReportData) -> Plot:
    """Speed-up of every sparse kernel over the best dense one of the run, with its spread and its byte ratio."""
    rows, more = bars(data)
    kernels = list(dict.fromkeys(r["kernel"] for r in rows))

    def paint(width: int) -> Sheet:
        row_px, head_px = 40, 34
        height = 34 + head_px * len(kernels) + row_px * len(rows) + 40
        sheet = Sheet(width, height)
        ax = sheet.axes(0, 30, width - 8, height - 70)
        ax.set_xlim(0, _reach(rows))
        ax.set_ylim(height - 70, 0)
        ax.spines["left"].set_visible(False)
        ax.set_yticks([])
        ax.grid(axis="x")
        ax.set_xlabel("times as fast as the best dense kernel of the run")
        ax.axvline(1, color=INK, linewidth=1.2)
        ax.annotate(
            "1 = baseline",
            (1, 1),
            (3, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=SMALL,
            color=MUTED,
        )
        y = 4.0
        for kernel in kernels:
            _text(ax, 0, y + head_px / 2, kernel_name(kernel), fontsize=FONT, fontweight="bold")
            y += head_px
            for row in rows:
                if row["kernel"] == kernel:
                    _label(ax, y + 2, row, ", ".join([_against(row), *own_conditions(row, rows)]))
                    _bar(ax, y + 20, row)
                    y += row_px
        return sheet

    conditions = "; ".join(shared_conditions(rows))
    sparsities = [r["sparsity"] for r in rows if is_number(r["sparsity"])]
    zeros = " to ".join(dict.fromkeys(pct(f(sparsities)) for f in (min, max))) if sparsities else NA
    aid = (
        "A bar is the ratio of median times, its whisker is the 20th percentile of the baseline over the 80th of "
        "the kernel up to the reverse, and the diamond (an arrow where it lies beyond the axis) is the byte ratio: "
        "bytes the dense kernel reads over bytes this one reads. It bounds nothing: a bar beyond it, marked !, also "
        "reads them faster than its baseline. It is left out where the weights fit into the cache."
    )
    remarks = [f"Conditions: {conditions}; zeros in the mask: {zeros}."] if rows else []
    remarks += [
        f"! {kernel_name(r['kernel'])}, {_against(r)}: {r['above_byte_ratio_note']}."
        for r in rows
        if r["state"] == "passed" and r["above_byte_ratio"]
    ]
    if more > 0:
        remarks.append(f"{more} more comparisons are in the table below or in the ledger.")
    return Plot(
        "speed",
        "Speed-up",
        aid,
        _alt(rows),
        data.sql["speedups"],
        rows,
        paint if rows else None,
        _why(data),
        remarks,
    )


def _why(data: ReportData) -> str:
    if data["timings"]:
        return "no kernel was timed beside a dense baseline under the same conditions"
    return data.why_missing("speed")


def _against(row: Record) -> str:
    baseline = row.get("baseline")
    name = provider_name(row["provider"])
    return f"{name} over {baseline_name(baseline)}" if baseline else name


def _reach(rows: list[Record]) -> float:
    """The end of the axis: room for the longest whisker, and for byte ratios as far as they do not dwarf the bars."""
    tops = [r["speedup_high"] or r["speedup"] for r in rows if r["state"] == "passed"]
    top = max([*tops, 1.25])
    ratios = [r["byte_ratio"] for r in rows if r["state"] == "passed" and is_number(r["byte_ratio"])]
    return max([top * 1.05, *(1.05 * r for r in ratios if r <= 2 * top)])


def _text(ax: Axes, x: float, y: float, text: str, **style: Any) -> None:
    behind = {"facecolor": PAPER, "linewidth": 0, "pad": 1.0}
    ax.text(x, y, text, **{"va": "center", "ha": "left", "fontsize": SMALL, "bbox": behind, "zorder": 6, **style})


def _bar(ax: Axes, y: float, row: Record) -> None:
    if row["state"] != "passed":
        _text(ax, 0, y, f"✕  no speed-up: {clip(why_refused(row), int(ax.bbox.width) // 7 - 16)}", color=WARN)
        return
    color = SERIES[2] if row["baseline"] in OWN else SERIES[0]
    ax.barh(y, row["speedup"], height=13, color=color, linewidth=0)
    low, high = row["speedup_low"], row["speedup_high"]
    if is_number(low) and is_number(high):
        ax.plot([low, high], [y, y], color=PAPER, linewidth=3.6)
        ax.plot([low, high], [y, y], color=INK, linewidth=1.3, marker="|", markersize=7, markeredgewidth=1.3)
    reach = ax.get_xlim()[1]
    of_bytes = row["byte_ratio"]
    if is_number(of_bytes) and of_bytes <= reach:
        ax.plot(
            [of_bytes],
            [y],
            marker="D",
            markersize=7,
            color=SERIES[1],
            markeredgecolor=GRID,
            markeredgewidth=0.8,
            zorder=5,
        )
    elif is_number(of_bytes):
        ax.annotate(
            "",
            (reach, y),
            (reach * 0.955, y),
            arrowprops={"arrowstyle": "-|>", "color": SERIES[1], "linewidth": 1.4},
        )


def _label(ax: Axes, y: float, row: Record, name: str) -> None:
    """The line above a bar: its value, what is compared with what, and at the far end its byte ratio."""
    value = marked(row) if row["state"] == "passed" else ""
    of_bytes = f"byte ratio {ratio(row['byte_ratio'])}" if value and is_number(row["byte_ratio"]) else ""
    start, room = 7.6 * len(value) + (6 if value else 0), ax.bbox.width - 6.6 * len(of_bytes)
    behind = {"facecolor": PAPER, "linewidth": 0, "pad": 1.0}
    _text(ax, 0, y, value, fontweight="bold")
    for text, x, side in ((clip(name, int((room - start) / 6.4)), start, "left"), (of_bytes, ax.bbox.width, "right")):
        ax.annotate(
            text,
            (0, y),
            (x, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=SMALL,
            color=MUTED,
            bbox=behind,
            zorder=6,
        )


def _alt(rows: list[Record]) -> str:
    parts = []
    for row in rows:
        if row["state"] == "passed":
            of_bytes = f", byte ratio {ratio(row['byte_ratio'])}" if is_number(row["byte_ratio"]) else ""
            parts.append(f"{kernel_name(row['kernel'])}, {_against(row)}: {marked(row)}{of_bytes}")
        else:
            parts.append(f"{kernel_name(row['kernel'])}, {_against(row)}: no speed-up, {why_refused(row)}")
    return "Bar chart. " + "; ".join(parts) + "." if parts else ""

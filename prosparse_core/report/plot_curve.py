"""The plot of speed against sparsity: the whole FFN on random masks, beside what moving fewer bytes allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import is_number, pct, ratio
from prosparse_core.report.plot import Plot
from prosparse_core.report.sheet import INK, MARKERS, SERIES, Box, Sheet, grid, legend
from prosparse_core.report.speed_rows import BASELINES, shared_conditions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WAYS = {"native": "exact", "certified": "certified gate"}


def curve(data: ReportData) -> Plot:
    """Speed-up of the FFN against the share of zeros: measured points, and the line that the bytes set."""
    rows = [r for r in data["curve"] if is_number(r["sparsity"]) and is_number(r["speedup"])]
    baselines = [b for b in BASELINES if any(r["baseline"] == b for r in rows)]
    is_curve = len({r["sparsity"] for r in rows}) > 1

    def paint(width: int) -> Sheet:
        tall, begin = 270, 64
        panels = len(baselines)
        if width < 600:
            sheet = Sheet(width, begin + 40 * (len(WAYS) - 1) + panels * (tall + 76))
            boxes = [Box(34, begin + 40 + i * (tall + 76), width - 42, tall) for i in range(panels)]
        else:
            sheet = Sheet(width, begin + tall + 48)
            each = (width - 34 * panels - 20 * (panels - 1)) / panels
            boxes = [Box(34 + i * (each + 54), begin, each, tall) for i in range(panels)]
        top = max(max(r["speedup_high"] or r["speedup"], r["byte_ratio"] or 0) for r in rows)
        for i, (box, baseline) in enumerate(zip(boxes, baselines, strict=True)):
            ax = sheet.axes(*box)
            sheet.title(box.left - 34, box.top - 14, f"times as fast as {BASELINES[baseline]}")
            _panel(ax, [r for r in rows if r["baseline"] == baseline], top)
            if i == 0:
                legend(ax, sheet, 2, 2 if width < 600 else 4)
        return sheet

    best = max(rows, key=lambda r: r["sparsity"], default=None)
    alt = "; ".join(
        f"{WAYS.get(r['provider'], r['provider'])} over {BASELINES[r['baseline']]} at {pct(r['sparsity'], 0)} zeros: "
        f"{ratio(r['speedup'])}"
        for r in rows
        if best and r["sparsity"] == best["sparsity"]
    )
    shared = shared_conditions([{**_WITHOUT, **r, "kernel": "ffn"} for r in rows])
    return Plot(
        "curve",
        "Speed-up against sparsity",
        "A point is the ratio of median times of the whole FFN on random weights and masks of this model's shape, its "
        "whisker reaches from the worst to the best fifth; the dashed lines are what reading fewer bytes allows over a "
        "dense kernel as good as ours.",
        f"Times as fast as a dense kernel: {alt}.",
        data.sql["curve"],
        rows,
        paint if is_curve else None,
        data.why_missing("speed") if not data["timings"] else "the kernels were not timed at several sparsities",
        [f"Conditions: {'; '.join(shared)}."] if is_curve else [],
    )


_WITHOUT: Record = dict.fromkeys(("num_tokens", "mask_source", "cutoff"))
"""Conditions that are said in words."""


def _panel(ax: Axes, rows: list[Record], top: float) -> None:
    grid(ax)
    ax.set_xlim(-3, 100)
    ax.set_ylim(0, 1.06 * top)
    ax.set_xlabel("zeros in the mask (%)")
    ax.axhline(1, color=INK, linewidth=1.0)
    for i, (provider, name) in enumerate(WAYS.items()):
        points = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r["sparsity"])
        if not points:
            continue
        x = [100 * r["sparsity"] for r in points]
        ax.plot(x, [r["speedup"] for r in points], color=SERIES[i], marker=MARKERS[i], label=name)
        for at, r in zip(x, points, strict=True):
            if is_number(r["speedup_low"]) and is_number(r["speedup_high"]):
                ax.plot([at, at], [r["speedup_low"], r["speedup_high"]], color=SERIES[i], linewidth=0.9)
        limits = [(at, r["byte_ratio"]) for at, r in zip(x, points, strict=True) if is_number(r["byte_ratio"])]
        if limits:
            ax.plot(*zip(*limits, strict=True), color=SERIES[i], linestyle="--", linewidth=1.0, label=f"{name}: limit")

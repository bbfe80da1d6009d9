"""The plot of speed against sparsity: the whole FFN on random masks, beside the ratio of bytes."""

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
    """Speed-up of the FFN over the best dense kernel against the share of zeros, beside the ratio of bytes."""
    rows = [r for r in data["curve"] if is_number(r["sparsity"]) and is_number(r["speedup"])]
    is_curve = len({r["sparsity"] for r in rows}) > 1

    def paint(width: int) -> Sheet:
        is_narrow = width < 600
        tall, begin = 270, 64 + (40 if is_narrow else 0)
        sheet = Sheet(width, begin + tall + 48)
        box = Box(34, begin, width - 42, tall)
        top = max(max(r["speedup_high"] or r["speedup"], r["byte_ratio"] or 0) for r in rows)
        ax = sheet.axes(*box)
        sheet.title(box.left - 34, box.top - 14, "times as fast as the best dense kernel")
        _panel(ax, rows, top)
        legend(ax, sheet, 2, 2 if is_narrow else 4)
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
        "A point is the ratio of median times of the whole FFN on random weights and masks of this model's shape, over "
        "the faster of torch and our own dense kernel at that point; its whisker reaches from the worst to the best "
        "fifth. The dashed lines are the byte ratio, which bounds nothing: it is what a kernel would gain that reads "
        "its bytes as fast as that baseline. It is left out where the weights fit into the cache.",
        f"Times as fast as a dense kernel: {alt}.",
        data.sql["curve"],
        rows,
        paint if is_curve else None,
        data.why_missing("speed") if not data["timings"] else "the kernels were not timed at several sparsities",
        [f"Conditions: {'; '.join(shared)}."] if is_curve else [],
    )


_WITHOUT: Record = dict.fromkeys(("num_tokens", "prompt_tokens", "mask_source", "cutoff"))
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
        ratios = [(at, r["byte_ratio"]) for at, r in zip(x, points, strict=True) if is_number(r["byte_ratio"])]
        if ratios:
            ax.plot(*zip(*ratios, strict=True), color=SERIES[i], linestyle="--", linewidth=1.0, label=f"{name}: bytes")

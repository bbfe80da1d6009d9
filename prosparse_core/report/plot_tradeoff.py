"""The plot of the threshold curve: what each FATReLU threshold costs and what it brings (paper, section 3.3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from prosparse_core.report.data import MIXED, Record, ReportData
from prosparse_core.report.format import clip, is_number, number, pct, plain
from prosparse_core.report.plot import Plot
from prosparse_core.report.sheet import INK, MARKERS, MUTED, PAPER, SERIES, SMALL, Box, Sheet, grid, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes


NO_CHOICE = "No threshold of this curve is marked as chosen."
NAMES = {"per_layer": "one t per layer", "global": "one t for all layers"}


def tradeoff(data: ReportData) -> Plot:
    """Perplexity against sparsity along the threshold curves: in absolute terms, and as a rise with its budget.

    Where thresholds per layer were calibrated, the curve of one threshold for all layers stands beside theirs.
    """
    rows = data["tradeoff"]
    usable = [r for r in rows if is_number(r["sparsity"]) and is_number(r["perplexity"])]
    used = next((r["rule"] for r in usable if r["chosen"]), usable[-1]["rule"] if usable else None)
    corpora = [c for c in data.corpora if any(r["corpus"] == c for r in usable)]
    if len(corpora) != 1 and any(r["corpus"] == MIXED for r in usable):
        corpora.append(MIXED)
    shown = [r for r in usable if r["rule"] == used]
    beside = [r for r in usable if r["rule"] != used and r["corpus"] == corpora[-1]]
    budget = budget_of(data)
    chosen = next((r for r in shown if r["chosen"] and r["corpus"] == corpora[-1]), None)
    rival = best_within(beside, budget)

    def paint(width: int) -> Sheet:
        legend_rows = math.ceil((len(corpora) + bool(beside)) / (1 if width < 600 else 3 if beside else 4))
        begin = 20 * legend_rows + 34
        tall = 300
        sheet = Sheet(width, begin + tall + 48 if width >= 600 else begin + 2 * (tall + 78) - 30)
        if sheet.is_narrow:
            boxes = [Box(46, begin, width - 54, tall), Box(46, begin + tall + 78, width - 54, tall)]
        else:
            half = (width - 2 * 46 - 44) / 2
            boxes = [Box(46, begin, half, tall), Box(46 + half + 86, begin, half, tall)]
        knee = 2 * (budget or 1.0)
        drawn = shown + beside
        rises = [r["perplexity_increase_pct"] for r in drawn if is_number(r["perplexity_increase_pct"])]
        is_steep = max(rises, default=0.0) > 10 * knee
        is_wide = 0 < 1.6 * min(r["perplexity"] for r in drawn) < max(r["perplexity"] for r in drawn)
        titles = (
            "Perplexity (log scale)" if is_wide else "Perplexity",
            f"Rise over t = 0 (%{f', log scale above {plain(knee)}' if is_steep else ''})",
        )
        for box, title, column in zip(boxes, titles, ("perplexity", "perplexity_increase_pct"), strict=True):
            ax = sheet.axes(*box, title="")
            sheet.title(box.left - 46, box.top - 14, title)
            grid(ax)
            _curves(ax, corpora, shown, column, NAMES.get(shown[0]["scope"], "") if beside else "")
            if beside:
                _curve_beside(ax, beside, rival, column)
            if column == "perplexity":
                _perplexity_axis(ax, [r[column] for r in drawn], is_wide)
            else:
                _rise_axis(ax, budget, knee if is_steep else None)
            named = [r for r in shown if r["corpus"] == corpora[-1] and is_number(r[column])]
            has_room = column != "perplexity" and not beside
            _name_thresholds(ax, [r for r in named if has_room or r["chosen"]], column)
            ax.set_xlabel("sparsity (%)")
            if column == "perplexity":
                legend(ax, sheet, 0, 1 if sheet.is_narrow else min(3 if beside else 4, len(corpora) + bool(beside)))
        return sheet

    said = f" with the budget of +{plain(budget)} % as a dashed line" if budget is not None else ""
    aid = (
        "Along each line the threshold t rises from left to right; further right is sparser, higher is worse, "
        "and a ring marks what the budget allows."
    )
    if beside:
        aid += " Where every layer has a t of its own, the number beside a point is their mean."
    alt = f"Two line charts for {', '.join(corpora)}{said}. " if corpora else ""
    if chosen:
        alt += f"Chosen: {_described(chosen)} on {corpora[-1]}."
    if rival:
        alt += f" In its place, {_described(rival)}."
    return Plot(
        "tradeoff",
        "Threshold trade-off",
        aid,
        alt,
        data.sql["tradeoff"],
        rows,
        paint if usable else None,
        data.why_missing("calibrate"),
        [] if not usable else _remarks(data, rows[0]["variant"]) if chosen else [NO_CHOICE],
    )


def _described(row: Record) -> str:
    t = f"mean t = {plain(row['threshold'])}" if row["scope"] == "per_layer" else f"t = {plain(row['threshold'])}"
    return (
        f"{NAMES.get(row['scope'], row['scope'])}, {t}, sparsity {pct(row['sparsity'])}, "
        f"perplexity {number(row['perplexity'])}"
    )


def best_within(rows: list[Record], budget: float | None) -> Record | None:
    """The last point of a curve before the first that breaks the budget: what its rule would have chosen."""
    best = None
    for row in sorted(rows, key=lambda r: r["threshold"]):
        rise = row["perplexity_increase_pct"]
        if budget is None or not is_number(rise) or rise > budget:
            break
        best = row
    return best


def _remarks(data: ReportData, variant: str) -> list[str]:
    """What the chosen thresholds became on text that calibration has not seen, and what calibration itself remarked."""
    remarks = []
    for row in data["held_out"]:
        if row["variant_before"] == variant and row["corpus"] == MIXED and is_number(row["perplexity_increase_pct"]):
            gain = 100 * row["sparsity_gain"] if is_number(row["sparsity_gain"]) else None
            promised = 100 * row["promised_sparsity_gain"] if is_number(row["promised_sparsity_gain"]) else None
            remarks.append(
                f"On the evaluation files the chosen thresholds change perplexity by "
                f"{row['perplexity_increase_pct']:+.2f} % (calibration: {row['promised_increase_pct']:+.2f} %) and "
                f"bring {plain(gain)} points of sparsity (calibration: {plain(promised)})."
            )
            break
    metas = [s["meta"] for s in data.steps_of("calibrate") if isinstance(s["meta"], dict)]
    said = [str(m["remark"]) for m in metas if m.get("remark")]
    return remarks + [f"{remark[:1].upper()}{remark[1:]}." for remark in said[:1]]


def budget_of(data: ReportData) -> float | None:
    """The rise of perplexity that was allowed, in per cent: as calibration noted it, else as the recipe has it."""
    metas = [s["meta"] for s in data.steps_of("calibrate") if isinstance(s["meta"], dict)]
    section = data.recipe.get("calibrate")
    for source in (*metas, section if isinstance(section, dict) else {}):
        if is_number(source.get("max_ppl_increase_pct")):
            return float(source["max_ppl_increase_pct"])
    return None


def _curves(ax: Axes, corpora: list[str], rows: list[Record], column: str, how: str) -> None:
    for i, corpus in enumerate(corpora):
        points = [r for r in rows if r["corpus"] == corpus and is_number(r[column])]
        points.sort(key=lambda r: r["threshold"])
        mixed = corpus == MIXED
        color = INK if mixed else SERIES[i % len(SERIES)]
        x, y = [100 * r["sparsity"] for r in points], [r[column] for r in points]
        label = "all corpora together" if mixed else clip(corpus, 32)
        label += f", {how}" if how and i == len(corpora) - 1 else ""
        ax.plot(
            x,
            y,
            color=color,
            marker=MARKERS[i % len(MARKERS)],
            linewidth=2.2 if mixed else 1.3,
            label=label,
            zorder=4 if mixed else 3,
        )
        _ring(ax, [(a, b) for a, b, r in zip(x, y, points, strict=True) if r["chosen"]], color)


def _curve_beside(ax: Axes, rows: list[Record], best: Record | None, column: str) -> None:
    """The curve of the rule that was not asked for, on the last corpus: dashed, with hollow marks."""
    points = sorted((r for r in rows if is_number(r[column])), key=lambda r: r["threshold"])
    ax.plot(
        [100 * r["sparsity"] for r in points],
        [r[column] for r in points],
        color=MUTED,
        linestyle=(0, (4, 2)),
        linewidth=1.8,
        marker="o",
        markerfacecolor=PAPER,
        markeredgecolor=MUTED,
        markeredgewidth=1.0,
        label=f"the same, {NAMES.get(rows[0]['scope'], rows[0]['scope'])}",
        zorder=3,
    )
    _ring(ax, [(100 * best["sparsity"], best[column])] if best and is_number(best[column]) else [], MUTED)


def _ring(ax: Axes, points: list[tuple[float, float]], color: str) -> None:
    if points:
        x, y = zip(*points, strict=True)
        style: dict[str, Any] = {
            "markersize": 11,
            "markerfacecolor": "none",
            "markeredgecolor": color,
            "markeredgewidth": 1.6,
        }
        ax.plot(x, y, linestyle="none", marker="o", zorder=5, **style)


def _perplexity_axis(ax: Axes, values: list[float], is_log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if is_log:
        ax.set_yscale("log")
        marks = (1, 1.5, 2, 3, 4, 5, 6, 8) if max(values) < 8 * min(values) else (1, 2, 5)
        ax.yaxis.set_major_locator(LogLocator(10, subs=marks, numticks=12))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))


def _rise_axis(ax: Axes, budget: float | None, knee: float | None) -> None:
    """Linear where the decision falls, logarithmic above the knee where there is one; the budget as a dashed line."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if knee is not None:
        ax.set_yscale("symlog", linthresh=knee, linscale=1.2)
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))
    if budget is not None:
        ax.axhline(budget, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.0, zorder=2)
        ax.annotate(
            f"budget +{plain(budget)} %",
            (0, budget),
            (3, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=SMALL,
            color=MUTED,
            ha="left",
            va="bottom",
        )


def _name_thresholds(ax: Axes, rows: list[Record], column: str) -> None:
    """t beside the points of the last line, as many as fit; the chosen one always."""
    rows = sorted(rows, key=lambda r: r["threshold"])
    ax.margins(x=0.09, y=0.09)
    ax.autoscale_view()
    spots = [ax.transData.transform((100 * r["sparsity"], r[column])) for r in rows]
    order = sorted(range(len(rows)), key=lambda i: (not rows[i]["chosen"], i not in (0, len(rows) - 1), i))
    taken: list[Any] = []
    for i in order:
        if all(abs(spots[i][0] - t[0]) > 44 or abs(spots[i][1] - t[1]) > 15 for t in taken):
            taken.append(spots[i])
            weight = "bold" if rows[i]["chosen"] else "normal"
            ax.annotate(
                _prefix(rows[i]) + plain(rows[i]["threshold"]),
                (100 * rows[i]["sparsity"], rows[i][column]),
                (-6, 8),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=SMALL,
                zorder=6,
                fontweight=weight,
                bbox={"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.4},
            )


def _prefix(row: Record) -> str:
    return "" if not row["chosen"] else "mean t = " if row["scope"] == "per_layer" else "t = "

"""The plot of the activation predictors: recall against predicted sparsity, and each layer (paper, App. C)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import is_number, pct, plain
from prosparse_core.report.plot import Plot
from prosparse_core.report.plot_layers import layer_axis
from prosparse_core.report.sheet import INK, MARKERS, MUTED, SERIES, SMALL, Box, Sheet, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES_OF_LAYER = (
    ("recall", "recall"),
    ("predicted_sparsity", "predicted sparsity"),
    ("true_sparsity", "true sparsity"),
)


def predictor(data: ReportData) -> Plot:
    """Recall against predicted sparsity over the cutoffs (means over layers), and per layer at the middle cutoff."""
    rows = _one_kind(data["predictors"])
    means = mean_by_cutoff(rows)
    cutoff = min((m["cutoff"] for m in means), key=lambda c: abs(c - 0.5), default=None)
    at_cutoff = [r for r in rows if r["cutoff"] == cutoff]
    num_layers = 1 + max((r["layer"] for r in rows), default=0)

    def paint(width: int) -> Sheet:
        tall, left, narrow = 250, 40, width < 600
        if narrow:
            sheet = Sheet(width, 2 * tall + 190)
            first, second = Box(left, 30, width - 48, tall), Box(left, tall + 134, width - 48, tall)
        else:
            sheet = Sheet(width, tall + 96)
            share = 0.36 * width
            first, second = Box(left, 52, share, tall), Box(share + 104, 52, width - share - 112, tall)
        ax = sheet.axes(*first)
        sheet.title(0, first.top - (14 if narrow else 36), "Recall by cutoff, mean over layers (%)")
        _curve(ax, means)
        ax = sheet.axes(*second)
        sheet.title(second.left - left, second.top - 36, f"Every layer at cutoff {plain(cutoff)} (%)")
        _by_layer(ax, at_cutoff, num_layers, 6 if width < 600 else 15)
        handles, labels = ax.get_legend_handles_labels()
        if handles:
            anchor = ((second.left - left) / sheet.width, 1 - (second.top - 22) / sheet.height)
            sheet.figure.legend(
                handles, labels, loc="upper left", bbox_to_anchor=anchor, ncols=3, columnspacing=0.9, handlelength=1.2
            )
        return sheet

    aid = (
        "Lowering the cutoff finds more of the active neurons (higher recall) and skips fewer of the others "
        "(lower predicted sparsity); a perfect predictor would sit at 100 % recall on the dashed line."
    )
    alt = "; ".join(
        f"cutoff {plain(m['cutoff'])}: recall {pct(m['recall'])}, predicted sparsity {pct(m['predicted_sparsity'])}"
        for m in means
    )
    kinds = {(r["setting"], r["hidden"], r["label_rule"]) for r in data["predictors"]}
    remarks = [f"{len(kinds) - 1} other kinds of predictors are in the ledger and not drawn."] if len(kinds) > 1 else []
    usable = any(is_number(m["recall"]) and is_number(m["predicted_sparsity"]) for m in means)
    missing = (
        "no layer had an active neuron, so recall is undefined"
        if rows and not usable
        else data.why_missing("predictor")
    )
    alt = f"Two charts of {num_layers} layers. {alt}." if alt else ""
    sql, painter = data.sql["predictors"], paint if usable else None
    return Plot("predictor", "Activation predictor", aid, alt, sql, rows, painter, missing, remarks)


def mean_by_cutoff(rows: list[Record]) -> list[Record]:
    """The mean over layers of recall, predicted and true sparsity at every cutoff; None where no layer has one."""
    result = []
    for cutoff in sorted({r["cutoff"] for r in rows}):
        entry: Record = {"cutoff": cutoff}
        for column, _ in SERIES_OF_LAYER:
            values = [r[column] for r in rows if r["cutoff"] == cutoff and is_number(r[column])]
            entry[column] = sum(values) / len(values) if values else None
        result.append(entry)
    return result


def _one_kind(rows: list[Record]) -> list[Record]:
    """The rows of the kind of predictor there are most of."""
    kinds = Counter((r["setting"], r["hidden"], r["label_rule"]) for r in rows)
    if not kinds:
        return []
    kind = kinds.most_common(1)[0][0]
    return [r for r in rows if (r["setting"], r["hidden"], r["label_rule"]) == kind]


def _curve(ax: Axes, means: list[Record]) -> None:
    usable = [m for m in means if is_number(m["recall"]) and is_number(m["predicted_sparsity"])]
    points = [(100 * m["predicted_sparsity"], 100 * m["recall"], m["cutoff"]) for m in usable]
    x, y, _ = zip(*points, strict=True)
    ax.plot(x, y, color=SERIES[0], marker="o", markersize=6, clip_on=False)
    true = next((m["true_sparsity"] for m in means if is_number(m["true_sparsity"])), None)
    left, right = min(x), max(x)
    if true is not None:
        ax.axvline(100 * true, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.0)
        ax.annotate(
            f"true {pct(true)}",
            (100 * true, 0),
            (-4, 5),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            fontsize=SMALL,
            color=MUTED,
        )
        left, right = min(left, 100 * true), max(right, 100 * true)
    span = max(right - left, 4.0)
    ax.set_xlim(left - 0.44 * span, right + 0.06 * span)
    ax.set_ylim(min(y) - 0.16 * max(100.5 - min(y), 3), 100.5)
    ax.set_xlabel("predicted sparsity (%)")
    ax.locator_params(axis="x", nbins=5)
    grid(ax)
    _name_cutoffs(ax, points)


def _name_cutoffs(ax: Axes, points: list[tuple[float, float, float]]) -> None:
    """The cutoff beside each point; points that lie together share one line of text."""
    groups: list[tuple[Any, list[tuple[float, float, float]]]] = []
    for point in points:
        spot = ax.transData.transform(point[:2])
        if groups and abs(spot[0] - groups[-1][0][0]) < 40 and abs(spot[1] - groups[-1][0][1]) < 14:
            groups[-1][1].append(point)
        else:
            groups.append((spot, [point]))
    for i, (_, together) in enumerate(groups):
        text = ("" if i else "cutoff ") + ", ".join(plain(cutoff) for _, _, cutoff in together)
        ax.annotate(text, together[0][:2], (-7, -5), textcoords="offset points", ha="right", va="top", fontsize=SMALL)


def _by_layer(ax: Axes, rows: list[Record], num_layers: int, most_ticks: int) -> None:
    rows = sorted(rows, key=lambda r: r["layer"])
    styles: tuple[dict[str, Any], ...] = (
        {"color": SERIES[0], "marker": MARKERS[0]},
        {"color": SERIES[1], "marker": MARKERS[1]},
        {"color": INK, "linestyle": (0, (5, 3)), "linewidth": 1.2, "marker": MARKERS[2] if num_layers < 3 else ""},
    )
    size = 4.5 if num_layers <= 40 else 2.5
    for (column, label), style in zip(SERIES_OF_LAYER, styles, strict=True):
        points = [(r["layer"], 100 * r[column]) for r in rows if is_number(r[column])]
        if points:
            x, y = zip(*points, strict=True)
            ax.plot(x, y, label=label, markersize=size, **style)
    layer_axis(ax, num_layers, most_ticks)
    ax.set_xlabel("layer")
    grid(ax)

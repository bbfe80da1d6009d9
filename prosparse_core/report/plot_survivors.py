"""The plot of what is left of the activations, by layer: the size of the survivors, and the zeros that chunks keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prosparse_core.report.data import MIXED, SETTINGS, Record, ReportData
from prosparse_core.report.format import is_number, pct, ratio
from prosparse_core.report.plot import Plot
from prosparse_core.report.plot_layers import SHOWN, layer_axis, one_each
from prosparse_core.report.sheet import INK, MARKERS, MUTED, SERIES, SMALL, Box, Sheet, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = len(SERIES)
"""Settings drawn at most: as many as can be told apart."""
ByLayer = dict[int, float]


def survivors(data: ReportData) -> Plot:
    """Survivors' mean |x1| over the original's, for every setting; token and chunk sparsity of one."""
    drawn = _drawn(data)
    rows = [r for r in data["layers"] if (r["setting"], r["variant"]) in drawn]
    num_layers = 1 + max((r["layer"] for r in rows), default=0)
    sizes = {s: by_layer(rows, s, "survivor_ratio") for s, _ in drawn}
    sizes = {s: found for s, found in sizes.items() if found}
    chunked = next((s for s in _preferred(drawn) if by_layer(rows, s, "chunk_sparsity")), None)
    zeros = {
        "in one token": by_layer(rows, chunked, "sparsity") if chunked else {},
        "in all of 8 consecutive tokens": by_layer(rows, chunked, "chunk_sparsity") if chunked else {},
    }

    def paint(width: int) -> Sheet:
        tall, left, narrow = 210, 40, width < 600
        most = 6 if narrow else 15
        lines = -(-len(sizes) // (2 if narrow else 3))
        above = 62 if narrow else 44  # what the second chart's title and legend take
        second_top = above + 12 + (40 + 18 * lines + tall + 44 if sizes else 0)
        sheet = Sheet(width, second_top + tall + 50 if chunked else 40 + 18 * lines + tall + 50)
        if sizes:
            box = Box(left, 40 + 18 * lines, width - left - 8, tall)
            ax = sheet.axes(*box)
            sheet.title(0, 12, "Mean |x1| of the survivors, the original's mean = 1")
            _sizes(ax, sizes)
            layer_axis(ax, num_layers, most)
            ax.set_xlabel("layer")
            _legend(ax, sheet, 24, 2 if narrow else 3)
        if chunked:
            ax = sheet.axes(left, second_top, width - left - 8, tall)
            sheet.title(0, second_top - above, f"Zeros of {_name(chunked)} (%)")
            _zeros(ax, zeros)
            layer_axis(ax, num_layers, most)
            ax.set_xlabel("layer")
            _legend(ax, sheet, second_top - above + 12, 1 if narrow else 2)
        return sheet

    aid = (
        "Above, how large the activations are that are not zero, beside the dense model's; L1 pulls them towards zero "
        "(activation shrinkage) while keeping only the largest lifts their mean, so settings compare best with each "
        "other. Below, the share of neurons that are zero in one token and in all of 8 consecutive ones: only the "
        "latter can be skipped when 8 tokens are computed at once."
    )
    return Plot(
        "survivors",
        "Survivors and chunks",
        aid,
        _alt(sizes, zeros, chunked, num_layers),
        data.sql["layers"],
        rows if sizes or chunked else [],
        paint if sizes or chunked else None,
        _why_missing(data, rows),
        _remarks(data, drawn, sizes),
    )


def _drawn(data: ReportData) -> list[tuple[str, str]]:
    """(setting, variant) of what is drawn: one variant a setting, never the original."""
    return [(s, v) for s, v in one_each(data).items() if s != "original"][:MOST]


def _preferred(drawn: list[tuple[str, str]]) -> list[str]:
    """The settings whose chunks are drawn, best first: the finished one, then the last of the others."""
    return sorted((s for s, _ in reversed(drawn)), key=lambda s: SHOWN[::-1].index(s) if s in SHOWN else len(SHOWN))


def by_layer(rows: list[Record], setting: str, column: str) -> ByLayer:
    """The mean over corpora of a column, in layers that have one; the mixed corpus alone where it was measured."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["setting"] == setting and is_number(row[column]):
            found.setdefault(row["layer"], {})[row["corpus"]] = row[column]
    return {k: v.get(MIXED, sum(v.values()) / len(v)) for k, v in sorted(found.items())}


def _name(setting: str) -> str:
    return SETTINGS.get(setting, (setting, ""))[0]


def _sizes(ax: Axes, sizes: dict[str, ByLayer]) -> None:
    for i, (setting, found) in enumerate(sizes.items()):
        style: dict[str, Any] = {"color": SERIES[i], "marker": MARKERS[i], "label": _name(setting)}
        ax.plot(list(found), list(found.values()), **style, clip_on=False)
    ax.axhline(1, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.0)
    values = [v for found in sizes.values() for v in found.values()]
    if min(values) > 0 and max(values) > 12 * min(values):
        ax.set_yscale("log")
        ax.minorticks_off()
        ticks = [t for t in _TICKS if min(*values, 1) / 1.5 <= t <= max(*values, 1) * 1.5]
        ax.set_yticks(ticks, [ratio(t) for t in ticks])
    else:
        ax.set_ylim(0, 1.06 * max(*values, 1))
        ax.locator_params(axis="y", nbins=6)
    grid(ax)


_TICKS = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]


def _zeros(ax: Axes, zeros: dict[str, ByLayer]) -> None:
    styles: tuple[dict[str, Any], ...] = ({"color": SERIES[0], "marker": "o"}, {"color": SERIES[1], "marker": "s"})
    for (name, found), style in zip(zeros.items(), styles, strict=True):
        ax.plot(list(found), [100 * v for v in found.values()], label=name, clip_on=False, **style)
    single, chunk = zeros.values()
    both = [k for k in chunk if k in single]
    ax.fill_between(both, [100 * chunk[k] for k in both], [100 * single[k] for k in both], color=SERIES[0], alpha=0.12)
    if both:
        lost = sum(single[k] - chunk[k] for k in both) / len(both)
        where = (0.99, 0.03)
        text = f"{100 * lost:.1f} points lost to chunks, mean over layers"
        ax.annotate(text, where, xycoords="axes fraction", ha="right", va="bottom", fontsize=SMALL, color=INK)
    ax.set_ylim(0, 100.5)
    grid(ax)


def _legend(ax: Axes, sheet: Sheet, top: float, columns: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    anchor = (0, 1 - top / sheet.height)
    sheet.figure.legend(handles, labels, loc="upper left", bbox_to_anchor=anchor, ncols=columns)


def _mean(found: ByLayer) -> float:
    return sum(found.values()) / len(found)


def _alt(sizes: dict[str, ByLayer], zeros: dict[str, ByLayer], chunked: str | None, num_layers: int) -> str:
    parts = []
    for setting, found in sizes.items():
        least = min(found, key=lambda k: found[k])
        parts.append(
            f"{_name(setting)}: survivors {ratio(_mean(found))} the original's mean, least in layer {least} with "
            f"{ratio(found[least])}"
        )
    if chunked:
        single, chunk = zeros.values()
        before = f"zeros {pct(_mean(single))} by token, " if single else "zeros "
        parts.append(f"{_name(chunked)}: {before}{pct(_mean(chunk))} by chunks of 8 tokens")
    return f"Two charts of {num_layers} layers. {'; '.join(parts)}." if parts else ""


def _why_missing(data: ReportData, rows: list[Record]) -> str:
    if not rows:
        return data.why_missing("evaluate", "prosparse")
    return "the evaluations in the store are older than these numbers"


def _remarks(data: ReportData, drawn: list[tuple[str, str]], sizes: dict[str, ByLayer]) -> list[str]:
    remarks = []
    variants = {r["variant"] for r in data["layers"] if r["setting"] != "original"}
    if len(variants) > len(drawn):
        remarks.append(f"{len(variants) - len(drawn)} more variants are in the table and in the ledger.")
    if drawn and not sizes:
        remarks.append("Size of the survivors: n/a, the run has no dense model, or none measured like them.")
    return remarks

"""The rows about speed: what they are called, in which order they stand, and which conditions tell them apart."""

from __future__ import annotations

from typing import Any

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import is_number, pct

KERNELS = {
    "gate": ("gate", "which neurons are active"),
    "s2": ("S2", "up on active neurons"),
    "s3": ("S3", "down on active neurons"),
    "ffn": ("FFN", "gate, up and down"),
    "decode": ("decode", "one token of the model"),
}
"""What is timed: its name, and what it does."""
MAIN = ("s2", "s3", "ffn", "decode")
BASELINES = {"torch": "dense torch", "dense": "our own dense kernel"}
MOST_BARS = 24
CONDITIONS = {
    "dtype": "{}",
    "num_tokens": "{} at once",
    "d_model": "d_model {}",
    "d_ff": "d_ff {}",
    "mask_source": "{} mask",
    "threads": "{}",
    "timer": "{} timer",
    "cache": "{} cache",
    "device": "on {}",
    "cpu": "{}",
}


def kernel_name(kernel: str) -> str:
    name, about = KERNELS.get(kernel, (kernel, ""))
    return f"{name}, {about}" if about else name


def in_order(rows: list[Record]) -> list[Record]:
    """By kernel (S2, S3, FFN, decode, then others), implementation and baseline."""
    order = [*MAIN, *sorted({r["kernel"] for r in rows} - set(MAIN))]
    known = list(BASELINES)

    def place(row: Record) -> tuple[int, str, int, float]:
        baseline = row.get("baseline")
        return (
            order.index(row["kernel"]),
            row["provider"],
            known.index(baseline) if baseline in known else len(known),
            row["sparsity"] or 0.0,
        )

    return sorted(rows, key=place)


def baseline_name(provider: str) -> str:
    return BASELINES.get(provider, provider)


def condition(column: str, value: Any) -> str:
    """One condition in words."""
    if column in ("num_tokens", "threads"):
        noun = "token" if column == "num_tokens" else "thread"
        value = f"{value} {noun}{'' if value == 1 else 's'}"
    return CONDITIONS[column].format(value)


def shared_conditions(rows: list[Record]) -> list[str]:
    """The conditions that are the same for all rows."""
    shared = []
    for column in CONDITIONS:
        values = {r[column] for r in rows if r[column] is not None}
        if len(values) == 1:
            shared.append(condition(column, values.pop()))
    return shared


def own_conditions(row: Record, rows: list[Record]) -> list[str]:
    """The conditions in which a row differs from others of its kernel."""
    same = [r for r in rows if r["kernel"] == row["kernel"]]
    own = [
        condition(column, row[column])
        for column in CONDITIONS
        if row[column] is not None and len({r[column] for r in same}) > 1
    ]
    if len({r.get("swept_sparsity") for r in same}) > 1 and is_number(row["sparsity"]):
        own.insert(0, f"{pct(row['sparsity'], 0)} zeros")
    return own


def bars(data: ReportData) -> tuple[list[Record], int]:
    """What is drawn, in order, and how many more there are: the model's own masks rather than random ones."""
    rows: list[Record] = [
        *({**r, "state": "passed"} for r in data["speedups"] if is_number(r["speedup"])),
        *(
            {**r, "state": "failed" if r["num_checked"] else "unchecked", "swept_sparsity": None}
            for r in data["refused"]
        ),
    ]
    own = [r for r in rows if r["setting"]]
    chosen = [r for r in (own or rows) if r["kernel"] in MAIN] or own or rows
    return in_order(chosen)[:MOST_BARS], len(rows) - min(len(chosen), MOST_BARS)

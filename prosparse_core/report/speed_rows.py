"""The rows about speed: what they are called, in which order they stand, and which conditions tell them apart."""

from __future__ import annotations

from typing import Any

from prosparse_core.report.data import Record, ReportData
from prosparse_core.report.format import is_number, number, pct, ratio

KERNELS = {
    "gate": ("gate", "which neurons are active"),
    "s2": ("S2", "up on active neurons"),
    "s3": ("S3", "down on active neurons"),
    "ffn": ("FFN", "gate, up and down"),
    "decode": ("decode", "one token of the model"),
}
"""What is timed: its name, and what it does."""
MAIN = ("s2", "s3", "ffn", "decode")
BASELINES = {
    "torch": "dense torch",
    "transformers_dense": "dense transformers",
    "native_dense": "our own dense kernel",
    "dense": "our own dense kernel",
}
PROVIDERS = {
    "transformers_sparse": "sparse FFNs",
    "transformers_dense": "transformers",
    "native_exact": "our loop, exact",
    "native_certified": "our loop, certified gate",
    "native_predicted": "our loop, predicted neurons",
    "llama_cpp": "llama.cpp",
}
OWN = ("native_dense", "dense")
"""Baselines of our own: what skipping gains by itself, apart from better code."""
ABOVE = "\u202f!"
MOST_BARS = 24
CONDITIONS = {
    "dtype": "{}",
    "num_tokens": "{} at once",
    "prompt_tokens": "after {}",
    "d_model": "d_model {}",
    "d_ff": "d_ff {}",
    "mask_source": "{} mask",
    "threads": "{}",
    "timer": "{} timer",
    "cache": "{} cache",
    "device": "on {}",
    "cpu": "{}",
    "cutoff": "cutoff {:g}",
}


def kernel_name(kernel: str) -> str:
    name, about = KERNELS.get(kernel, (kernel, ""))
    return f"{name}, {about}" if about else name


def in_order(rows: list[Record]) -> list[Record]:
    """By kernel (S2, S3, FFN, decode, then others), the model's own masks first, implementation and baseline."""
    order = [*MAIN, *sorted({r["kernel"] for r in rows} - set(MAIN))]
    known = list(BASELINES)

    def place(row: Record) -> tuple[int, bool, str, int, float, int]:
        baseline = row.get("baseline")
        return (
            order.index(row["kernel"]),
            row["mask_source"] != "recorded",
            row["provider"],
            known.index(baseline) if baseline in known else len(known),
            row["sparsity"] or 0.0,
            row["prompt_tokens"] or 0,
        )

    return sorted(rows, key=place)


def baseline_name(provider: str) -> str:
    return BASELINES.get(provider, provider_name(provider))


def provider_name(provider: str) -> str:
    return PROVIDERS.get(provider, provider.replace("_", " "))


def condition(column: str, value: Any) -> str:
    """One condition in words."""
    if column in ("num_tokens", "prompt_tokens", "threads"):
        noun = "thread" if column == "threads" else "token"
        value = f"{value} {noun}{'' if value == 1 else 's'}"
    return CONDITIONS[column].format(str(value).replace("_", " ") if column in ("timer", "cache") else value)


def shared_conditions(rows: list[Record]) -> list[str]:
    """The conditions that are the same for all rows, or at least for all rows of a kernel, which is then named."""
    kernels = list(dict.fromkeys(r["kernel"] for r in rows))
    shared = []
    for column in CONDITIONS:
        of_kernel = {k: {r[column] for r in rows if r["kernel"] == k} for k in kernels}
        if any(len(values) > 1 for values in of_kernel.values()):
            continue
        by_value: dict[Any, list[str]] = {}
        for kernel, values in of_kernel.items():
            by_value.setdefault(next(iter(values)), []).append(KERNELS.get(kernel, (kernel,))[0])
        for value, names in by_value.items():
            if value is not None:
                shared.append(condition(column, value) + (f" ({', '.join(names)})" if len(by_value) > 1 else ""))
    return shared


def own_conditions(row: Record, rows: list[Record]) -> list[str]:
    """The conditions in which a row differs from others of its kernel."""
    same = [r for r in rows if r["kernel"] == row["kernel"]]
    own = [
        condition(column, row[column])
        for column in CONDITIONS
        if row[column] is not None and len({r[column] for r in same}) > 1
    ]
    if len({pct(r["sparsity"], 0) for r in same}) > 1 and is_number(row["sparsity"]):
        own.insert(0, f"{pct(row['sparsity'], 0)} zeros")
    return own


def bars(data: ReportData) -> tuple[list[Record], int]:
    """What is drawn, in order, and how many more rows there are.

    Over the best dense kernel alone; the model's own masks rather than random ones, S2, S3, FFN and decode, what
    computes the same as the baseline, and the shortest prompts, where there are such rows. ``state`` is passed or
    refused.
    """
    rows = [
        *({**r, "state": "passed"} for r in data["speedups"] if is_number(r["speedup"]) and r["is_best"]),
        *({**r, "state": "refused"} for r in data["refused"]),
    ]
    chosen, shortest = rows, min((r["prompt_tokens"] for r in rows if r["prompt_tokens"]), default=None)
    for is_wanted in (
        lambda r: r["setting"] is not None,
        lambda r: r["mask_source"] == "recorded",
        lambda r: r["kernel"] in MAIN,
        lambda r: r["cutoff"] is None,
        lambda r: r["prompt_tokens"] in (None, shortest),
    ):
        chosen = [r for r in chosen if is_wanted(r)] or chosen
    return in_order(chosen)[:MOST_BARS], len(rows) - min(len(chosen), MOST_BARS)


def why_refused(row: Record) -> str:
    """Why a row has no speed-up."""
    error = f" (relative error {number(row['rel_err'], 2)})" if is_number(row["rel_err"]) else ""
    said = row["note"] or ("failed its correctness check" if row["num_checked"] else "was not checked for correctness")
    return f"{said}{error}"


def marked(row: Record) -> str:
    """A speed-up, with a mark where it is above the byte ratio."""
    return ratio(row["speedup"]) + (ABOVE if row["above_byte_ratio"] else "")

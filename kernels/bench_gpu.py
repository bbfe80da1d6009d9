"""Measures the GPU kernels beside dense torch: ``python -m kernels.bench_gpu``. Needs a CUDA device, and says so.

Correctness first: what does not agree with float64 is reported without times. Then every kernel runs on one copy of a
layer after another, so that weights come from memory; a CUDA graph holds one call a copy and events time its replay.
Launching is measured apart. Answers in JSON; predictions are a list of their own and never a measurement.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from kernels import roofline
from kernels.bench_gpu_case import DTYPES, Row, bench_case
from kernels.bench_gpu_timing import CudaDevice, Device, measure, percentile
from kernels.gpu_peak import Peak, peak_of

MEMORY_SHARE = 0.8  # of the free memory that copies of the weights may take
NO_GPU = (
    "bench_gpu: there is no CUDA device here, so nothing was measured. "
    "`python -m kernels.roofline` prints what these kernels should take on an A100 and an H100."
)
Value = TypeVar("Value")


def launch_costs(device: Device, where: str, rounds: int) -> dict[str, float]:
    """Medians in microseconds of a kernel that does nothing, by the names of ``Times``: the floor below all others."""
    nothing = torch.zeros(4, device=where)
    times = measure(device, {"nothing": [nothing.zero_] * 32}, rounds)["nothing"]
    return {f"{name}_us": percentile(values, 50) for name, values in vars(times).items()}


def predictions(rows: Sequence[Row], gpu: roofline.Gpu | None) -> list[dict[str, object]]:
    """What ``kernels.roofline`` says of the same rows, for a GPU whose peaks are known; else nothing."""
    if gpu is None:
        return []
    found: list[dict[str, object]] = []
    for row in rows:
        if row.provider != "triton_deterministic":
            live = None if row.provider == "torch" else row.live
            shape = roofline.Shape("", row.d_model, row.d_ff)
            guess = roofline.predict(gpu, shape, row.kernel, live, dtype=row.dtype, num_tokens=row.num_tokens)
            found.append({"kind": "predicted", "provider": row.provider, **asdict(guess)})
    return found


def beside_peak(row: Row, peak: Peak) -> dict[str, object]:
    """A row with ``peak_share``: of the device's own bandwidth; None where either is not known."""
    known = row.gbps is not None and peak.bandwidth_gbps is not None
    return {**asdict(row), "peak_share": row.gbps / peak.bandwidth_gbps if known else None}  # type: ignore[operator]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: measured; 1: a kernel failed its gate; 2: bad arguments; 3: no CUDA device."""
    asked = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 3
    device, where = CudaDevice(), "cuda"
    peak = peak_of(torch.cuda.get_device_properties(torch.cuda.current_device()))
    if peak.reason:
        print(f"bench_gpu: {peak.reason}", file=sys.stderr)
    answer: dict[str, Any] = {
        "kind": "measured", "gpu": peak.name, "peak": asdict(peak), "l2_bytes": device.l2_bytes,
        "torch": torch.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
        "launch": launch_costs(device, where, asked.rounds),
    }  # fmt: skip
    rows: list[Row] = []
    for d_model, d_ff in asked.shapes:
        for sparsity in asked.sparsity:
            for num_tokens in asked.tokens:
                print(f"{d_model}x{d_ff}, sparsity {sparsity}, {num_tokens} tokens", file=sys.stderr)
                torch.cuda.empty_cache()
                rows += bench_case(
                    device, where, d_model=d_model, d_ff=d_ff, dtype=asked.dtype, sparsity=sparsity,
                    num_tokens=num_tokens, rounds=asked.rounds, seed=asked.seed,
                    memory_bytes=MEMORY_SHARE * torch.cuda.mem_get_info()[0],
                )  # fmt: skip
    answer |= {"rows": [beside_peak(row, peak) for row in rows], "predicted": predictions(rows, peak.gpu)}
    text = json.dumps(answer, indent=1, allow_nan=False, default=str)
    if asked.output:
        asked.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0 if all(row.gate_passed for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench_gpu", description="Measures the GPU kernels beside dense torch.",
        epilog="exit codes: 0 measured, 1 a kernel failed its gate, 2 bad arguments, 3 no CUDA device",
    )  # fmt: skip
    names = ", ".join(shape.model for shape in roofline.SHAPES)
    parser.add_argument(
        "--shapes", type=_list(_shape), default=_list(_shape)("llama2-7b,llama2-13b"),
        help=f"comma-separated: D x F as 4096x11008, or {names} (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--sparsity", type=_list(_share), default=[0.8932], help="shares of zeros, comma-separated (default: 0.8932)"
    )
    parser.add_argument(
        "--tokens", type=_list(_tokens), default=[1, 2, 4, 8], help="tokens a call, 1 to 8 (default: 1,2,4,8)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and vectors (default: bf16)")
    parser.add_argument("--rounds", type=_positive, default=50, help="measurements of each kernel (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and inputs (default: 0)")
    parser.add_argument("--output", type=Path, help="write the JSON there instead of to standard output")
    return parser


def _list(item: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    def values(text: str) -> list[Value]:
        return [item(part.strip()) for part in text.split(",")]

    return values


def _shape(text: str) -> tuple[int, int]:
    for shape in roofline.SHAPES:
        if text == shape.model:
            return shape.d_model, shape.d_ff
    d_model, _, d_ff = text.partition("x")
    if not (d_model.isdecimal() and d_ff.isdecimal() and int(d_model) and int(d_ff)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: D x F as 4096x11008, or a model's name")
    return int(d_model), int(d_ff)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1")
    return value


def _tokens(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= roofline.MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r}: from 1 to {roofline.MAX_TOKENS} tokens")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

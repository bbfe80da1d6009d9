"""How long the GPU kernels should take, from the bytes they move: predictions, never measurements.

``python -m kernels.roofline`` prints them beside the times the paper measured. A time is the sum over launches of a
fixed cost and of max(bytes / bandwidth, operations / rate). Every number a prediction rests on is a field of
``Assumptions`` or ``Gpu``; none of them was fitted to a run of these kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

KERNELS = ("s2", "s3", "k1", "k2", "ffn")
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MAX_TOKENS = 8


@dataclass(frozen=True)
class Gpu:
    """Peak figures of NVIDIA's data sheets: 1e12 bytes/s, 1e12 operations/s without structured sparsity."""

    name: str
    bandwidth_tbps: float
    fp32_tflops: float
    tf32_tflops: float


GPUS = (
    Gpu("A100-80G", 2.04, 19.5, 156.0),
    Gpu("H100-80G", 3.35, 67.0, 494.0),
)


@dataclass(frozen=True)
class Shape:
    model: str
    d_model: int
    d_ff: int


SHAPES = (Shape("llama2-7b", 4096, 11008), Shape("llama2-13b", 5120, 13824))


@dataclass(frozen=True)
class Assumptions:
    """What the data sheets do not say.

    ``achieved``: share of the peak bandwidth that a long stream of 128-bit copies reaches. ``launch_us``: from the end
    of one kernel to the start of the next inside a CUDA graph. ``ramp_us``: what a kernel that streams weights waits
    for its first bytes and loses in its last wave. Weights come from memory, not from the L2 cache; each byte is moved
    once; x, lists and results are served by the L2 cache but counted; conversions and sums hide behind the copies.
    """

    achieved: float = 0.85
    launch_us: float = 1.5
    ramp_us: float = 1.0


@dataclass(frozen=True)
class Published:
    """A time of the paper: A100, bfloat16, one token, wall clock around a synchronised call (hence launch and wait)."""

    model: str
    setting: str
    sparsity_pct: float | None  # None: dense torch
    s2_us: float
    s3_us: float
    source: str


_TABLE_2, _CARD = "arXiv 2402.13516 Table 2", "ProSparse-LLaMA-2-7B model card, early revision"
PUBLISHED = (
    Published("llama2-7b", "original", None, 90.55, 82.92, _TABLE_2),
    Published("llama2-7b", "relullama", 66.98, 67.12, 63.00, _TABLE_2),
    Published("llama2-7b", "vanilla_relu", 66.04, 67.85, 63.28, _CARD),
    Published("llama2-7b", "fixed_l1", 91.46, 40.99, 54.19, _CARD),
    Published("llama2-7b", "prosparse_star", 88.11, 46.66, 55.56, _TABLE_2),
    Published("llama2-7b", "prosparse", 89.32, 45.38, 55.05, _TABLE_2),
    Published("llama2-13b", "original", None, 131.36, 113.68, _TABLE_2),
    Published("llama2-13b", "relullama", 71.56, 69.92, 75.47, _TABLE_2),
    Published("llama2-13b", "prosparse_star", 87.97, 55.29, 67.50, _TABLE_2),
    Published("llama2-13b", "prosparse", 88.80, 53.78, 66.73, _TABLE_2),
)


@dataclass(frozen=True)
class Prediction:
    """``predicted_us`` of one kernel on one GPU; ``ideal_us`` is its bytes at the peak bandwidth and nothing else.

    ``kernel``: s2, s3, k1 (gate, threshold, up), k2 (down), ffn; ``live`` is the share of neurons that live for any of
    the tokens, None for dense torch. ``num_launches`` counts everything on the device, clears and casts included.
    """

    gpu: str
    kernel: str
    d_model: int
    d_ff: int
    dtype: str
    num_tokens: int
    live: float | None
    num_bytes: float
    num_launches: int
    ideal_us: float
    predicted_us: float


@dataclass(frozen=True)
class _Launch:
    """Bytes and operations of one launch; ``streams``: it reads weights."""

    num_bytes: float
    flops: float = 0.0
    streams: bool = False


def predict(
    gpu: Gpu,
    shape: Shape,
    kernel: str,
    live: float | None,
    *,
    dtype: str = "bf16",
    num_tokens: int = 1,
    assumptions: Assumptions | None = None,
) -> Prediction:
    """What ``triton_ffn`` (or dense torch, ``live=None``) should take. ValueError for arguments out of range.

    Several tokens go to K1 and K2 together (tensor cores); s2 and s3 take one token, and dense torch has no k1 or k2.
    """
    _check(kernel, live, dtype, num_tokens)
    assume = assumptions or Assumptions()
    launches = (_dense if live is None else _sparse)(shape, kernel, live or 0.0, DTYPE_BYTES[dtype], num_tokens)
    rate = gpu.fp32_tflops if num_tokens == 1 else gpu.tf32_tflops / (3 if dtype == "fp32" else 1)
    num_bytes = sum(launch.num_bytes for launch in launches)
    predicted_us = sum(
        assume.launch_us
        + assume.ramp_us * launch.streams
        + max(launch.num_bytes / (gpu.bandwidth_tbps * assume.achieved), launch.flops / rate) / 1e6
        for launch in launches
    )
    ideal_us = num_bytes / gpu.bandwidth_tbps / 1e6
    return Prediction(
        gpu.name, kernel, shape.d_model, shape.d_ff, dtype, num_tokens, live, num_bytes, len(launches), ideal_us,
        predicted_us,
    )  # fmt: skip


def _check(kernel: str, live: float | None, dtype: str, num_tokens: int) -> None:
    if kernel not in KERNELS or dtype not in DTYPE_BYTES:
        raise ValueError(f"kernel {kernel!r} in {dtype!r}: one of {', '.join(KERNELS)} in {', '.join(DTYPE_BYTES)}")
    if live is not None and not 0.0 <= live <= 1.0:
        raise ValueError(f"live is {live}: a share of neurons from 0 to 1, or None for dense torch")
    most = 1 if kernel in ("s2", "s3") else MAX_TOKENS
    if not 1 <= num_tokens <= most:
        raise ValueError(f"num_tokens is {num_tokens}: {kernel} takes from 1 to {most}")
    if live is None and kernel in ("k1", "k2"):
        raise ValueError(f"{kernel} fuses what dense torch does in several launches: compare ffn, s2 or s3")


def _sparse(shape: Shape, kernel: str, live: float, size: int, tokens: int) -> list[_Launch]:
    """The launches of ``TritonFFN`` with atomics, in order. float32 lists and sums, ``size`` bytes a weight."""
    d, f = shape.d_model, shape.d_ff
    width = 1 if tokens == 1 else MAX_TOKENS  # of a row of x1 and of the list

    def product(rows: float) -> tuple[float, float]:
        return rows * d * size, 2.0 * rows * d * width

    clear, cast = _Launch(4.0 * tokens * d), _Launch((4.0 + size) * tokens * d)
    num_live, listed = live * f, live * f * (4.0 + 4.0 * width)
    # several tokens with more live neurons than half of F: the list overflows and down is read whole
    down_bytes, down_flops = product(f if tokens > 1 and live > 0.5 else num_live)
    k2 = _Launch(down_bytes + listed + 4.0 * tokens * d, down_flops, streams=True)
    up_bytes, up_flops = product(num_live)
    if kernel == "s2":
        return [_Launch(up_bytes + d * size + 8.0 * f, up_flops, streams=True)]
    if kernel == "s3":
        return [clear, _Launch(4.0 * f + listed), k2, _Launch(8.0 * d)]
    gate_bytes, gate_flops = product(f)
    k1 = _Launch(
        gate_bytes + up_bytes + tokens * d * size + 4.0 * f * width + listed, gate_flops + up_flops, streams=True
    )
    return {"k1": [k1], "k2": [k2], "ffn": [clear, k1, k2, cast]}[kernel]


def _dense(shape: Shape, kernel: str, _live: float, size: int, tokens: int) -> list[_Launch]:
    """torch: one matrix product a launch, one elementwise launch for the activation and one for the product."""
    d, f = shape.d_model, shape.d_ff
    matrix = _Launch(d * f * size + tokens * (d + f) * size, 2.0 * d * f * tokens, streams=True)
    activation, times = _Launch(2.0 * tokens * f * size), _Launch(3.0 * tokens * f * size)
    return {"s2": [matrix, times], "s3": [matrix], "ffn": [matrix, activation, matrix, times, matrix]}[kernel]


def beside_published(gpus: Sequence[Gpu] = GPUS, assumptions: Assumptions | None = None) -> list[dict[str, object]]:
    """Rows of a prediction and, for s2 and s3, the paper's time of the same model and sparsity (``published_us``).

    The two differ in more than the kernel: the paper's clock includes a launch and a wait for the host in every call.
    """
    rows: list[dict[str, object]] = []
    shapes = {shape.model: shape for shape in SHAPES}
    for gpu in gpus:
        for entry in PUBLISHED:
            live = None if entry.sparsity_pct is None else 1.0 - entry.sparsity_pct / 100.0
            for kernel in KERNELS if live is not None else ("s2", "s3", "ffn"):
                published_us = {"s2": entry.s2_us, "s3": entry.s3_us}.get(kernel)
                found = asdict(predict(gpu, shapes[entry.model], kernel, live, assumptions=assumptions))
                same_gpu = gpu.name.startswith("A100")  # the paper's
                rows.append(
                    {"kind": "predicted", "model": entry.model, "setting": entry.setting, **found}
                    | {"published_us": published_us if same_gpu else None, "published_source": entry.source}
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the rows and the assumptions as JSON")
    asked = parser.parse_args(arguments)
    rows, assume = beside_published(), Assumptions()
    if asked.json:
        json.dump({"assumptions": asdict(assume), "gpus": [asdict(gpu) for gpu in GPUS], "rows": rows}, sys.stdout)
        print()
        return 0
    print("Predicted from bytes moved; nothing here was measured by this program. bf16, one token, microseconds.")
    print(
        f"Assumed: {assume.achieved:.0%} of the peak bandwidth, {assume.launch_us} us a launch in a CUDA graph, "
        f"{assume.ramp_us} us a kernel that reads weights.\n"
        "Published: the paper's A100, wall clock around synchronised calls.\n"
    )
    head = f"{'gpu':<10}{'model':<12}{'setting':<16}{'live %':>7}{'kernel':>8}"
    print(f"{head}{'ideal':>9}{'predicted':>11}{'published':>11}")
    for row in rows:
        live, published = row["live"], row["published_us"]
        print(
            f"{row['gpu']:<10}{row['model']:<12}{row['setting']:<16}"
            f"{'dense' if live is None else f'{100 * live:.2f}':>7}{row['kernel']:>8}"  # type: ignore[operator]
            f"{row['ideal_us']:>9.1f}{row['predicted_us']:>11.1f}"
            f"{'–' if published is None else f'{published:.2f}':>11}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

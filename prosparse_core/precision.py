"""The device and the autocast precision of forward passes; weights stay fp32."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "bf16"]


def resolve(precision: str, device: str = "cpu") -> Precision:
    """``auto`` is bf16 where the hardware multiplies it natively, else fp32; a fixed choice stays as it is."""
    if precision == "auto":
        return "bf16" if _has_native_bf16(device) else "fp32"
    assert precision in ("fp32", "bf16")
    return precision  # type: ignore[return-value]


def _has_native_bf16(device: str) -> bool:
    if device == "cuda":
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_device(device: str) -> str:
    """``auto`` is cuda where there is one. Imports torch only when it must look."""
    if device != "auto":
        return device
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast(precision: Precision, device: str = "cpu") -> AbstractContextManager[object]:
    """The context in which a forward pass runs."""
    if precision == "fp32":
        return contextlib.nullcontext()
    import torch

    return torch.autocast(device, torch.bfloat16)

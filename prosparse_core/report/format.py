"""Values as people read them in the report. The only place where numbers are rounded, and only to be shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeGuard

NA = "n/a"
MINUS = "\u2212"
SPACE = "\u00a0"
"""Between a number and its unit: they stay on one line."""


def is_number(value: Any) -> TypeGuard[float]:
    """A finite int or float; not a bool, not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """``digits`` significant digits, without an exponent between 1e-4 and 1e6."""
    if not is_number(value):
        return NA
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        digits_, _, exponent = f"{value:.{max(0, digits - 2)}e}".partition("e")
        return f"{digits_}e{int(exponent)}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def plain(value: Any, digits: int = 3) -> str:
    """``digits`` significant digits without trailing zeros: settings such as a threshold, and marks on an axis."""
    text = number(value, digits)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def spread(value: Any, stderr: Any) -> tuple[str, str]:
    """(value, ± stderr): the value with as many decimals as two digits of its standard error need."""
    if not is_number(value) or not is_number(stderr) or stderr <= 0:
        return number(value), ""
    decimals = min(6, max(0, 1 - math.floor(math.log10(stderr))))
    return f"{value:,.{decimals}f}".replace("-", MINUS), f"± {stderr:,.{decimals}f}"


def pct(fraction: Any, decimals: int = 1) -> str:
    """A fraction of 1 in per cent; 0 and 100 are written so only when they are exact."""
    if not is_number(fraction):
        return NA
    if fraction in (0, 1):
        return f"{100 * fraction:.0f}{SPACE}%"
    while decimals < 4 and float(f"{100 * fraction:.{decimals}f}") in (0.0, 100.0):
        decimals += 1
    if 0 < fraction < 1 and float(f"{100 * fraction:.{decimals}f}") in (0.0, 100.0):
        return f"<{SPACE}0.0001{SPACE}%" if fraction < 0.5 else f">{SPACE}99.9999{SPACE}%"
    return f"{100 * fraction:.{decimals}f}{SPACE}%".replace("-", MINUS)


def ratio(value: Any) -> str:
    """``1.93×``."""
    return NA if not is_number(value) else f"{value:.3g}×" if value < 0.1 else f"{value:,.2f}×"


def interval(low: Any, high: Any, shown: Callable[[float], str] | None = None) -> str:
    """``1.09 to 1.24``: a 95 % interval; empty where there is none."""
    shown = shown or (lambda value: f"{value:,.2f}")
    return f"{shown(low)} to {shown(high)}" if is_number(low) and is_number(high) else ""


def duration(seconds: Any) -> str:
    """``3 h 05 min``, ``4 min 10 s``, ``7.2 s``."""
    if not is_number(seconds):
        return NA
    if seconds < 60:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest:02d}{SPACE}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{SPACE}h {minutes:02d}{SPACE}min" if hours < 48 else f"{hours / 24:.1f}{SPACE}days"


def size(num_bytes: Any) -> str:
    """``1.4 GiB``."""
    if not is_number(num_bytes):
        return NA
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.{0 if unit == 'B' else 1}f}{SPACE}{unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f}{SPACE}GiB"


def count(value: Any) -> str:
    """``174,080``; from ten million on ``89.1 M`` or ``34.6 G``."""
    if not is_number(value):
        return NA
    for factor, unit in ((1e9, "G"), (1e6, "M")):
        if value >= 10 * factor:
            return f"{value / factor:,.1f}{SPACE}{unit}"
    return f"{value:,.0f}"


def when(time: Any) -> str:
    """A time of the ledger, which is UTC."""
    return f"{time:%Y-%m-%d %H:%M} UTC" if isinstance(time, datetime) else NA


def short(digest: Any) -> str:
    """The beginning of a digest: enough for ``lineage_of``."""
    return str(digest)[:12] if digest else NA


def clip(text: str, length: int) -> str:
    """At most ``length`` characters, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: max(1, length - 1)].rstrip() + "…"

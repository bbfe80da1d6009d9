# mypy: disable-error-code="no-untyped-def"
# (the arguments of a jitted function are triton's values, which have no Python type)
"""The GPU kernels of one token, and the list of live neurons that they share with the kernels of several tokens.

Row-major ``[F, D]`` matrices, sums in float32, any D and F: tiles are masked at the edges. A list has room for
``capacity`` neurons. ``count`` goes on counting when it is full, so the kernel that reads the list knows that neurons
are missing from it and takes x1 in row order instead, which is complete: no host has to look.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot_rows(x_ptr, w_ptr, rows, mask, D, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr):
    """x . w[rows] for the rows under the mask; masked rows are not read."""
    cols = tl.arange(0, COLS)
    base = rows.to(tl.int64)[:, None] * D
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in tl.range(0, D, COLS, num_stages=STAGES):
        k = start + cols
        w = tl.load(
            w_ptr + base + k[None, :],
            mask=mask[:, None] & (k < D)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_ptr + k, mask=k < D, other=0.0, eviction_policy="evict_last")
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    return tl.sum(total, 1)


@triton.jit
def gate_up_kernel(
    x_ptr, gate_ptr, up_ptr, list_row_ptr, list_value_ptr, count_ptr, x1_ptr, F, D, capacity, threshold,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    """x1[F] of ROWS neurons, zeros included. APPEND: live ones also go to the list, in any order."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < F
    gate = _dot_rows(x_ptr, gate_ptr, rows, inside, D, ROWS, COLS, STAGES)
    live = inside & tl.where(threshold > 0.0, gate >= threshold, gate > 0.0)
    num_live = tl.sum(live.to(tl.int32), 0)
    value = tl.zeros((ROWS,), dtype=tl.float32)
    if num_live > 0:
        value = tl.where(live, gate * _dot_rows(x_ptr, up_ptr, rows, live, D, ROWS, COLS, STAGES), 0.0)
        if APPEND:
            place = tl.atomic_add(count_ptr, num_live) + tl.cumsum(live.to(tl.int32), 0) - 1
            fits = live & (place < capacity)
            tl.store(list_row_ptr + place, rows, mask=fits)
            tl.store(list_value_ptr + place, value, mask=fits)
    tl.store(x1_ptr + rows, value, mask=inside)


@triton.jit
def s2_kernel(
    s_ptr, x_ptr, up_ptr, x1_ptr, F, D,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x1 = s * (x w_up^T) for ROWS neurons; rows whose s is 0 are not read."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < F
    s = tl.load(s_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    live = inside & (s != 0.0)
    value = tl.zeros((ROWS,), dtype=tl.float32)
    if tl.sum(live.to(tl.int32), 0) > 0:
        value = tl.where(live, s * _dot_rows(x_ptr, up_ptr, rows, live, D, ROWS, COLS, STAGES), 0.0)
    tl.store(x1_ptr + rows, value, mask=inside)


@triton.jit
def _load_rows(x1_ptr, rows, mask, TOKENS: tl.constexpr):
    """x1[F, TOKENS] of those rows, and 1 for each row that is not zero for every token."""
    tokens = tl.arange(0, TOKENS)
    value = tl.load(x1_ptr + rows[:, None] * TOKENS + tokens[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    return value, tl.max((value != 0.0).to(tl.int32), 1)


@triton.jit
def compact_kernel(
    x1_ptr, list_row_ptr, list_value_ptr, count_ptr, F, capacity,
    SCAN_ROWS: tl.constexpr, BEFORE_ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The list of live neurons in row order. Each program counts what lies before its rows: no atomics, one result."""
    first = tl.program_id(0) * SCAN_ROWS
    seen = tl.zeros((BEFORE_ROWS,), dtype=tl.int32)
    for start in range(0, first, BEFORE_ROWS):
        earlier = start + tl.arange(0, BEFORE_ROWS)
        _, is_live = _load_rows(x1_ptr, earlier, earlier < first, TOKENS)
        seen += is_live
    before = tl.sum(seen, 0)
    rows = first + tl.arange(0, SCAN_ROWS)
    value, live = _load_rows(x1_ptr, rows, rows < F, TOKENS)
    place = before + tl.cumsum(live, 0) - 1
    fits = (live > 0) & (place < capacity)
    tl.store(list_row_ptr + place, rows, mask=fits)
    tl.store(list_value_ptr + place[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :], value, mask=fits[:, None])
    if first + SCAN_ROWS >= F:
        tl.store(count_ptr, before + tl.sum(live, 0))


@triton.jit
def down_kernel(
    list_row_ptr, list_value_ptr, count_ptr, x1_ptr, down_ptr, y_ptr, F, D, capacity,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """COLS values of y from one part in SPLIT of the list, or of x1[F] when the list overflowed.

    ATOMIC: added into y[D]; else stored in y[SPLIT, D].
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    part = tl.program_id(1)
    count = tl.load(count_ptr)
    full = count > capacity
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in tl.range(part * ROWS, tl.where(full, F, count), SPLIT * ROWS, num_stages=STAGES):
        place = start + tl.arange(0, ROWS)
        listed = (place < count) & (not full)
        row = tl.load(list_row_ptr + place, mask=listed, other=0)
        row = tl.where(full, place, row)
        value = tl.load(list_value_ptr + place, mask=listed, other=0.0)
        value += tl.load(x1_ptr + place, mask=(place < F) & full, other=0.0).to(tl.float32)
        w = tl.load(
            down_ptr + row.to(tl.int64)[:, None] * D + cols[None, :],
            mask=(value != 0.0)[:, None] & (cols < D)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total += w.to(tl.float32) * value[:, None]
    y = tl.sum(total, 0)
    if ATOMIC:
        tl.atomic_add(y_ptr + cols, y, mask=cols < D, sem="relaxed")
    else:
        tl.store(y_ptr + part * D + cols, y, mask=cols < D)


@triton.jit
def reduce_kernel(part_ptr, y_ptr, num_values, SPLIT: tl.constexpr, COLS: tl.constexpr):
    """y[num_values] = the sum of the SPLIT parts, in a fixed order."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    parts = tl.arange(0, SPLIT)
    inside = (cols < num_values)[None, :]
    values = tl.load(part_ptr + parts[:, None] * num_values + cols[None, :], mask=inside, other=0.0)
    tl.store(y_ptr + cols, tl.sum(values, 0), mask=cols < num_values)

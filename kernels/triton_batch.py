# mypy: disable-error-code="no-untyped-def"
# (the arguments of a jitted function are triton's values, which have no Python type)
"""The GPU kernels of 2 to TOKENS tokens at once: a neuron is read if it lives for any of them, and read once for all.

x and y are ``[num_tokens, D]``, x1 and the list's values ``[rows, TOKENS]`` with zeros where a token does not use the
neuron. Products go to the tensor cores in tf32, with three products in place of one where an operand has more bits
than tf32 keeps ("tf32x3"): bfloat16 and float16 fit and are exact, so the rounding stays that of float32 sums.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot_tokens(
    x_ptr, w_ptr, rows, mask, num_tokens, D,
    ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w[rows] x^T ``[ROWS, TOKENS]``; rows outside the mask are not read, tokens past num_tokens are 0."""
    cols = tl.arange(0, COLS)
    tokens = tl.arange(0, TOKENS)
    base = rows.to(tl.int64)[:, None] * D
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in tl.range(0, D, COLS, num_stages=STAGES):
        k = start + cols
        w = tl.load(
            w_ptr + base + k[None, :],
            mask=mask[:, None] & (k < D)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(
            x_ptr + tokens[None, :] * D + k[:, None],
            mask=(tokens < num_tokens)[None, :] & (k < D)[:, None],
            other=0.0,
            eviction_policy="evict_last",
        )
        total = tl.dot(w.to(tl.float32), x.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def gate_up_batch_kernel(
    x_ptr, gate_ptr, up_ptr, list_row_ptr, list_value_ptr, count_ptr, x1_ptr, num_tokens, F, D, capacity, threshold,
    ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    APPEND: tl.constexpr,
):  # fmt: skip
    """x1[F, TOKENS] of ROWS neurons, zeros included. APPEND: rows that live for a token also go to the list."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    inside = rows < F
    gate = _dot_tokens(x_ptr, gate_ptr, rows, inside, num_tokens, D, ROWS, COLS, TOKENS, STAGES, PRECISION)
    fires = tl.where(threshold > 0.0, gate >= threshold, gate > 0.0)
    fires = fires & inside[:, None] & (tokens < num_tokens)[None, :]
    live = tl.max(fires.to(tl.int32), 1)
    num_live = tl.sum(live, 0)
    value = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    if num_live > 0:
        up = _dot_tokens(x_ptr, up_ptr, rows, live > 0, num_tokens, D, ROWS, COLS, TOKENS, STAGES, PRECISION)
        value = tl.where(fires, gate * up, 0.0)
        if APPEND:
            place = tl.atomic_add(count_ptr, num_live) + tl.cumsum(live, 0) - 1
            fits = (live > 0) & (place < capacity)
            tl.store(list_row_ptr + place, rows, mask=fits)
            tl.store(list_value_ptr + place[:, None] * TOKENS + tokens[None, :], value, mask=fits[:, None])
    tl.store(x1_ptr + rows[:, None] * TOKENS + tokens[None, :], value, mask=inside[:, None])


@triton.jit
def down_batch_kernel(
    list_row_ptr, list_value_ptr, count_ptr, x1_ptr, down_ptr, y_ptr, num_tokens, F, D, capacity,
    ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """COLS values of every token's y from one part in SPLIT of the list, or of x1[F, TOKENS] when it overflowed.

    ATOMIC: added into y[num_tokens, D]; else stored in y[SPLIT, num_tokens, D].
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    part = tl.program_id(1)
    tokens = tl.arange(0, TOKENS)
    count = tl.load(count_ptr)
    full = count > capacity
    num_rows = tl.where(full, F, count)
    total = tl.zeros((TOKENS, COLS), dtype=tl.float32)
    for start in tl.range(part * ROWS, num_rows, SPLIT * ROWS, num_stages=STAGES):
        place = start + tl.arange(0, ROWS)
        listed = (place < num_rows) & (not full)
        row = tl.load(list_row_ptr + place, mask=listed, other=0)
        row = tl.where(full, place, row)
        at = place[None, :] * TOKENS + tokens[:, None]
        value = tl.load(list_value_ptr + at, mask=listed[None, :], other=0.0)
        value += tl.load(x1_ptr + at, mask=((place < F) & full)[None, :], other=0.0)
        w = tl.load(
            down_ptr + row.to(tl.int64)[:, None] * D + cols[None, :],
            mask=(place < num_rows)[:, None] & (cols < D)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total = tl.dot(value, w.to(tl.float32), total, input_precision="tf32x3")
    at = tokens[:, None] * D + cols[None, :]
    inside = (tokens < num_tokens)[:, None] & (cols < D)[None, :]
    if ATOMIC:
        tl.atomic_add(y_ptr + at, total, mask=inside, sem="relaxed")
    else:
        tl.store(y_ptr + part * num_tokens * D + at, total, mask=inside)

"""The GPU kernels under triton's interpreter: chosen before the import, so they run in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TOLERANCE = 2e-6
# D, F, dtype, sparsity, deterministic, tokens. Small: the interpreter runs one program after another, in Python.
CASES = [
    (1, 1, "float32", 0.0, False, 1),
    (1, 1, "bfloat16", 1.0, True, 2),
    (37, 65, "float32", 0.0, False, 1),
    (37, 65, "float16", 0.5, True, 2),
    (37, 65, "bfloat16", 0.89, False, 1),
    (37, 65, "float32", 1.0, True, 8),
    (300, 131, "bfloat16", 0.5, True, 1),
    (300, 131, "float32", 0.89, False, 3),
    (16, 1100, "float32", 0.89, True, 9),
    (37, 65, "bfloat16", 0.89, False, 8),
    (130, 33, "float16", 0.0, False, 4),
]
SCRIPT = """
import json, math, sys
import torch
from tests.kernels.conftest import make_case, relative_error
from kernels import reference, triton_ffn

assert triton_ffn.interpreted()
fresh = torch.empty


def poisoned(*shape, **options):  # every buffer starts as NaN (or a wild index), so nothing unwritten goes unnoticed
    made = fresh(*shape, **options)
    return made.fill_(math.nan) if made.is_floating_point() else made.fill_(-(1 << 30))


torch.empty = poisoned
torch.empty_like = lambda like: poisoned(like.shape, dtype=like.dtype)
report = []
for d_model, d_ff, dtype, sparsity, deterministic, tokens in json.loads(sys.argv[1]):
    made = make_case(d_model, d_ff, getattr(torch, dtype), sparsity, tokens=tokens)
    w_gate, w_up, w_down_t = made.weights
    # four programs share a list in place of 32, but for the last case: the interpreter pays for every one
    few = {} if tokens == 4 else dict(tiles=triton_ffn.Tiles(rows=32, split=4), batch_tiles=triton_ffn.Tiles(
        rows=32, cols=64, list_rows=16, split=4))
    kernel = triton_ffn.TritonFFN(*made.weights, deterministic=deterministic, **few)
    wide = dict(accumulate=torch.float64)
    gates = made.x.double() @ w_gate.double().T
    live = reference.kept(gates, made.threshold)
    s = torch.where(live, gates, 0.0).float()
    x1 = kernel.s2(s[:2], made.x[:2])
    y = kernel.s3(x1)
    whole = kernel.ffn(made.x, made.threshold)
    num_live = kernel.num_live
    last = live[-1:] if tokens % 8 == 1 else live  # of the last launch: nine tokens are eight and one
    expected_live = int(last.any(0).sum())
    kept = kernel.x1(len(last)) != 0
    tight = triton_ffn.TritonFFN(*made.weights, deterministic=deterministic, capacity=max(1, expected_live - 1), **few)
    report.append(dict(
        margin=float((gates - made.threshold).abs().min()),
        s2=relative_error(x1, reference.s2(s[:2], made.x[:2], w_up, **wide)),
        s3=relative_error(y, reference.s3(x1, w_down_t, **wide)),
        ffn=relative_error(whole, reference.ffn(made.x, *made.weights, live=live, **wide)),
        zeros=bool((x1[~live[:2]] == 0).all()),
        num_live=num_live,
        same_rows=bool(torch.equal(kept, last)),
        expected_live=expected_live,
        tight=relative_error(tight.ffn(made.x, made.threshold), whole),
        overflowed=[kernel.overflowed, tight.overflowed],
        tight_live=tight.num_live,
        repeats=bool(torch.equal(kernel.ffn(made.x, made.threshold), whole)),
    ))

made = make_case(37, 65, torch.float32, 0.89, tokens=8)
kernel = triton_ffn.TritonFFN(*made.weights)
names = ("_row", "_value", "_x1", "_part", "_count_and_y")
before = [(getattr(kernel, name).data_ptr(), getattr(kernel, name).numel()) for name in names]
asked = []
for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
    setattr(torch.Tensor, name, lambda *_, name=name: asked.append(name))
for tokens in (1, 2, 8):
    kernel.ffn(made.x[:tokens], made.threshold)
for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
    if name in vars(torch._C.TensorBase) or hasattr(torch._C.TensorBase, name):
        delattr(torch.Tensor, name)
after = [(getattr(kernel, name).data_ptr(), getattr(kernel, name).numel()) for name in names]
report.append(dict(asked=asked, same_scratch=before == after))

boundary = triton_ffn.TritonFFN(torch.tensor([[0.5], [0.25], [0.0], [math.nan]]), *[torch.ones(4, 1)] * 2)
report.append([float(boundary.ffn(torch.ones(1), t)) for t in (0.5, 0.25, 0.0, 0.6)])
half = boundary.ffn(torch.ones(2, 1, dtype=torch.bfloat16), 0.5)
report.append([str(half.dtype), list(half.shape)])
report.append([boundary.ffn(torch.ones(2, 1), t).flatten().tolist() for t in (0.5, 0.25, 0.0, 0.6)])
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report() -> list:
    pytest.importorskip("triton")
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_kernels_agree_with_the_float64_reference(report, index):
    found = report[index]
    assert found["margin"] > 1e-6, "no gate lies within rounding of the threshold, so the live sets must be equal"
    assert found["s2"] < TOLERANCE
    assert found["s3"] < TOLERANCE
    assert found["ffn"] < TOLERANCE
    assert found["zeros"]
    assert found["num_live"] == found["expected_live"]
    assert found["same_rows"]
    assert found["repeats"], "scratch of the last call must not leak into the next"


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_list_too_short_changes_nothing(report, index):
    found = report[index]
    *_, sparsity, _, _ = CASES[index]
    assert found["tight"] < TOLERANCE
    assert found["tight_live"] == found["expected_live"], "the count goes on when the list is full"
    assert found["overflowed"][1] == (found["expected_live"] > 1)
    if sparsity == 1.0:
        assert found["overflowed"] == [False, False]
    if sparsity == 0.0 and CASES[index][1] > 1:
        assert found["overflowed"][0], "by default the list has room for half of the neurons"


def test_nothing_waits_for_the_host_and_scratch_never_moves(report):
    assert report[-4] == {"asked": [], "same_scratch": True}


def test_what_can_be_exact_in_tf32_is_and_float32_takes_three_products():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from kernels.triton_ffn import dot_precision

    assert dot_precision(torch.bfloat16, torch.float16) == "tf32"
    assert dot_precision(torch.bfloat16, torch.float32) == dot_precision(torch.float32, torch.bfloat16) == "tf32x3"


def test_a_gate_equal_to_the_threshold_lives_and_relu_drops_zero(report):
    assert report[-3] == [0.5, 0.75, 0.75, 0.0]
    assert report[-1] == [[y, y] for y in report[-3]], "two tokens together"


def test_the_output_has_the_dtype_and_shape_of_the_input(report):
    assert report[-2] == ["torch.bfloat16", [2, 1]]


def test_wrong_arguments_are_refused():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from kernels.triton_ffn import Tiles, TritonFFN

    good = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"w_up has shape \(4, 3\), contiguous=False"):
        TritonFFN(good, torch.zeros(3, 4).T, good)
    with pytest.raises(ValueError, match=r"w_down_t has shape \(3, 4\)"):
        TritonFFN(good, good, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"w_up is torch\.float64"):
        TritonFFN(good, good.double(), good)
    with pytest.raises(ValueError, match="power of two"):
        TritonFFN(good, good, good, tiles=Tiles(split=12))
    for capacity in (0, 5):
        with pytest.raises(ValueError, match="from 1 to F = 4"):
            TritonFFN(good, good, good, capacity=capacity)
    ffn = TritonFFN(good, good, good)
    with pytest.raises(ValueError, match=r"expected \[3\] or \[tokens, 3\]"):
        ffn.ffn(torch.zeros(4))
    with pytest.raises(ValueError, match="threshold"):
        ffn.ffn(torch.zeros(3), -1.0)
    with pytest.raises(ValueError, match="the same tokens"):
        ffn.s2(torch.zeros(2, 4), torch.zeros(3))

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
# D, F, dtype, sparsity, deterministic. Small: the interpreter runs one program after another, in Python.
CASES = [
    (1, 1, "float32", 0.0, False),
    (1, 1, "bfloat16", 1.0, True),
    (37, 65, "float32", 0.0, False),
    (37, 65, "float16", 0.5, True),
    (37, 65, "bfloat16", 0.89, False),
    (37, 65, "float32", 1.0, True),
    (300, 131, "bfloat16", 0.5, True),
    (300, 131, "float32", 0.89, False),
    (16, 1100, "float32", 0.89, True),
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
report = []
for d_model, d_ff, dtype, sparsity, deterministic in json.loads(sys.argv[1]):
    made = make_case(d_model, d_ff, getattr(torch, dtype), sparsity, tokens=2)
    w_gate, w_up, w_down_t = made.weights
    kernel = triton_ffn.TritonFFN(*made.weights, deterministic=deterministic)
    wide = dict(accumulate=torch.float64)
    gates = made.x.double() @ w_gate.double().T
    live = reference.kept(gates, made.threshold)
    s = torch.where(live, gates, 0.0).float()
    x1 = kernel.s2(s, made.x)
    y = kernel.s3(x1)
    whole = kernel.ffn(made.x, made.threshold)
    report.append(dict(
        margin=float((gates - made.threshold).abs().min()),
        s2=relative_error(x1, reference.s2(s, made.x, w_up, **wide)),
        s3=relative_error(y, reference.s3(x1, w_down_t, **wide)),
        ffn=relative_error(whole, reference.ffn(made.x, *made.weights, live=live, **wide)),
        zeros=bool((x1[~live] == 0).all()),
        num_live=kernel.num_live,
        expected_live=int(live[-1].sum()),
        repeats=bool(torch.equal(kernel.ffn(made.x, made.threshold), whole)),
    ))
boundary = triton_ffn.TritonFFN(torch.tensor([[0.5], [0.25], [0.0], [math.nan]]), *[torch.ones(4, 1)] * 2)
report.append([float(boundary.ffn(torch.ones(1), t)) for t in (0.5, 0.25, 0.0, 0.6)])
half = boundary.ffn(torch.ones(2, 1, dtype=torch.bfloat16), 0.5)
report.append([str(half.dtype), list(half.shape)])
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
    assert found["repeats"], "scratch of the last call must not leak into the next"


def test_a_gate_equal_to_the_threshold_lives_and_relu_drops_zero(report):
    assert report[-2] == [0.5, 0.75, 0.75, 0.0]


def test_the_output_has_the_dtype_and_shape_of_the_input(report):
    assert report[-1] == ["torch.bfloat16", [2, 1]]


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
    ffn = TritonFFN(good, good, good)
    with pytest.raises(ValueError, match=r"expected \[3\] or \[tokens, 3\]"):
        ffn.ffn(torch.zeros(4))
    with pytest.raises(ValueError, match="threshold"):
        ffn.ffn(torch.zeros(3), -1.0)
    with pytest.raises(ValueError, match="the same tokens"):
        ffn.s2(torch.zeros(2, 4), torch.zeros(3))

"""The C++ of the native kernels, fuzzed under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import build, cpu, reference
from kernels.certified import Int8Gate, quantise

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).with_name("sanitized_driver.cpp")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
SCREEN_STEP = 64


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, compiled in a hurry; a machine whose compiler has no sanitizers skips, aloud."""
    path = tmp_path_factory.mktemp("sanitized") / "driver"
    try:
        compiler = build.find_compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    for tuning in (("-march=native", "-fopenmp"), ()):
        command = [*compiler, "-std=c++17", "-O0", *SANITIZERS, *tuning, str(DRIVER), "-o", str(path)]
        made = subprocess.run(command, capture_output=True, text=True, timeout=build.COMPILE_TIMEOUT_S)
        if made.returncode == 0:
            return path
    pytest.skip(f"this compiler builds nothing with sanitizers: {made.stderr[-500:]}")


class Driver:
    """The running driver; what it says when it dies is the message of the failure."""

    def __init__(self, program: Path) -> None:
        self.log = program.with_name(f"{id(self)}.log")
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )

    def run(
        self,
        weights: list[torch.Tensor],
        x: torch.Tensor,
        threshold: float,
        num_threads: int,
        skip_dead: bool,
        screen: Int8Gate | None,
        cut_x: int = 0,
    ) -> list[torch.Tensor]:
        """s, x1, y by S3, y of the whole FFN, and the plain gates of the first token."""
        (d_ff, d_model), tokens = weights[0].shape, x.shape[0]
        width = screen.rows.shape[1] if screen else 0
        head = (d_model, d_ff, num_threads, cpu.WEIGHT_DTYPES.index(weights[0].dtype), skip_dead, tokens, width, cut_x)
        floor = screen.floor(d_model) if screen else 0.0
        parts = [x.flatten()[: x.numel() - cut_x], *weights]
        parts += [screen.packed_bounds(), screen.rows] if screen else []
        message = struct.pack("8q2d", *head, threshold, floor)
        message += b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
        sizes = [tokens * d_ff, tokens * d_ff, tokens * d_model, tokens * d_model, d_ff]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(message)
            self.process.stdin.flush()
        answer = bytearray(self.process.stdout.read(4 * sum(sizes)))
        assert len(answer) == 4 * sum(sizes), self.last_words()
        return list(torch.frombuffer(answer, dtype=torch.float32).split(sizes))

    def last_words(self) -> str:
        self.process.wait(30)
        return self.log.read_text(errors="replace")[:4000]

    def close(self) -> int:
        """The exit code."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(30)


@pytest.fixture(scope="module")
def driver(program: Path) -> Iterator[Driver]:
    running = Driver(program)
    yield running
    assert running.close() == 0


@settings(max_examples=150, deadline=None)
@given(
    d_model=st.integers(1, 200),
    d_ff=st.integers(1, 400),
    dtype=st.sampled_from(cpu.WEIGHT_DTYPES),
    sparsity=st.sampled_from([0.0, 0.3, 0.6, 0.89, 1.0]),
    tokens=st.integers(0, 10),
    num_threads=st.integers(1, 4),
    skip_dead=st.booleans(),
    screened=st.booleans(),
    size=st.sampled_from([1.0, 1e-30, 1e18]),
    seed=st.integers(0, 1000),
)
def test_no_value_is_touched_that_is_not_ours(
    driver, error, d_model, d_ff, dtype, sparsity, tokens, num_threads, skip_dead, screened, size, seed
):
    generator = torch.Generator().manual_seed(seed)
    weights = [(torch.randn(d_ff, d_model, generator=generator) / d_model**0.5).to(dtype) for _ in range(3)]
    x = torch.randn(tokens, d_model, generator=generator) * size
    gates = (x.double() @ weights[0].double().T).clamp(min=0)
    threshold = float(gates.flatten().quantile(sparsity)) if tokens else 0.0
    screen = quantise(weights[0], SCREEN_STEP) if screened else None
    found = driver.run(weights, x, threshold, num_threads, skip_dead, screen)
    s, x1, y, whole = (part.view(tokens, -1) if tokens else part for part in found[:4])
    if not tokens:
        return
    live = s != 0
    flipped = live != reference.kept(gates, float(torch.tensor(threshold)))
    assert bool(((gates - threshold).abs() <= 1e-4 * size)[flipped].all())
    wide = torch.float64
    assert error(s, torch.where(live, gates, torch.zeros_like(gates))) < 1e-5
    assert error(found[4], x[0].double() @ weights[0].double().T) < 1e-5
    if size == 1.0:  # products of two others leave the range of float32
        assert error(x1, reference.s2(s, x, weights[1], accumulate=wide)) < 1e-5
        assert error(y, reference.s3(x1, weights[2], accumulate=wide)) < 1e-5
        assert error(whole, reference.ffn(x, *weights, live=live, accumulate=wide)) < 1e-5


@pytest.mark.parametrize("dtype", cpu.WEIGHT_DTYPES, ids=str)
def test_odd_numbers_in_the_weights_are_no_undefined_behaviour(driver, dtype):
    odd = [float("nan"), float("inf"), -float("inf"), 1e-45, 3.4e38, -3.4e38, 0.0, -0.0]
    weights = [torch.tensor(odd).repeat(40, 9).to(dtype) for _ in range(3)]
    weights[0][1::2] = 1.0
    x = torch.randn(3, 72, generator=torch.Generator().manual_seed(0))
    for skip_dead in (True, False):
        for size in (1.0, 1e-38, 1e30):
            found = driver.run(weights, x * size, 0.0, 2, skip_dead, quantise(weights[0], SCREEN_STEP))
            assert torch.equal(found[0].view(3, -1)[:, 1] > 0, x.sum(1) > 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer's words are checked where CI runs")
def test_one_value_too_few_is_seen(program):
    """The harness itself: an input that is one value short must end the driver."""
    weights = [torch.ones(5, 7) for _ in range(3)]
    alone = Driver(program)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        alone.run(weights, torch.ones(1, 7), 0.0, 1, True, None, cut_x=1)
    assert alone.close() != 0

"""The C++ of the native kernels, fuzzed under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import build, cpu, decoder_reference, reference
from kernels.certified import Int8Gate, quantise
from kernels.decoder import DecoderModel, DecoderWeights, LayerWeights

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
        sizes = [tokens * d_ff, tokens * d_ff, tokens * d_model, tokens * d_model, d_ff]
        return list(self._ask(struct.pack("9q2d", 0, *head, threshold, floor), parts, sum(sizes)).split(sizes))

    def decode(
        self, weights: DecoderWeights, model: DecoderModel, tokens: list[int], ffn: str, num_threads: int, cutoff: float
    ) -> torch.Tensor:
        """Logits ``[tokens, V]`` of a model whose two layers are one; ``tokens`` fill its cache."""
        layer, packed = weights.layers[0], model.layers[0]
        screen = quantise(packed.w_gate, SCREEN_STEP) if ffn == "certified" else None
        predictor = [packed.fc1, packed.fc2] if ffn == "predicted" else []
        hidden = weights.predictors[0][0].shape[0] if predictor else 0
        width, extras = screen.rows.shape[1] if screen else 0, layer.out_bias is not None
        (vocab, d_model), d_ff = weights.embedding.shape, len(layer.gate)
        head = (d_model, d_ff, model.num_heads, model.num_kv_heads, model.head_dim, vocab, len(tokens), num_threads)
        head += (cpu.WEIGHT_DTYPES.index(model.dtype), ffn != "dense", model.activation == "silu", len(tokens), hidden)
        head += (width, extras, layer.window or 0)
        floor = screen.floor(d_model) if screen else 0.0
        parts = [torch.tensor(tokens), model.embedding, packed.qkv, packed.out]
        parts += [packed.w_gate, packed.w_up, packed.w_down_t, *predictor, model.final_norm]
        parts += [model.cos[: len(tokens)], model.sin[: len(tokens)]]
        parts += [packed.qkv_bias, packed.out_bias, packed.query_norm] if extras else []
        parts += [screen.packed_bounds(), screen.rows] if screen else []
        logit = math.log(cutoff / (1 - cutoff))
        message = struct.pack("17q3d", 1, *head, layer.threshold, logit, floor)
        return self._ask(message, parts, len(tokens) * vocab).view(len(tokens), vocab)

    def _ask(self, head: bytes, parts: list[torch.Tensor], num_floats: int) -> torch.Tensor:
        message = head + b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(message)
            self.process.stdin.flush()
        answer = bytearray(self.process.stdout.read(4 * num_floats))
        assert len(answer) == 4 * num_floats, self.last_words()
        return torch.frombuffer(answer, dtype=torch.float32)

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


@settings(max_examples=60, deadline=None, derandomize=True)  # a score within rounding of its cutoff may go either way
@given(
    d_model=st.integers(1, 70),
    d_ff=st.integers(1, 300),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 20),
    dtype=st.sampled_from(cpu.WEIGHT_DTYPES),
    ffn=st.sampled_from(["dense", "exact", "certified", "predicted", "silu"]),
    num_threads=st.integers(1, 4),
    count=st.integers(1, 19),
    extras=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 20)),
    seed=st.integers(0, 1000),
)
def test_a_decoder_touches_nothing_that_is_not_its_own(
    driver, error, d_model, d_ff, kv_heads, group, half, dtype, ffn, num_threads, count, extras, window, seed
):
    weights = one_layer_twice(d_model, d_ff, kv_heads, group, half, extras, window, seed)
    weights = replace(weights, activation="silu" if ffn == "silu" else "relu", pre_norm=True)
    tokens = torch.randint(11, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    cutoffs = [0.5, 0.5] if ffn == "predicted" else None
    truth = decoder_reference.logits(weights, tokens, dtype=dtype, cutoffs=cutoffs)
    way = "dense" if ffn == "silu" else ffn
    found = driver.decode(weights, DecoderModel(weights, dtype), tokens, way, num_threads, 0.5)
    assert error(found, truth) < 1e-4


def one_layer_twice(
    d_model: int, d_ff: int, kv_heads: int, group: int, half: int, extras: bool, window: int | None, seed: int
) -> DecoderWeights:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    q, k, head_dim, norm = 2 * half * group * kv_heads, 2 * half * kv_heads, 2 * half, 1 + random(d_model)
    layer = LayerWeights(
        norm, random(q, d_model), random(k, d_model), random(k, d_model), random(d_model, q), norm,
        random(d_ff, d_model), random(d_ff, d_model), random(d_model, d_ff), window=window,
    )  # fmt: skip
    if extras:
        head_norm = 1 + random(head_dim)
        layer = replace(
            layer, query_bias=random(q), key_bias=random(k), value_bias=random(k), out_bias=random(d_model),
            query_norm=head_norm, key_norm=head_norm,
        )  # fmt: skip
    angles = torch.arange(20)[:, None] * random(1, half).abs()
    angles = torch.cat([angles, angles], 1)
    predictor = (random(3, d_model), random(d_ff, 3))
    return DecoderWeights(
        [layer, layer], random(11, d_model), norm, angles.cos(), angles.sin(), group * kv_heads, kv_heads, 1e-5,
        predictors=[predictor, predictor],
    )  # fmt: skip


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

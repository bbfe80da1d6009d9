"""Streaming statistics against counting on kept activations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prosparse_core.families import find_ffns
from prosparse_core.sparsity import BLOCK, CHUNK, LayerSparsity, SparsityMeter, l1_and_live
from prosparse_core.substitute import use_relu

D_FF = 53
ONE_LAYER = tiny(num_hidden_layers=1)


def metered(*passes: tuple[Tensor, Tensor | None]) -> LayerSparsity:
    """What the meter says after passes of (x1, mask)."""
    down = find_ffns(ONE_LAYER)[0].down
    with SparsityMeter(ONE_LAYER) as meter, torch.no_grad():
        for x1, mask in passes:
            meter.mask = mask
            down.to(x1.dtype)(x1)
        return meter.layers()[0]


def counted(x1: Tensor, mask: Tensor) -> dict[str, float | None]:
    """The same of x1 [B, T, d_ff] and its mask [B, T], one number at a time."""
    kept = x1[mask].double()
    live = int((kept != 0).sum())
    chunks = []
    for sequence, real in zip(x1, mask.tolist(), strict=True):
        at = 0
        while at < len(real):
            if all(real[at : at + CHUNK]) and at + CHUNK <= len(real):
                chunks.append((sequence[at : at + CHUNK] == 0).all(0))
                at += CHUNK
            elif real[at]:  # a run's rest is no chunk
                at += next(i for i, is_real in enumerate([*real[at:], False]) if not is_real)
            else:
                at += 1
    return {
        "num_tokens": len(kept),
        "sparsity": float((kept == 0).double().mean()),
        "dead_frac": float((kept == 0).all(0).double().mean()),
        "mean_abs_x1": float(kept.abs().mean()),
        "mean_abs_live": float(kept.abs().sum()) / live if live else None,
        "chunk_sparsity": float(torch.stack(chunks).double().mean()) if chunks else None,
    }


def random_x1(batch: int, length: int, share: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """x1 with about ``share`` of zeros, half of them negative zeros, in neurons that tend to be zero together."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, length, D_FF, generator=generator)
    drop = 0.5 * torch.rand(values.shape, generator=generator) + 0.5 * torch.rand(D_FF, generator=generator)
    return torch.where(drop < share, 0.0 * values, values).to(dtype)


def assert_equal(found: LayerSparsity, twin: dict[str, float | None]) -> None:
    for name, value in twin.items():
        wanted = None if value is None else pytest.approx(value, rel=1e-5, abs=1e-12)
        assert getattr(found, name) == wanted, name


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["all", "right", "left", "holes"]))
    lengths = [draw(st.integers(0, length)) for _ in range(batch)]
    position = torch.arange(length)[None, :]
    real = position < torch.tensor(lengths)[:, None]
    if kind == "all":
        return torch.ones(batch, length, dtype=torch.bool)
    if kind == "left":
        return real.flip(1)
    if kind == "holes":
        seed = draw(st.integers(0, 999))
        return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.9
    return real


@settings(deadline=None, max_examples=60)
@given(
    masks(), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99)
)
def test_every_statistic_equals_counting(mask: Tensor, share: float, dtype: torch.dtype, seed: int) -> None:
    x1 = random_x1(*mask.shape, share, seed, dtype)
    if not mask.any():
        with pytest.raises(AssertionError, match="no forward pass"):
            metered((x1, mask))
        return
    twin = counted(x1, mask)
    x1[~mask] = math.nan
    assert_equal(metered((x1, mask)), twin)
    assert_equal(metered((x1.flatten(0, 1), mask)), twin)
    if mask.all():
        assert_equal(metered((x1, None)), twin)


def test_sequences_longer_than_a_block_are_counted_in_pieces() -> None:
    x1 = random_x1(3, 2 * BLOCK + 21, 0.8, 1)
    mask = torch.ones(x1.shape[:2], dtype=torch.bool)
    assert_equal(metered((x1, None)), counted(x1, mask))
    mask[0, BLOCK + 3 :] = False
    mask[1, :13] = False
    assert_equal(metered((x1, mask)), counted(x1, mask))


def test_passes_add_up() -> None:
    x1 = random_x1(4, 24, 0.8, 2)
    mask = torch.ones(4, 24, dtype=torch.bool)
    mask[3, 9:] = False
    assert_equal(metered((x1[:1], None), (x1[1:3], None), (x1[3:], mask[3:])), counted(x1, mask))


def test_a_chunk_lies_within_one_sequence() -> None:
    zero, one = torch.zeros(1, CHUNK - 1, D_FF), torch.ones(1, CHUNK, D_FF)
    assert metered((zero.expand(4, -1, -1), None)).chunk_sparsity is None
    assert metered((zero, None), (zero, None)).chunk_sparsity is None
    assert metered((torch.zeros(4 * CHUNK, D_FF), None)).chunk_sparsity is None, "where sequences end is not known"
    assert metered((torch.cat([zero, one], dim=1), None)).chunk_sparsity == 0, "the 8th token is the first that lives"
    assert metered((torch.cat([zero, zero[:, :1], one], dim=1), None)).chunk_sparsity == 0.5


def test_without_survivors_there_is_no_mean_of_them() -> None:
    found = metered((-torch.zeros(2, 16, D_FF), None))
    assert (found.sparsity, found.dead_frac, found.chunk_sparsity) == (1, 1, 1)
    assert (found.mean_abs_x1, found.mean_abs_live) == (0, None)


def test_a_mask_that_does_not_fit_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="mask"):
        metered((torch.zeros(2, 16, D_FF), torch.ones(2, 15)))


class Largest(TorchDispatchMode):
    """Remembers the most bytes any operation newly allocated."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_memory_does_not_grow_with_the_batch() -> None:
    x1 = random_x1(4, 4 * BLOCK, 0.8, 3)
    meter = SparsityMeter(ONE_LAYER)
    meter.mask = torch.ones(x1.shape[:2], dtype=torch.bool)
    meter.mask[2, 100:] = False
    with Largest() as largest:
        meter._on_down(0, x1)
    meter.close()
    assert 0 < largest.bytes <= BLOCK * D_FF * x1.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_l1_and_live_leave_out_what_the_mask_does(dtype: torch.dtype) -> None:
    x1 = random_x1(2, 16, 0.7, 4, dtype)
    mask = torch.arange(16)[None, :] < torch.tensor([16, 3])[:, None]
    for kept in (None, mask):
        total, live = l1_and_live(x1, kept)
        real = x1.flatten(0, 1) if kept is None else x1[kept]
        assert int(live) == int((real != 0).sum())
        assert float(total) == pytest.approx(float(real.double().abs().sum()), rel=1e-6)
    x1[~mask] = math.inf
    assert float(l1_and_live(x1, mask)[0]) == pytest.approx(float(x1[mask].double().abs().sum()), rel=1e-6)


def test_statistics_of_a_model_are_those_of_its_layers() -> None:
    model = tiny()
    use_relu(model)
    with torch.no_grad():
        find_ffns(model)[2].act_weight[7] = 0  # a dead neuron
    kept: list[list[Tensor]] = [[], [], []]
    handles = [f.down.register_forward_pre_hook(lambda m, a, i=f.layer: kept[i].append(a[0])) for f in find_ffns(model)]
    with SparsityMeter(model) as meter, torch.no_grad():
        for seed in (1, 2, 3):
            model(input_ids=tokens(seed=seed), use_cache=False)
        found = meter.layers()
        mean = meter.mean()
    for handle in handles:
        handle.remove()
    for layer, stats in enumerate(found):
        x1 = torch.cat(kept[layer])
        assert stats.layer == layer
        assert stats.num_tokens == 96
        assert_equal(stats, counted(x1, torch.ones(x1.shape[:2], dtype=torch.bool)))
        assert stats.chunk_sparsity is not None
        assert stats.chunk_sparsity < stats.sparsity
    assert found[2].dead_frac >= 1 / 53
    assert mean == pytest.approx(sum(s.sparsity for s in found) / 3)
    assert not any(f.down._forward_pre_hooks for f in find_ffns(model))


def test_a_mask_counts_only_real_positions() -> None:
    model = tiny()
    use_relu(model)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :3] = True
    with SparsityMeter(model) as meter, torch.no_grad():
        meter.mask = mask
        model(input_ids=tokens(), use_cache=False)
        assert all(s.num_tokens == 3 for s in meter.layers())
        meter.reset()
        with pytest.raises(AssertionError, match="no forward pass"):
            meter.mean()

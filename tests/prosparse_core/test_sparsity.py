"""Streaming statistics against counting on kept activations."""

from __future__ import annotations

import pytest
import torch
from models import tiny, tokens

from prosparse_core.families import find_ffns
from prosparse_core.sparsity import SparsityMeter
from prosparse_core.substitute import use_relu


def test_statistics_equal_a_count_over_everything() -> None:
    model = tiny()
    use_relu(model)
    with torch.no_grad():
        find_ffns(model)[2].gate.weight[7] = 0  # a dead neuron
    kept: list[list[torch.Tensor]] = [[], [], []]
    handles = [f.down.register_forward_pre_hook(lambda m, a, i=f.layer: kept[i].append(a[0])) for f in find_ffns(model)]
    with SparsityMeter(model) as meter, torch.no_grad():
        for seed in (1, 2, 3):
            model(input_ids=tokens(seed=seed), use_cache=False)
        found = meter.layers()
        mean = meter.mean()
    for handle in handles:
        handle.remove()
    for layer, stats in enumerate(found):
        x1 = torch.cat([t.flatten(0, 1) for t in kept[layer]])
        assert stats.layer == layer
        assert stats.num_tokens == len(x1) == 96
        assert stats.sparsity == pytest.approx(float((x1 == 0).double().mean()), abs=1e-12)
        assert stats.dead_frac == pytest.approx(float((x1 == 0).all(0).double().mean()), abs=1e-12)
        assert stats.mean_abs_x1 == pytest.approx(float(x1.abs().mean()), rel=1e-5)
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

"""The step as a whole, on a tiny model: every row with its conditions, honest ratios, and none where there is none."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import kernels.bench
from kernels import cpu, sparse_ffn
from kernels.bench import FFNWeights, Row
from prosparse_core.errors import BadInput
from prosparse_core.recording import LayerRecording, Recording, pack_bits
from prosparse_core.store import Artifact, fingerprint
from prosparse_core.variants import THRESHOLDS, Variant
from tasks import speed as module
from tasks.speed import speed

SECTION = {"num_tokens": 12, "budget_s": 0.4, "decode_tokens": 9}


@pytest.fixture
def variant(base: Any, tmp_path: Any) -> Variant:
    """More than half sparse in every layer, so that random masks can be made."""
    (tmp_path / THRESHOLDS).write_text(json.dumps({"per_layer": [0.05, 0.06, 0.07]}))
    thresholds = Artifact("calibrate", "c", "0" * 64, fingerprint({"at": str(tmp_path)}), tmp_path)
    return Variant("prosparse", base.dense, "fatrelu", thresholds)


def facts(artifact: Artifact) -> list[dict[str, Any]]:
    lines = (artifact.path / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return [fact for fact in map(json.loads, lines) if fact["table"] == "speed"]


def native() -> None:
    if not cpu.available():
        pytest.skip(cpu.available().why)


def test_every_kernel_and_decoding_with_their_conditions(base: Any, variant: Variant) -> None:
    native()
    run, seen = base.run(speed=SECTION)
    threads = torch.get_num_threads()
    artifact = speed(run, variant, base.corpora)
    assert torch.get_num_threads() == threads
    rows, meta = facts(artifact), artifact.meta()
    found = {(r["mask_source"], r["kernel"], r["provider"]): r for r in rows if r["num_tokens"] == 1}
    batches = {(r["num_tokens"], r["provider"]): r for r in rows if r["num_tokens"] > 1}
    assert set(batches) == {(n, p) for n in (2, 4, 8) for p in ("torch", "native_dense", "native")}
    assert len(found) + len(batches) == len(rows) == 2 * (4 * 3 + 2) + 3 * 3 + 2
    for n in (2, 4, 8):
        dense, sparse = batches[n, "torch"], batches[n, "native"]
        assert (sparse["kernel"], sparse["mask_source"]) == ("ffn", "recorded")
        assert meta["speedup_batches"][str(n)] == dense["p50_us"] / sparse["p50_us"]
    screened = found["recorded", "ffn", "certified"]
    assert meta["speedup_certified"] == found["recorded", "ffn", "torch"]["p50_us"] / screened["p50_us"]
    assert screened["limit_speedup"] > found["recorded", "ffn", "native"]["limit_speedup"]
    for r in rows:
        assert r["gate_passed"] is True
        assert 0 < r["p20_us"] <= r["p50_us"] <= r["p80_us"]
        assert (r["d_model"], r["d_ff"], r["dtype"], r["threads"]) == (48, 101, "float32", 1)
        assert (r["timer"], r["device"], r["variant"]) == ("process_cpu", "cpu", variant.id)
        assert r["cpu"]
        assert r["num_reps"] >= 3
    recorded, random = (found[m, "s2", "native"]["sparsity"] for m in ("recorded", "random"))
    assert 0.5 < recorded < 1
    assert random == pytest.approx(recorded, abs=0.03)
    for kernel in ("s2", "s3", "ffn"):
        dense, own, sparse = (found["recorded", kernel, p] for p in ("torch", "native_dense", "native"))
        assert meta["speedup"][kernel] == dense["p50_us"] / sparse["p50_us"]
        assert meta["speedup_over_own_dense"][kernel] == own["p50_us"] / sparse["p50_us"]
        assert meta["limit"][kernel] == sparse["limit_speedup"] > 1
    dense, sparse = (found["recorded", "decode", f"transformers_{p}"] for p in ("dense", "sparse"))
    assert meta["speedup"]["decode"] == dense["p50_us"] / sparse["p50_us"]
    assert sparse["tokens_per_s"] == pytest.approx(1e6 / sparse["p50_us"])
    assert sparse["limit_speedup"] == meta["limit"]["decode"] > 1
    conditions = set(dense) & set(sparse) - {"provider", "p20_us", "p50_us", "p80_us", "tokens_per_s", "num_reps"}
    assert all(dense[c] == sparse[c] for c in conditions), "a ratio needs equal conditions"
    assert meta["implementation"] == "native"
    assert meta["gate_passed"] is True
    assert meta["reasons"] == {}
    done = [d / t for d, t, _ in seen.updates]
    assert done == sorted(done)
    assert done[-1] == 1
    assert seen.notes == []


def test_without_a_compiler_the_step_succeeds_and_says_why(
    base: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "native kernels: no C++ compiler on the PATH"
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_failure", why)
    monkeypatch.setattr(sparse_ffn, "_already_said", set())
    monkeypatch.setattr(module, "_has_compiler", lambda: False)
    run, seen = base.run(speed=SECTION)
    artifact = speed(run, variant, base.corpora)
    meta, rows = artifact.meta(), facts(artifact)
    assert meta["speedup"] == dict.fromkeys(("s2", "s3", "ffn", "decode"))
    assert all(why in meta["reasons"][kernel] for kernel in meta["speedup"])
    assert meta["implementation"] == "dense"
    assert meta["gate_passed"] is True, "nothing that ran was wrong"
    assert any(why in note for note in seen.notes)
    timed = {r["provider"] for r in rows if r["p50_us"] is not None}
    assert timed == {"torch", "transformers_dense"}
    assert meta["speedup_certified"] is None
    assert meta["speedup_batches"] == dict.fromkeys(("2", "4", "8"))
    for r in rows:
        if r["provider"].startswith("native") or r["provider"] == "certified":
            assert r["gate_passed"] is False
            assert why in r["note"]


def test_a_failed_gate_gives_no_speedup(base: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    native()
    bench = kernels.bench.bench_layers

    def failing(*args: Any, **settings: Any) -> list[Row]:
        bad = {"gate_passed": False, "rel_err": math.inf, "p20_us": math.nan, "p50_us": math.nan, "p80_us": math.nan}
        rows = bench(*args, **settings)
        wrong = {("s3", "native"), ("ffn", "certified")}
        return [replace(r, **bad) if (r.kernel, r.provider) in wrong else r for r in rows]

    monkeypatch.setattr(kernels.bench, "bench_layers", failing)
    right = sparse_ffn.SparseFFN.forward
    monkeypatch.setattr(sparse_ffn.SparseFFN, "forward", lambda self, x: -right(self, x))
    run, seen = base.run(speed={**SECTION, "decode_tokens": 10})
    artifact = speed(run, variant, base.corpora)
    meta = artifact.meta()
    assert meta["gate_passed"] is False
    assert meta["speedup"]["s3"] is None
    assert meta["speedup"]["decode"] is None
    assert meta["speedup_certified"] is None
    assert meta["speedup"]["s2"] > 0
    assert set(meta["reasons"]) == {"s3", "decode"}
    rows = {(r["mask_source"], r["kernel"], r["provider"]): r for r in facts(artifact)}
    assert rows["recorded", "s3", "native"]["p50_us"] is None
    assert rows["recorded", "s3", "native"]["rel_err"] is None
    decode = rows["recorded", "decode", "transformers_sparse"]
    assert decode["gate_passed"] is False
    assert decode["p50_us"] is None
    assert decode["note"] == meta["reasons"]["decode"]
    assert sum("correctness gate failed" in note for note in seen.notes) == 5


def test_an_activation_without_zeros_is_refused(base: Any) -> None:
    run, _ = base.run(speed={**SECTION, "num_tokens": 3})
    with pytest.raises(BadInput, match="no exact zeros"):
        speed(run, Variant("original", base.dense, "original"), base.corpora)


def test_a_recording_too_small_for_eight_tokens_says_so(base: Any, variant: Variant) -> None:
    native()
    run, seen = base.run(speed={**SECTION, "num_tokens": 4})
    meta = speed(run, variant, base.corpora).meta()
    assert set(meta["speedup_batches"]) == {"2", "4"}
    assert any("8 tokens at once" in note for note in seen.notes)


def test_random_masks_have_the_recorded_sparsity_or_are_not_made() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = FFNWeights(*(torch.randn(200, 30, generator=generator) for _ in range(3)))
    x = 0.2 * torch.randn(50, 30, generator=generator)

    def recorded(live: int) -> Recording:
        active = torch.zeros(50, 200, dtype=torch.bool)
        active[:, :live] = True
        return Recording((LayerRecording(0, 200, x, pack_bits(active)),))

    found = module._random_inputs([layer], recorded(24), seed=1)
    assert found is not None
    (inputs,), (threshold,) = found
    gates = inputs @ layer.w_gate.T
    assert float((gates < threshold).double().mean()) == pytest.approx(0.88, abs=1e-3)
    assert float(inputs.square().mean().sqrt()) == pytest.approx(float(x.square().mean().sqrt()), rel=0.05)
    assert module._random_inputs([layer], recorded(0), seed=1) is not None
    assert module._random_inputs([layer], recorded(140), seed=1) is None


def test_the_machine_is_part_of_the_identity(base: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned() -> Any:
        run, _ = base.run(speed=SECTION)
        run.planning = True
        payloads: list[Any] = []
        monkeypatch.setattr(run, "_plan", lambda name, label, payload: payloads.append(payload))
        speed(run, variant, base.corpora)
        return payloads[0]

    here = planned()
    monkeypatch.setattr(module, "_has_compiler", lambda: not here["config"]["compiler"])
    assert planned() != here
    monkeypatch.undo()
    monkeypatch.setattr(module, "provenance", lambda: {"cpu": "another"})
    assert planned() != here

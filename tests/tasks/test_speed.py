"""The step as a whole, on a tiny model: every row with its conditions, honest ratios, and none where there is none."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import kernels.bench
from kernels import cpu, measure, sparse_ffn
from kernels.bench import FFNWeights, Row
from kernels.decoder import Decoder
from prosparse_core.decode import GreedyDecoder
from prosparse_core.errors import BadInput
from prosparse_core.prediction.recording import LayerRecording, Recording, pack_bits
from prosparse_core.predictor import LayerPredictor, save
from prosparse_core.store import Artifact, fingerprint
from prosparse_core.variants import THRESHOLDS, Variant
from tasks import speed as module
from tasks.speed import speed
from tasks.timing import lengths, prompts

SECTION = {"num_tokens": 12, "budget_s": 0.4, "decode_tokens": 9, "decode_prompts": [32]}


@pytest.fixture
def variant(base: Any, tmp_path: Any) -> Variant:
    """More than half sparse in every layer, so that random masks can be made."""
    (tmp_path / THRESHOLDS).write_text(json.dumps({"per_layer": [0.05, 0.06, 0.07]}))
    thresholds = Artifact("calibrate", "c", "0" * 64, fingerprint({"at": str(tmp_path)}), tmp_path)
    return Variant("prosparse", base.dense, "fatrelu", thresholds)


def facts(artifact: Artifact) -> list[dict[str, Any]]:
    lines = (artifact.path / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return [fact for fact in map(json.loads, lines) if fact["table"] == "speed"]


@pytest.fixture(autouse=True)
def _short_curve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six shares of zeros take seconds: one test has them all."""
    if request.node.name != "test_every_kernel_with_its_conditions":
        monkeypatch.setattr(module, "CURVE", (0.5,))


def native() -> None:
    if not cpu.available():
        pytest.skip(cpu.available().why)


def test_every_kernel_with_its_conditions(base: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    native()
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(kernels.bench, "last_level_cache_bytes", lambda: 1 << 20)
    run, seen = base.run(speed=SECTION)
    threads = torch.get_num_threads()
    artifact = speed(run, variant, base.corpora)
    assert torch.get_num_threads() == threads
    rows, meta = [r for r in facts(artifact) if r["kernel"] != "decode"], artifact.meta()
    curve = [r for r in rows if r["variant"] is None]
    found = {(r["mask_source"], r["kernel"], r["provider"]): r for r in rows if r["num_tokens"] == 1 and r["variant"]}
    batches = {(r["num_tokens"], r["provider"]): r for r in rows if r["num_tokens"] > 1}
    assert set(batches) == {(n, p) for n in (2, 4, 8) for p in ("torch", "native_dense", "native")}
    assert len(found) + len(batches) + len(curve) == len(rows) == (4 * 3 + 2) + (3 * 3 + 1) + 3 * 3 + 6 * 4
    for n in (2, 4, 8):
        sparse = batches[n, "native"]
        assert (sparse["kernel"], sparse["mask_source"]) == ("ffn", "recorded")
        best = min(batches[n, p]["p50_us"] for p in ("torch", "native_dense"))
        assert meta["speedup_batches"][str(n)] == best / sparse["p50_us"]
    screened = found["recorded", "ffn", "certified"]
    best = min(found["recorded", "ffn", p]["p50_us"] for p in ("torch", "native_dense"))
    assert meta["speedup_certified"] == best / screened["p50_us"]
    assert screened["byte_ratio"] > found["recorded", "ffn", "native"]["byte_ratio"]
    for r in rows:
        assert r["gate_passed"] is True
        assert 0 < r["p20_us"] <= r["p50_us"] <= r["p80_us"]
        assert (r["d_model"], r["d_ff"], r["dtype"], r["threads"]) == (48, 101, "float32", 1)
        assert (r["timer"], r["device"]) == ("process_cpu", "cpu")
        assert r["cpu"]
        assert r["num_reps"] >= 3
        assert r["bandwidth_share"] == pytest.approx(r["gbps"] / meta["ceiling_gbps"])
        assert r["weights_bytes"] > r["cache_bytes"] == 1 << 20
        assert r["byte_ratio_note"] is None
        assert 0 <= r["live_frac"] <= 1
        assert r["num_tokens"] > 1 or r["live_frac"] == pytest.approx(1 - r["sparsity"])
    recorded, random = (found[m, "s2", "native"]["sparsity"] for m in ("recorded", "random"))
    assert 0.5 < recorded < 1
    assert random == pytest.approx(recorded, abs=0.03)
    assert {round(r["sparsity"], 2) for r in curve} == {0.0, 0.5, 0.7, 0.8, 0.89, 0.95}
    assert {(r["kernel"], r["mask_source"]) for r in curve} == {("ffn", "random")}
    for kernel in ("s2", "s3", "ffn"):
        dense, own, sparse = (found["recorded", kernel, p] for p in ("torch", "native_dense", "native"))
        best = min(dense, own, key=lambda r: r["p50_us"])
        assert meta["speedup"][kernel] == best["p50_us"] / sparse["p50_us"]
        assert meta["baseline"][kernel] == best["provider"]
        assert sparse["byte_ratio"] > 1
    assert meta["implementation"] == "native"
    assert meta["gate_passed"] is True
    assert meta["reasons"] == {}
    done = [d / t for d, t, _ in seen.updates]
    assert done == sorted(done)
    assert done[-1] == 1
    assert seen.notes == []


def test_every_way_to_decode_with_its_conditions(base: Any, variant: Variant, tmp_path: Any) -> None:
    native()
    run, _ = base.run(speed={**SECTION, "raised_sparsity": 0.95, "decode_prompts": [32]})
    artifact = speed(run, variant, base.corpora, predictors=trained(tmp_path / "p"), original=original(base))
    rows, meta = [r for r in facts(artifact) if r["kernel"] == "decode"], artifact.meta()
    found = {(r["provider"], r["dtype"], r["mask_source"], r["cutoff"]): r for r in rows if r.get("p50_us")}
    own = ("native_dense", "native_exact", "native_certified")
    expected = {(p, t, m, None) for p in own for t in ("float32", "float16") for m in ("recorded", "raised")}
    expected |= {("transformers_dense", "float32", m, None) for m in ("recorded", "raised")}
    expected |= {("native_predicted", "float32", "recorded", c) for c in (0.25, 0.5)}
    assert set(found) == expected
    absent = [r for r in rows if not r.get("p50_us")]
    assert [(r["provider"], r["variant"]) for r in absent] == [("llama_cpp", original(base).id)]
    assert absent[0]["note"] == "n/a: llama-cpp-python is not installed"
    for (provider, dtype, mask_source, _), r in found.items():
        dense = found["native_dense", dtype, mask_source, None]
        assert r["gate_passed"] is True
        assert r["sparsity"] == dense["sparsity"], "a ratio needs equal conditions"
        assert r["live_frac"] == (1.0 if provider == "transformers_dense" else r["live_frac"])
        assert 0 < r["p20_us"] <= r["p50_us"] <= r["p80_us"]
        assert r["tokens_per_s"] == pytest.approx(1e6 / r["p50_us"])
        assert r["bandwidth_share"] is None, "of weights in the cache, a share of the memory's rate says nothing"
        assert r["byte_ratio"] is None
        assert r["weights_bytes"] < r["cache_bytes"]
        is_dense = provider.endswith("_dense")
        assert is_dense or "fit into the last-level cache" in r["byte_ratio_note"]
        assert (r["variant"], r["threads"], r["timer"]) == (variant.id, 1, "process_cpu")
        assert r["prompt_tokens"] == 32
        assert r["num_reps"] >= (4 if (provider, mask_source) == ("transformers_dense", "raised") else 8)
    assert found["native_exact", "float32", "recorded", None]["rel_err"] < 1e-5
    assert found["native_exact", "float16", "recorded", None]["rel_err"] < 5e-2
    sparsity = {m: found["native_exact", "float32", m, None]["sparsity"] for m in ("recorded", "raised")}
    assert 0.5 < sparsity["recorded"] < sparsity["raised"]
    assert "raised to 95%" in found["native_exact", "float32", "raised", None]["note"]
    few, more = (found["native_predicted", "float32", "recorded", c] for c in (0.5, 0.25))
    exact = found["native_exact", "float32", "recorded", None]
    assert few["live_frac"] <= more["live_frac"] <= exact["live_frac"]
    dense = min(
        (found[p, "float32", "recorded", None] for p in ("native_dense", "transformers_dense")),
        key=lambda r: r["p50_us"],
    )
    assert meta["speedup"]["decode"] == pytest.approx(dense["p50_us"] / exact["p50_us"])
    assert meta["baseline"]["decode"] == dense["provider"]
    assert len(meta["decode"]) == len(found)
    tradeoff = run.ledger.query(
        f"SELECT provider, cutoff, decode_over_dense FROM decode_tradeoff WHERE artifact = '{artifact.digest}' "
        "AND dtype = 'float32'"
    ).records()
    assert {(r["provider"], r["cutoff"]) for r in tradeoff} == {(p, c) for p, _, m, c in expected if m == "recorded"}
    pairs = run.ledger.query(
        f"SELECT provider, baseline FROM speedup WHERE artifact = '{artifact.digest}' AND kernel = 'decode' "
        "AND mask_source = 'raised' AND dtype = 'float32'"
    ).records()
    assert {(r["provider"], r["baseline"]) for r in pairs} == {
        (p, b) for p in ("native_exact", "native_certified") for b in ("native_dense", "transformers_dense")
    }


def original(base: Any) -> Variant:
    return Variant("original", base.dense, "original")


def trained(folder: Any) -> Artifact:
    """Predictors nobody trained, as an artifact."""
    folder.mkdir()
    for layer in range(3):
        save(LayerPredictor(48, 101, 7, torch.Generator().manual_seed(layer)), folder, layer)
    meta = {"input": "pre_norm", "per_cutoff": [{"cutoff": 0.25}, {"cutoff": 0.5}]}
    (folder / "artifact.json").write_text(json.dumps({"meta": meta}))
    return Artifact("predictor", "p", "1" * 64, fingerprint({"at": str(folder)}), folder)


def test_a_dense_model_is_decoded_and_nothing_is_skipped(base: Any) -> None:
    native()
    run, seen = base.run(speed=SECTION)
    artifact = speed(run, original(base), base.corpora)
    meta, rows = artifact.meta(), facts(artifact)
    timed = {(r["provider"], r["dtype"]) for r in rows if r.get("p50_us")}
    assert timed == {("transformers_dense", "float32"), ("native_dense", "float32"), ("native_dense", "float16")}
    assert meta["speedup"] == dict.fromkeys(("s2", "s3", "ffn", "decode"))
    assert "no exact zeros" in meta["reasons"]["decode"]
    assert any("SiLU leaves no exact zeros" in note for note in seen.notes)


def test_another_architecture_is_decoded_by_transformers_with_sparse_ffns(
    base: Any, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    native()
    monkeypatch.setattr(lengths, "supports", lambda model_type: False)
    monkeypatch.setattr(prompts, "LONG", 100)
    monkeypatch.setattr(lengths, "LONG", 100)
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 1 << 10)
    run, _ = base.run(speed={**SECTION, "decode_tokens": 11, "decode_prompts": [32, 110]})
    artifact = speed(run, variant, base.corpora)
    meta = artifact.meta()
    found = {(r["provider"], r["prompt_tokens"]): r for r in facts(artifact) if r["kernel"] == "decode"}
    for length in (32, 110):
        dense, sparse = (found[p, length] for p in ("transformers_dense", "transformers_sparse"))
        assert length > 32 or meta["speedup"]["decode"] == dense["p50_us"] / sparse["p50_us"]
        assert sparse["byte_ratio"] > 1
        assert sparse["num_reps"] >= 8
        conditions = set(dense) & set(sparse) - {
            "provider",
            "byte_ratio",
            "num_reps",
            "tokens_per_s",
            "bandwidth_share",
        }
        same = {c for c in conditions if not c.endswith("_us")}
        assert all(dense[c] == sparse[c] for c in same), "a ratio needs equal conditions"


def test_decoding_after_prompts_of_several_lengths(
    base: Any, variant: Variant, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt is read once, by transformers; all ways go on from there in turns, and agree."""
    native()
    monkeypatch.setattr(prompts, "LONG", 100)
    monkeypatch.setattr(lengths, "LONG", 100)
    read: list[tuple[str, int]] = []
    feed, forward = Decoder.feed, GreedyDecoder._forward

    def feeding(self: Decoder, tokens: Any) -> torch.Tensor:
        read.append(("native", len(tokens)))
        return feed(self, tokens)

    def forwarding(self: GreedyDecoder, tokens: torch.Tensor) -> None:
        read.append(("transformers", tokens.shape[1]))
        forward(self, tokens)

    monkeypatch.setattr(Decoder, "feed", feeding)
    monkeypatch.setattr(GreedyDecoder, "_forward", forwarding)
    section = {**SECTION, "raised_sparsity": 0.95, "decode_prompts": [20, 32, 110, 128, 400]}
    run, seen = base.run(speed=section)
    artifact = speed(run, variant, base.corpora, predictors=trained(tmp_path / "p"))
    rows, meta = [r for r in facts(artifact) if r["kernel"] == "decode"], artifact.meta()
    assert meta["gate_passed"] is True, seen.notes
    assert [n for who, n in read if n > 32] == [110]
    found: dict[int, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for r in rows:
        if r.get("p50_us"):
            ways = found.setdefault(r["prompt_tokens"], {})
            ways[r["provider"], r["dtype"], r["mask_source"], r["cutoff"]] = r
    assert set(found) == {20, 32, 110}
    assert set(found[20]) == set(found[32]) == set(found[110]), "all ways, at each length"
    for ways in found.values():
        assert all(r["num_reps"] >= (4 if r["provider"] == "transformers_dense" else 8) for r in ways.values())
        assert ways["native_exact", "float32", "recorded", None]["rel_err"] < 1e-4
    bytes_read = [found[n]["native_dense", "float32", "recorded", None]["weights_bytes"] for n in (20, 32, 110)]
    assert bytes_read == sorted(set(bytes_read)), "keys and values grow with the prompt"
    shortest = found[20]["native_exact", "float32", "recorded", None]
    rivals = [found[20][p, "float32", "recorded", None]["p50_us"] for p in ("native_dense", "transformers_dense")]
    assert meta["speedup"]["decode"] == pytest.approx(min(rivals) / shortest["p50_us"])
    absent = {r["prompt_tokens"]: r["note"] for r in rows if not r.get("p50_us") and r["prompt_tokens"]}
    assert absent == {
        n: f"n/a: the model has 128 positions: a prompt of {n} tokens leaves none to decode" for n in (128, 400)
    }
    assert sum("no decoding after" in note for note in seen.notes) == 2
    pairs = run.ledger.query(
        f"SELECT prompt_tokens, count(*) FROM speedup WHERE artifact = '{artifact.digest}' AND kernel = 'decode' "
        "AND is_best GROUP BY ALL ORDER BY ALL"
    ).rows
    assert pairs == [(n, 2 * 2 * 2 + 2) for n in (20, 32, 110)], "compared after prompts of one length only"


def test_why_there_is_no_prompt_of_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [("a", torch.arange(40)[None]), ("b", torch.arange(30)[None]), ("a", torch.arange(40, 80)[None])]
    found = prompts.choose_prompts(windows, [8, 70, 100, 111, 300], 290)
    assert [p.shape for p in found.by_length[8]] == [(1, 8), (1, 8)]
    assert [p.tolist() for p in found.by_length[70]] == [[list(range(70))]], "windows of one corpus, one after another"
    assert [p.shape for p in found.by_length[100]] == [(1, 100)], "of all corpora where none is long enough"
    assert found.absent == {
        111: "the held-out text has 110 tokens: too few for a prompt of 111",
        300: "the model has 290 positions: a prompt of 300 tokens leaves none to decode",
    }
    monkeypatch.setattr(prompts, "LONG", 70)
    monkeypatch.setattr(prompts, "_seconds_of_a_token", lambda model, prompt: 0.5)
    prompts.drop_dear(found, torch.nn.Identity(), 40.0, 1 << 60)
    assert set(found.by_length) == {8}
    assert found.absent[100] == "reading a prompt of 100 tokens would take about 50 s of budget_s=40"
    assert found.absent[70].startswith("keys and values of 70 tokens take")


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
    right = Decoder.feed

    def feed(self: Decoder, tokens: Any) -> torch.Tensor:
        logits = right(self, tokens)
        return -logits if self.ffn == "exact" and self.model.dtype == torch.float32 else logits

    monkeypatch.setattr(Decoder, "feed", feed)
    run, seen = base.run(speed={**SECTION, "decode_tokens": 10})
    artifact = speed(run, variant, base.corpora)
    meta = artifact.meta()
    assert meta["gate_passed"] is False
    assert meta["speedup"]["s3"] is None
    assert meta["speedup"]["decode"] is None
    assert meta["speedup_certified"] is None
    assert meta["speedup"]["s2"] > 0
    assert set(meta["reasons"]) == {"s3", "decode"}
    assert meta["baseline"]["s3"] is None
    rows = {(r.get("mask_source"), r["kernel"], r["provider"]): r for r in facts(artifact)}
    assert rows["recorded", "s3", "native"]["p50_us"] is None
    assert rows["recorded", "s3", "native"]["rel_err"] is None
    decode = {(r["provider"], r["dtype"], r.get("mask_source")): r for r in facts(artifact) if r["kernel"] == "decode"}
    for (provider, dtype, _), r in decode.items():
        wrong = (provider, dtype) == ("native_exact", "float32")
        assert (r.get("gate_passed") is False) == wrong
        if wrong:
            assert r["p50_us"] is None
            assert "not, to the bit, those of the dense loop" in r["note"]
    # s3 on recorded and on random masks, the certified ffn on both and along the curve, and two ways to decode
    assert sum("correctness gate failed" in note for note in seen.notes) == 2 + 2 + len(module.CURVE) + 2


def test_an_activation_without_zeros_is_refused(base: Any) -> None:
    run, _ = base.run(speed={**SECTION, "num_tokens": 3})
    with pytest.raises(BadInput, match="no exact zeros"):
        speed(run, Variant("shifted_relu", base.dense, "shifted_relu", shift=0.1), base.corpora)


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
        monkeypatch.setattr(run, "_plan", lambda name, label, payload, *rest: payloads.append(payload))
        speed(run, variant, base.corpora)
        return payloads[0]

    here = planned()
    monkeypatch.setattr(module, "_has_compiler", lambda: not here["config"]["compiler"])
    assert planned() != here
    monkeypatch.undo()
    monkeypatch.setattr(module, "provenance", lambda: {"cpu": "another"})
    assert planned() != here

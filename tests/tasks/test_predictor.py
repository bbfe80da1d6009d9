"""The step as a whole, on a tiny model: what it leaves, that it repeats to the bit and goes on where it stopped."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from prosparse_core import predictor as predictors
from prosparse_core.recording import LayerRecording, pack_bits
from prosparse_core.store import Artifact, fingerprint
from prosparse_core.variants import THRESHOLDS, Variant
from tasks.predictor import _side_by_side, predictor

SECTION = {"hidden": 24, "train_tokens": 700, "test_tokens": 400, "epochs": 3, "batch_size": 64, "lr": 5e-3}
CUTOFFS = [0.25, 0.45, 0.75]


def facts(artifact: Artifact, table: str) -> list[dict[str, Any]]:
    lines = (artifact.path / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return [fact for fact in map(json.loads, lines) if fact.pop("table") == table]


def make(base: Any, **section: Any) -> tuple[Artifact, Any]:
    run, seen = base.run(predictor={**SECTION, "cutoffs": CUTOFFS, **section})
    return predictor(run, Variant("prosparse", base.dense, "relu"), base.corpora), seen


def test_one_predictor_a_layer_and_every_number_of_it(base: Any) -> None:
    artifact, seen = make(base, epochs=20)
    assert sorted(p.name for p in artifact.path.glob("*.safetensors")) == [f"layer_{i}.safetensors" for i in range(3)]
    assert predictors.load(artifact.path, 2).fc2.weight.shape == (101, 24)
    rows, meta = facts(artifact, "predictors"), artifact.meta()
    assert [(r["layer"], r["cutoff"]) for r in rows] == [(i, c) for i in range(3) for c in CUTOFFS]
    assert {(r["hidden"], r["label_rule"], r["num_tokens"]) for r in rows} == {(24, "nonzero", 400)}
    assert len(facts(artifact, "variants")) == 1
    at = [r for r in rows if r["cutoff"] == 0.45]
    for name in ("recall", "predicted_sparsity", "true_sparsity"):
        assert meta[name] == pytest.approx(sum(r[name] for r in at) / 3, abs=1e-12)
    assert meta["cutoff"] == 0.45, "the cutoff nearest one half is the headline"
    assert [m["cutoff"] for m in meta["per_cutoff"]] == CUTOFFS
    # Guessing as many neurons blindly finds that share of the active ones.
    assert meta["recall"] > (1 - meta["predicted_sparsity"]) + 0.15
    for layer in range(3):
        recalls = [r["recall"] for r in rows if r["layer"] == layer]
        assert recalls == sorted(recalls, reverse=True)
    done = [d / t for d, t, _ in seen.updates]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1)
    assert [u["layer"] for _, _, u in seen.updates if "layer" in u] == [0, 1, 2]


def test_the_same_step_gives_the_same_files_and_goes_on_where_it_stopped(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = make(base, epochs=2)
    run, _ = base.run(predictor={**SECTION, "cutoffs": CUTOFFS, "epochs": 2})
    run.force = frozenset({"predictor"})
    trained: list[int] = []
    original = predictors.train

    def dying(recording: Any, **settings: Any) -> Any:
        if recording.layer == 2 and not trained.count(2):
            trained.append(2)
            raise KeyboardInterrupt
        trained.append(recording.layer)
        return original(recording, **settings)

    monkeypatch.setattr(predictors, "train", dying)
    variant = Variant("prosparse", base.dense, "relu")
    with pytest.raises(KeyboardInterrupt):
        predictor(run, variant, base.corpora)
    run.force = frozenset()
    again = predictor(run, variant, base.corpora)
    assert sorted(trained) == [0, 1, 2, 2], "layers that were finished are not trained again"
    assert again.digest == whole.digest


def test_without_an_active_neuron_recall_is_none_not_zero(base: Any, tmp_path: Any) -> None:
    (tmp_path / THRESHOLDS).write_text(json.dumps({"per_layer": [0.0, 1e6, 1e6]}))
    thresholds = Artifact("calibrate", "c", "0" * 64, fingerprint({}), tmp_path)
    run, seen = base.run(predictor={**SECTION, "epochs": 1})
    artifact = predictor(run, Variant("prosparse", base.dense, "fatrelu", thresholds), base.corpora)
    rows = [r for r in facts(artifact, "predictors") if r["cutoff"] == 0.5]
    assert [r["recall"] is None for r in rows] == [False, True, True]
    assert [r["true_sparsity"] == 1.0 for r in rows] == [False, True, True]
    assert artifact.meta()["recall"] == rows[0]["recall"]
    assert any("2 layers have no active neuron" in note for note in seen.notes)


def test_too_little_held_out_text_is_said(base: Any) -> None:
    artifact, seen = make(base, test_tokens=5000, epochs=1)
    found = artifact.meta()["num_tokens"]
    assert 256 <= found < 5000
    assert any(f"{found} tokens, 5000 were asked" in note for note in seen.notes)


def test_the_number_of_threads_changes_no_weight_and_comes_back() -> None:
    x = torch.randn(900, 300, generator=torch.Generator().manual_seed(0))
    active = pack_bits(x[:, :200] > 1)

    def one_layer(layer: int) -> tuple[int, torch.Tensor]:
        recording = LayerRecording(layer, 200, x, active)
        found = predictors.train(recording, hidden=64, epochs=1, batch_size=256, lr=1e-2, seed=0)
        return torch.get_num_threads(), found.fc2.weight

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(list(_side_by_side(one_layer, 5, "cpu")))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert {threads for run in found for threads, _ in run} == {1}
    for (_, alone), (_, beside) in zip(*found, strict=True):
        assert torch.equal(alone, beside)
    assert not torch.equal(found[0][0][1], found[0][1][1]), "in the order of the layers, each with a seed of its own"


def test_a_failure_in_one_layer_ends_the_others() -> None:
    seen: list[int] = []

    def failing(layer: int) -> int:
        seen.append(layer)
        if layer == 1:
            raise ValueError("layer 1")
        return layer

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="layer 1"):
        list(_side_by_side(failing, 10_000, "cpu"))
    assert torch.get_num_threads() == before
    assert len(seen) < 10_000

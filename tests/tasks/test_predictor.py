"""The step as a whole, on a tiny model: what it leaves, that it repeats to the bit and goes on where it stopped."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from prosparse_core import predictor as predictors
from prosparse_core.prediction import recording
from prosparse_core.prediction.mask import PredictedMask, measure_windows
from prosparse_core.prediction.recording import LayerRecording, pack_bits
from prosparse_core.store import Artifact, fingerprint
from prosparse_core.variants import THRESHOLDS, Variant, load_variant
from tasks.predictor import RECORDINGS, _side_by_side, predictor
from tasks.predictor_quality import held_out_tokens

SECTION = {"hidden": 24, "train_tokens": 700, "test_tokens": 400, "epochs": 3, "batch_size": 64, "lr": 5e-3}
CUTOFFS = [0.25, 0.45, 0.75]
BY_LAYER = "recall 0.9, by layer"


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
    every, meta = facts(artifact, "predictors"), artifact.meta()
    rows = [r for r in every if r["label_rule"] == "nonzero"]
    assert [(r["layer"], r["cutoff"]) for r in rows] == [(i, c) for i in range(3) for c in CUTOFFS]
    assert {(r["hidden"], r["label_rule"], r["num_tokens"]) for r in rows} == {(24, "nonzero", 400)}
    assert len(facts(artifact, "variants")) == 1
    at = [r for r in rows if r["cutoff"] == 0.45]
    for name in ("recall", "predicted_sparsity", "true_sparsity"):
        assert meta[name] == pytest.approx(sum(r[name] for r in at) / 3, abs=1e-12)
    clipped = [r for r in every if r["label_rule"] == "nonzero, against top_p 0.15"]
    assert len(clipped) == len(rows) == len(every) / 2
    for one, other in zip(rows, clipped, strict=True):
        assert other["predicted_sparsity"] == one["predicted_sparsity"]
        assert other["true_sparsity"] == pytest.approx(1 - 15 / 101, abs=1e-9), "15 of 101 neurons a token"
    of_largest = [r["recall"] for r in clipped if r["cutoff"] == 0.45]
    assert meta["top_recall"] == pytest.approx(sum(of_largest) / 3)
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

    def dying(seen: Any, **settings: Any) -> Any:
        if seen.layer == 2 and not trained.count(2):
            trained.append(2)
            raise KeyboardInterrupt
        trained.append(seen.layer)
        return original(seen, **settings)

    monkeypatch.setattr(predictors, "train", dying)
    variant = Variant("prosparse", base.dense, "relu")
    with pytest.raises(KeyboardInterrupt):
        predictor(run, variant, base.corpora)
    (work,) = (base.home / "store" / ".work").glob("predictor-*")
    assert (work / RECORDINGS / "training" / "recording.json").is_file()
    monkeypatch.setattr(recording, "_Recorder", None)  # a whole recording is not made again
    run.force = frozenset()
    again = predictor(run, variant, base.corpora)
    assert sorted(trained) == [0, 1, 2, 2], "layers that were finished are not trained again"
    assert again.digest == whole.digest


def test_perplexity_at_every_cutoff_beside_the_exact_one(base: Any) -> None:
    """The masks of the artifact's own files, put on by hand, cost what the step says."""
    artifact, _ = make(base, epochs=1, target_recall=0.9)
    model, tokenizer = load_variant(Variant("prosparse", base.dense, "relu"))
    windows = held_out_tokens(base.corpora.path, tokenizer, 400)
    assert 400 <= sum(w.tokens.numel() for w in windows) < 400 + 64
    trained = [predictors.load(artifact.path, i) for i in range(3)]
    meta = artifact.meta()
    rows = {r["task"]: r for r in facts(artifact, "evaluations")}
    assert list(rows) == [f"predictor/{name}" for name in ("exact", *(f"cutoff {c}" for c in CUTOFFS), BY_LAYER)]
    assert {(r["metric"], r["corpus"], r["dtype"]) for r in rows.values()} == {
        ("predicted_perplexity", "mixed", "fp32")
    }
    exact = measure_windows(model, windows, "fp32")
    assert rows["predictor/exact"]["value"] == meta["exact_perplexity"] == pytest.approx(exact.perplexity, rel=1e-9)
    assert rows["predictor/exact"]["n"] == exact.num_tokens == sum(w.tokens.shape[1] - 1 for w in windows)
    for entry in [*meta["per_cutoff"], meta["chosen"]]:
        cutoffs = entry.get("cutoffs") or [entry["cutoff"]] * 3
        with PredictedMask(model, trained, cutoffs, "post_norm"):
            left = measure_windows(model, windows, "fp32")
        assert entry["perplexity"] == pytest.approx(left.perplexity, rel=1e-9)
        assert entry["sparsity_left"] == pytest.approx(left.sparsity, abs=1e-9)
        assert left.sparsity >= exact.sparsity
    assert rows["predictor/cutoff 0.25"]["value"] == meta["per_cutoff"][0]["perplexity"]
    assert meta["perplexity"] == meta["per_cutoff"][1]["perplexity"]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_cutoffs_for_a_target_come_from_calibration_text(base: Any, scope: str) -> None:
    artifact, seen = make(base, epochs=2, target_recall=0.9, cutoff_scope=scope, labels="top_p", top_share=0.3)
    chosen = artifact.meta()["chosen"]
    assert (chosen["target_recall"], chosen["scope"]) == (0.9, scope)
    assert (len(set(chosen["cutoffs"])) == 1) == (scope == "global")
    assert chosen["top_recall"] == pytest.approx(0.9, abs=0.06), "on other text than it was chosen on"
    assert chosen["top_recall"] == pytest.approx(sum(r["top_recall"] for r in chosen["layers"]) / 3)
    assert 0 < chosen["predicted_sparsity"] < 1
    rules = {r["label_rule"] for r in facts(artifact, "predictors")}
    assert rules == {"top_p 0.3", "top_p 0.3, against nonzero"}
    assert [u["recording"] for _, _, u in seen.updates if "recording" in u][-1] == "calibration text"


@pytest.mark.slow
def test_every_choice_of_the_recipe_changes_the_predictors(base: Any) -> None:
    """And nothing else: the recording is gone from the artifact, the defaults name what they are."""
    seen = {}
    for name, section in {
        "default": {},
        "pre": {"input": "pre_norm"},
        "svd": {"init": "svd"},
        "pre svd": {"input": "pre_norm", "init": "svd"},
        "top": {"labels": "top_p"},
        "share": {"labels": "top_p", "top_share": 0.4},
        "weight": {"negative_weight": 1.0},
    }.items():
        artifact, _ = make(base, epochs=1, test_tokens=64, **section)
        assert {p.suffix for p in artifact.path.iterdir()} == {".safetensors", ".json", ".jsonl"}
        assert artifact.meta()["input"] == section.get("input", "post_norm")
        seen[name] = predictors.load(artifact.path, 1).fc2.weight
    for one, other in itertools.combinations(seen, 2):
        assert not torch.equal(seen[one], seen[other]), (one, other)


def test_an_untrained_low_rank_gate_finds_most(base: Any) -> None:
    artifact, _ = make(base, epochs=0, init="svd", hidden=96)
    meta = artifact.meta()
    assert meta["per_cutoff"][1]["recall"] > 0.99, "96 = 2 * d_model hidden numbers are the gate itself"
    assert meta["per_cutoff"][1]["cutoff"] == 0.45


def test_without_an_active_neuron_recall_is_none_not_zero(base: Any, tmp_path: Any) -> None:
    (tmp_path / THRESHOLDS).write_text(json.dumps({"per_layer": [0.0, 1e6, 1e6]}))
    thresholds = Artifact("calibrate", "c", "0" * 64, fingerprint({}), tmp_path)
    run, seen = base.run(predictor={**SECTION, "epochs": 1})
    artifact = predictor(run, Variant("prosparse", base.dense, "fatrelu", thresholds), base.corpora)
    rows = [r for r in facts(artifact, "predictors") if r["cutoff"] == 0.5 and r["label_rule"] == "nonzero"]
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
        seen = LayerRecording(layer, 200, x, active)
        found = predictors.train(seen, hidden=64, epochs=1, batch_size=256, lr=1e-2, seed=0)
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

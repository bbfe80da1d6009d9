"""The calibrate step on a tiny ReLU model, by both rules; what its thresholds become on the evaluation files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from flows.summary import of_run
from prosparse_core.calibration import MIXED
from prosparse_core.errors import BadInput
from prosparse_core.mixing import Batch
from prosparse_core.store import Artifact
from prosparse_core.thresholds import THRESHOLDS
from prosparse_core.variants import Variant
from tasks.calibrate import calibrate
from tasks.evaluate import evaluate

GRID = [0.0, 0.01, 0.03, 0.1]


def made(base: Any, rule: str, budget: float = 0.05, force: bool = False) -> tuple[Any, Any, Artifact]:
    section = {"rule": rule, "thresholds": GRID, "max_ppl_increase_pct": budget, "refine": 2}
    run, seen = base.run(calibrate=section, evaluate={"choice": False})
    run.force = frozenset({"calibrate"} if force else ())
    return run, seen, calibrate(run, Variant("prosparse_star", base.dense, "relu"), base.corpora)


def content(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.path / THRESHOLDS).read_text(encoding="utf-8"))


def facts(artifact: Artifact) -> list[dict[str, Any]]:
    lines = (artifact.path / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return [fact for fact in map(json.loads, lines) if fact["table"] == "thresholds"]


def test_the_grid_is_as_it_was(base: Any) -> None:
    run, _, artifact = made(base, "grid", force=True)
    found = content(artifact)
    assert (found["rule"], found["scope"], found["cett"]) == ("grid", "global", None)
    assert found["per_layer"] == [found["threshold"]] * 3
    assert found["mean_threshold"] == found["threshold"] == found["global"]["threshold"]
    assert found["checkpoint"] == base.dense.digest
    assert found["ppl_increase_pct"] <= found["max_ppl_increase_pct"]
    rows = facts(artifact)
    assert {(r["rule"], r["scope"], r["cett"]) for r in rows} == {("grid", "global", None)}
    assert {r["threshold"] for r in rows if r["chosen"]} == {found["threshold"]}
    assert Variant("prosparse", base.dense, "fatrelu", artifact).best_global_threshold() == found["threshold"]
    assert artifact.label == "calibrate · threshold for at most +0.05 % perplexity"
    assert run.history[-1][2] == "done"


def test_cett_measures_the_grid_as_well(base: Any) -> None:
    run, seen, artifact = made(base, "cett", force=True)
    found, rows = content(artifact), facts(artifact)
    assert (found["rule"], found["scope"]) == ("cett", "per_layer")
    assert len(set(found["per_layer"])) == 3
    assert found["mean_threshold"] == pytest.approx(sum(found["per_layer"]) / 3)
    assert found["threshold"] == found["global"]["threshold"] == content(made(base, "grid")[2])["threshold"]
    assert 0 < found["cett"] < 1
    assert found["ppl_increase_pct"] <= 0.05
    assert found["checkpoint"] == base.dense.digest
    for rule, scope in (("grid", "global"), ("cett", "per_layer")):
        mine = [r for r in rows if r["rule"] == rule]
        assert {r["scope"] for r in mine} == {scope}
        for corpus in ("code", "more", MIXED):
            curve = [r for r in mine if r["corpus"] == corpus]
            assert [r["threshold"] for r in curve] == sorted({r["threshold"] for r in curve})
            assert curve[0]["threshold"] == 0
            zeros = [r["sparsity"] for r in curve]
            assert zeros == sorted(zeros)
            assert zeros[-1] > zeros[0] + 0.01
            assert [r["chosen"] for r in curve].count(True) == (rule == "cett")
    chosen = next(r for r in rows if r["chosen"])
    assert (chosen["cett"], chosen["threshold"]) == (found["cett"], found["mean_threshold"])
    meta = artifact.meta()
    assert meta == {**{k: v for k, v in found.items() if k != "per_layer"}, **_remark(meta)}
    assert any("one threshold per layer reaches" in n for n in seen.notes) == ("remark" in meta)
    done = [d / t for d, t, _ in seen.updates]
    assert done == sorted(done)
    assert done[-1] == 1

    sql = f"SELECT rule, threshold, perplexity_increase_pct FROM threshold_tradeoff WHERE run_id = '{run.run_id}'"
    tried = run.ledger.query(f"{sql} AND corpus = 'mixed' ORDER BY rule, threshold").records()
    for rule in ("grid", "cett"):
        first, *_ = [r for r in tried if r["rule"] == rule]
        assert (first["threshold"], first["perplexity_increase_pct"]) == (0, 0), "each rule has its own base"


def _remark(meta: dict[str, Any]) -> dict[str, Any]:
    """Whether the grid was better depends on the random model; that it is said does not."""
    if meta["sparsity"] >= meta["global"]["sparsity"]:
        return {}
    assert "calibrate.rule=grid takes the one for all layers" in meta["remark"]
    return {"remark": meta["remark"]}


def test_less_sparsity_than_the_grid_is_said_aloud(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds that hurt the wrong layer."""
    monkeypatch.setattr("prosparse_core.cett.thresholds_at", lambda curves, cett: [cett / 1e4, 0.0, 0.0])
    _, seen, artifact = made(base, "cett", budget=0.06, force=True)
    meta = artifact.meta()
    assert meta["rule"] == "cett", "what was asked for is kept"
    assert meta["sparsity"] < meta["global"]["sparsity"]
    assert meta["remark"] in seen.notes
    assert "gives layer 0 (" in meta["remark"]


def test_what_the_thresholds_became_on_the_evaluation_files(base: Any) -> None:
    run, _, thresholds = made(base, "cett")
    star = Variant("prosparse_star", base.dense, "relu")
    ours = Variant("prosparse", base.dense, "fatrelu", thresholds)
    before, after = (evaluate(run, v, base.corpora).meta() for v in (star, ours))
    rows = run.ledger.query(f"FROM threshold_held_out WHERE run_id = '{run.run_id}' ORDER BY corpus").records()
    assert [r["corpus"] for r in rows] == ["code", "mixed", "more"]
    for row in rows:
        assert (row["setting"], row["variant"], row["variant_before"]) == ("prosparse", ours.id, star.id)
        assert (row["rule"], row["scope"], row["cett"]) == ("cett", "per_layer", content(thresholds)["cett"])
        assert row["perplexity_increase_pct"] == pytest.approx(100 * (row["perplexity"] / row["perplexity_before"] - 1))
        assert row["sparsity_gain"] == pytest.approx(row["sparsity"] - row["sparsity_before"])
    code, mixed = rows[0], rows[1]
    assert (code["perplexity_before"], code["perplexity"]) == (
        before["perplexity"]["code"],
        after["perplexity"]["code"],
    )
    assert (code["sparsity_before"], code["sparsity"]) == (
        pytest.approx(before["sparsity"]["code"]),
        pytest.approx(after["sparsity"]["code"]),
    )
    found = content(thresholds)
    assert mixed["promised_increase_pct"] == pytest.approx(found["ppl_increase_pct"])
    assert mixed["promised_sparsity_gain"] == pytest.approx(found["sparsity_gain"])

    result = of_run(run)
    assert [s.threshold_text for s in result.settings] == [None, f"mean {found['mean_threshold']:.3g}"]
    assert [r["perplexity_increase_pct"] for r in result.held_out] == [mixed["perplexity_increase_pct"]]
    cost = f"{mixed['perplexity_increase_pct']:+.2f} % on evaluation files ({found['ppl_increase_pct']:+.2f} %"
    assert result.lines[0].startswith(f"thresholds  prosparse: perplexity {cost} on calibration files), sparsity ")


@pytest.mark.parametrize("activation", ["original", "shifted_relu", "drelu", "fatrelu"])
def test_only_a_relu_model_is_calibrated(base: Any, activation: str) -> None:
    run, _ = base.run()
    with pytest.raises(BadInput, match=f"runs {activation}: FATReLU thresholds are for a model that runs ReLU"):
        calibrate(run, Variant("some", base.dense, activation, shift=0.1), base.corpora)


def test_a_split_without_a_window_is_said_before_the_model_is_loaded(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = torch.empty(0, 64, dtype=torch.int64)
    monkeypatch.setattr("prosparse_core.mixing.Mixture.calibration", lambda self, corpus: Batch(none, none, []))
    monkeypatch.setattr("prosparse_core.variants.load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(BadInput, match=r"the calibration split of code, more in .* is smaller than one window"):
        made(base, "cett", budget=0.07)


def test_the_same_step_gives_the_same_thresholds(base: Any) -> None:
    _, _, first = made(base, "cett")
    _, _, again = made(base, "cett", force=True)
    assert again.digest == first.digest


def test_best_is_whichever_rule_reaches_more_sparsity(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = content(made(base, "best", budget=0.06, force=True)[2])
    by_rule = {rule: content(made(base, rule, budget=0.06, force=True)[2]) for rule in ("grid", "cett")}
    better = max(by_rule, key=lambda rule: by_rule[rule]["sparsity"])
    assert found["rule"] == better
    assert found["per_layer"] == by_rule[better]["per_layer"]
    monkeypatch.setattr("prosparse_core.cett.thresholds_at", lambda curves, cett: [cett / 1e4, 0.0, 0.0])
    _, seen, artifact = made(base, "best", budget=0.06, force=True)
    assert content(artifact)["rule"] == "grid"
    remark = artifact.meta()["remark"]
    assert remark in seen.notes, "why one threshold per layer was not taken"
    assert "calibrate.rule" not in remark

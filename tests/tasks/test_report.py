"""The report as a step: what it leaves, when it is cached, and what Prefect gets of it."""

from __future__ import annotations

import contextlib
import csv
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prosparse_core import recipe as recipes
from prosparse_core.ledger import Ledger
from prosparse_core.progress import Silent
from prosparse_core.store import Artifact, read_record
from tasks.report import attach, report
from tasks.step import Run, Work

PREFECT = ("create_markdown_artifact", "create_table_artifact", "create_link_artifact")


class Nobody:
    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[Silent]:
        yield Silent()

    def outcome(self, label: str, outcome: str, detail: str = "") -> None:
        pass


def open_run(home: Path, run_id: str = "run-1", **changes: Any) -> Run:
    recipe = recipes.load("tiny")
    ledger = Ledger(home)
    ledger.start_run(
        run_id=run_id,
        flow="prosparse",
        recipe=recipe.name,
        recipe_yaml=recipe.to_yaml(),
        overrides=[],
        model=recipe.model.id,
        provenance={"host": "here", "pid": 1},
    )
    return Run(recipe, home, run_id, ledger, Nobody(), **changes)


def measure(run: Run, setting: str, perplexity: float) -> Artifact:
    """A step that evaluates, as far as the ledger can tell."""

    def body(work: Work) -> None:
        variant = f"{setting}@0"
        work.fact("variants", variant=variant, model="m", setting=setting, tokens_seen=7)
        rest = {"corpus": "code", "metric": "token_perplexity", "stderr": 0.01, "n": 100}
        work.fact("evaluations", variant=variant, value=perplexity, **rest)
        for layer in range(2):
            work.fact("sparsity", variant=variant, corpus="code", layer=layer, num_tokens=100, sparsity=0.5 + layer / 4)

    config = {"setting": setting, "perplexity": perplexity}
    return run.step("evaluate", f"evaluate · {setting}", body, version=1, config=config, inputs={})


def go(home: Path, run_id: str = "run-1", perplexity: float = 3.0, **changes: Any) -> tuple[Run, Artifact]:
    run = open_run(home, run_id, **changes)
    measure(run, "original", 2.0)
    measure(run, "prosparse", perplexity)
    return run, report(run)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, str | None]]:
    """What would have gone to Prefect: (function, content, key)."""
    import prefect.artifacts

    calls: list[tuple[str, Any, str | None]] = []
    for name in PREFECT:

        def create(content: Any, key: str | None = None, *, name: str = name, **rest: Any) -> None:
            calls.append((name, content, key))

        monkeypatch.setattr(prefect.artifacts, name, create)
    return calls


def test_leaves_the_page_and_its_data(tmp_path: Path) -> None:
    _, artifact = go(tmp_path)
    page = (artifact.path / "report.html").read_text(encoding="utf-8")
    assert "run-1" in page
    assert "1.50×" in page
    assert "62.5\u00a0%" in page
    with open(artifact.path / "data" / "layers.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(r["setting"], r["layer"], r["sparsity"]) for r in rows] == [
        ("prosparse", "0", "0.5"),
        ("prosparse", "1", "0.75"),
    ]
    record = read_record(artifact.path)
    assert list(record["inputs"]) == ["evaluate · original", "evaluate · prosparse"]
    assert record["meta"] == {"run_id": "run-1", "page": "report.html", "data": ["layers.csv"]}
    assert {f["path"] for f in record["files"]} == {"report.html", "data/layers.csv", "facts.jsonl"}


def test_is_cached_until_something_it_stands_on_changes(tmp_path: Path) -> None:
    _, first = go(tmp_path, "run-1")
    again, second = go(tmp_path, "run-2")
    assert again.history[-1][2] == "cached"
    assert second.folder == first.folder
    other, third = go(tmp_path, "run-3", perplexity=4.0)
    assert other.history[-1][2] == "done"
    assert "2.00×" in (third.path / "report.html").read_text(encoding="utf-8")


def test_its_own_step_is_running_and_left_out_of_the_count(tmp_path: Path) -> None:
    _, artifact = go(tmp_path)
    page = (artifact.path / "report.html").read_text(encoding="utf-8")
    assert "2: 2 made" in page
    assert "up to its last finished step" in page


def test_steps_of_one_label_are_all_inputs(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    measure(run, "original", 2.0)
    measure(run, "original", 2.5)
    assert list(read_record(report(run).path)["inputs"]) == ["evaluate · original", "evaluate · original (2)"]


def test_a_plan_asks_only(tmp_path: Path) -> None:
    _, done = go(tmp_path / "home")
    for home, outcome in ((tmp_path / "empty", "would run"), (tmp_path / "home", "cached")):
        run = Run(recipes.load("tiny"), home, "plan", Ledger(home), Nobody(), planning=True, prefect=True)
        measure(run, "original", 2.0)
        measure(run, "prosparse", 3.0)
        found = report(run)
        assert run.history[-1][2] == outcome
        assert found.digest == (done.digest if outcome == "cached" else None)
    assert not (tmp_path / "empty").exists()


def test_prefect_gets_the_tables_also_of_a_cached_run(tmp_path: Path, sent: list[tuple[str, Any, str | None]]) -> None:
    go(tmp_path, "run-1")
    assert not sent
    run, artifact = go(tmp_path, "run-2")
    assert run.history[-1][2] == "cached"
    assert attach(run, artifact) == ["prosparse-results", "prosparse-table-results", "prosparse-report"]
    assert [name for name, _, _ in sent] == list(PREFECT)
    markdown, table, link = (content for _, content, _ in sent)
    assert "run-2" in markdown
    assert "| ProSparse, with FATReLU thresholds |" in markdown
    assert table[-1]["Setting"] == "ProSparse with FATReLU thresholds"
    assert link == (artifact.path / "report.html").as_uri()


def test_a_deaf_prefect_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import prefect.artifacts

    def deaf(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(prefect.artifacts, "create_table_artifact", deaf)
    monkeypatch.setattr(prefect.artifacts, "create_markdown_artifact", lambda *a, **k: None)
    run, artifact = go(tmp_path)
    with caplog.at_level(logging.WARNING, logger="prosparse.report"):
        assert attach(run, artifact) == ["prosparse-results"]
    assert "nobody answers" in caplog.text
    assert (artifact.path / "report.html").is_file()


@pytest.mark.slow
def test_the_flow_run_holds_them(tmp_path: Path) -> None:
    """Against a real, temporary Prefect server."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
    from prefect.runtime import flow_run
    from prefect.testing.utilities import prefect_test_harness

    @flow(name="with-report", persist_result=False)
    def reported() -> str:
        go(tmp_path, prefect=True)
        return str(flow_run.id)

    with prefect_test_harness(server_startup_timeout=180):
        run_id = reported()
        with get_client(sync_client=True) as client:
            mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
            found = {a.key: a for a in client.read_artifacts(artifact_filter=mine)}
    assert set(found) == {"prosparse-results", "prosparse-table-results", "prosparse-report"}
    assert found["prosparse-results"].type == "markdown"
    assert "ProSparse" in str(found["prosparse-results"].data)
    assert "report.html" in str(found["prosparse-report"].data)

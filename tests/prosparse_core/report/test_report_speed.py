"""Decoding and the curve over sparsities in the report: every way beside its price, points beside what bytes allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import Scribe, write_story

from prosparse_core.ledger import Ledger
from prosparse_core.report.data import ReportData, collect
from prosparse_core.report.page import plots, render, tiles
from prosparse_core.report.plot_curve import curve
from prosparse_core.report.speed_rows import bars
from prosparse_core.report.tables_speed import decoding, other_speedups, speedups

LOOPS = {  # provider: ms of recorded masks, of raised ones, byte ratio
    "native_dense": (40.0, 40.0, None),
    "native_exact": (30.0, 25.0, 1.4),
    "native_certified": (26.0, 20.0, 1.7),
}


class SpeedScribe(Scribe):
    """The native loop in every way, two cutoffs of a predictor, llama.cpp that is not there, and a curve."""

    def speed(self) -> list[dict[str, Any]]:
        facts = [f for f in super().speed() if f.get("kernel") != "decode" and f["variant"] is not None]
        for mask_source, place, sparsity in (("recorded", 0, 0.8), ("raised", 1, 0.89)):
            for provider, (*ms, limit) in LOOPS.items():
                facts.append(self.decode(provider, ms[place], mask_source, sparsity, limit=limit))
            facts.append(self.decode("transformers_dense", 80.0, mask_source, sparsity))
        for cutoff, ms in ((0.25, 24.0), (0.5, 21.0)):
            facts.append({**self.decode("native_predicted", ms, "recorded", 0.8, limit=1.8), "cutoff": cutoff})
        for provider, ms in (("native_dense", 60.0), ("native_exact", 50.0)):
            note = None if provider == "native_dense" else "n/a: the weights fit"
            long = {"prompt_tokens": 512, "byte_ratio_note": note}
            facts.append({**self.decode(provider, ms, "recorded", 0.8), **long})
        absent = {"table": "speed", "kernel": "decode", "provider": "llama_cpp", "dtype": "float16", "threads": 1}
        facts.append({**absent, "timer": "process_cpu", "note": "n/a: llama-cpp-python is not installed"})
        for sparsity in (0.0, 0.5, 0.89):
            times = {
                "torch": 500.0,
                "native_dense": 400.0,
                "native": 400 - 250 * sparsity,
                "certified": 330 - 260 * sparsity,
            }
            for provider, us in times.items():
                limit = None if provider in ("torch", "native_dense") else 3 / (1 + 2 * (1 - sparsity))
                fact = {**self.timing("ffn", provider, us, limit), "variant": None, "mask_source": "random"}
                facts.append({**fact, "num_tokens": 1, "sparsity": sparsity, "gate_passed": True, "rel_err": 1e-7})
        return facts

    def step(self, step: str, label: str, facts: list[dict[str, Any]], **more: Any) -> None:
        super().step(step, label, facts, **({"predictors": "predictor"} if step == "speed" else {}), **more)

    def decode(
        self, provider: str, ms: float, mask_source: str, sparsity: float, limit: float | None = None
    ) -> dict[str, Any]:
        fact = {**self.timing("decode", provider, 1000 * ms, limit), "num_tokens": 1, "tokens_per_s": 1000 / ms}
        lives = {"live_frac": 0.2, "bandwidth_share": 0.75, "note": None}
        same = {"mask_source": mask_source, "sparsity": sparsity, "prompt_tokens": 32}
        return {**fact, **lives, **same, "gate_passed": True, "rel_err": 1e-6}

    def predictors(self) -> list[dict[str, Any]]:
        prices = {"exact": 14.0, "cutoff 0.25": 14.7, "cutoff 0.5": 16.1}
        row = {"table": "evaluations", "variant": "prosparse@0123abcd", "corpus": "mixed", "dtype": "fp32"}
        return [
            *super().predictors(),
            *(
                {**row, "task": f"predictor/{name}", "metric": "predicted_perplexity", "value": value, "n": 99}
                | {"higher_is_better": False}
                for name, value in prices.items()
            ),
        ]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, ReportData]:
    home: Path = tmp_path_factory.mktemp("speed")
    ledger, story = write_story(home, scribe=SpeedScribe)
    return ledger, collect(ledger, story.run_id)


def test_every_way_stands_beside_its_price(told: tuple[Ledger, ReportData]) -> None:
    grid = decoding(told[1])
    assert grid is not None
    every = grid.records()
    rows = {(r["Loop"], r["Masks"]): r for r in every if r["Prompt"] in ("32", "–")}
    exact = rows["our loop, exact", "the model's own"]
    assert exact["As fast as: Best dense loop"] == "1.33× over our own dense kernel"
    assert exact["Byte ratio"] == "1.40×"
    assert exact["One token"].startswith("30.0 ")
    assert exact["Perplexity"] == "14.00 +0.0 %"
    predicted = rows["our loop, predicted neurons cutoff 0.5", "the model's own"]
    assert predicted["As fast as: Best dense loop"] == "1.90× ! over our own dense kernel"
    assert predicted["Byte ratio"] == "1.80×"
    assert any(note.startswith("above its byte ratio: it reads 11.3 GB/s, its baseline 11.3") for note in grid.notes)
    assert predicted["Perplexity"] == "16.10 +15.0 %"
    raised = rows["our loop, certified gate", "raised, for timing"]
    assert raised["As fast as: Best dense loop"].startswith("2.00×")
    assert raised["Perplexity"] == "–", "nothing is measured with raised thresholds"
    assert rows["our loop, dense", "the model's own"]["As fast as: Best dense loop"] == "–"
    (long,) = (r for r in every if r["Prompt"] == "512" and r["Loop"] == "our loop, exact")
    assert long["As fast as: Best dense loop"] == "1.20× over our own dense kernel", "of prompts as long"
    assert long["Byte ratio"] == "n/a"
    assert "n/a: the weights fit" in grid.notes
    assert "n/a: llama-cpp-python is not installed" in grid.notes


def test_the_tradeoff_is_a_question_to_the_ledger(told: tuple[Ledger, ReportData]) -> None:
    rows = told[0].query(
        "SELECT provider, cutoff, perplexity, round(perplexity_increase_pct) AS rise, round(decode_over_dense, 2) AS x "
        "FROM decode_tradeoff WHERE gate_passed AND prompt_tokens = 32 ORDER BY p50_us"
    )
    assert rows.rows == [
        ("native_predicted", 0.5, 16.1, 15.0, 1.9),
        ("native_predicted", 0.25, 14.7, 5.0, 1.67),
        ("native_certified", None, 14.0, 0.0, 1.54),
        ("native_exact", None, 14.0, 0.0, 1.33),
        ("native_dense", None, 14.0, 0.0, 1.0),
        ("transformers_dense", None, 14.0, 0.0, 0.5),
    ]


def test_the_curve_has_points_over_the_best_dense_kernel_and_byte_ratios(told: tuple[Ledger, ReportData]) -> None:
    plot = curve(told[1])
    assert {(r["provider"], r["baseline"]) for r in plot.rows} == {(p, "native_dense") for p in ("native", "certified")}
    assert [r["sparsity"] for r in plot.rows if r["provider"] == "native"] == [0.0, 0.5, 0.89]
    for svg in (plot.wide, plot.narrow):
        assert "certified gate: bytes" in svg
        assert "limit" not in svg
        assert "times as fast as the best dense kernel" in svg
    assert "exact over our own dense kernel at 89\u00a0% zeros: 2.25×" in plot.alt
    assert "zeros in the mask (%)" in plot.wide
    assert "fp32" in plot.remarks[0] or "float32" in plot.remarks[0]


def test_random_shapes_and_predictors_are_no_bars_and_no_tile(told: tuple[Ledger, ReportData]) -> None:
    data = told[1]
    drawn, more = bars(data)
    assert {r["mask_source"] for r in drawn} == {"recorded"}
    assert {r["cutoff"] for r in drawn} == {None}
    assert {r["provider"] for r in drawn if r["kernel"] == "decode"} == {"native_exact", "native_certified"}
    assert more > 0
    assert next(t for t in tiles(data) if t.title == "as fast an FFN").value == "2.37×"
    assert {r["prompt_tokens"] for r in drawn if r["kernel"] == "decode"} == {32}, "the shortest"
    assert {r["baseline"] for r in drawn} == {"native_dense"}, "the best alone"
    main, appendix = speedups(data), other_speedups(data)
    assert main is not None
    assert appendix is not None
    assert {r["Baseline"] for r in main.records() if r["Implementation"] != "llama.cpp"} == {"our own dense kernel"}
    assert {r["Baseline"] for r in appendix.records()} == {"dense torch", "dense transformers"}
    assert "Byte ratio" not in appendix.records()[0]
    page = render(data)
    assert page.index("Speed-ups over the best dense kernel") < page.index("Appendix: the same kernels over slower")
    assert page.count('id="curve-wide') >= 1
    assert "Decoding, one sequence" in page
    assert "curve" in {p.name for p in plots(data)}

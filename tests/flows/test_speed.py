"""``prosparse bench``: any checkpoint or a shape, timed under named conditions; bad input named before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows import cli, console, summary
from flows.bench_table import bench_rows, bench_tables
from kernels import cpu
from prosparse_core.ledger import Ledger
from prosparse_core.store import FACTS, Store, fingerprint
from prosparse_core.variants import MODEL
from tasks import speed as module
from tests.tasks.held_out_files import make_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("PROSPARSE_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "out", console.out)  # --json sends it elsewhere for good
    monkeypatch.setattr(module, "CURVE", (0.5,))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose config says ReLU."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    config = json.loads((folder / MODEL / "config.json").read_text())
    (folder / MODEL / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    return folder / MODEL


@pytest.fixture(autouse=True)
def _native() -> None:
    if not cpu.available():
        pytest.skip(cpu.available().why)


def test_a_shape_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--shape", "33x70", "--dtype", "bf16", "--sparsity", "0.8", "--budget", "0.1", "--inline"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "best_dense" in shown
    assert "over_torch" not in shown
    assert "kernels · dtype bfloat16, tokens 1, masks random" in shown
    assert cli.main([*arguments, "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    rows = said["timings"]
    assert {(r["kernel"], r["provider"]) for r in rows} >= {("s2", "native"), ("ffn", "certified"), ("gate", "torch")}
    for row in rows:
        assert (row["d_model"], row["d_ff"], row["dtype"], row["masks"]) == (33, 70, "bfloat16", "random")
        assert row["zeros"] == pytest.approx(0.8, abs=0.01)
        assert (row["threads"], row["timer"], row["cache"], row["gate"]) == (1, "process_cpu", "cold", True)
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["of_ceiling"] is None, "nor does a share of the memory's rate"
    ffn = {r["provider"]: r for r in rows if r["kernel"] == "ffn"}
    best = min((ffn["torch"], ffn["native_dense"]), key=lambda r: r["p50_us"])
    assert ffn["native"]["speedup"] == pytest.approx(best["p50_us"] / ffn["native"]["p50_us"], abs=1e-3)
    assert ffn["native"]["best_dense"] == best["provider"]
    assert said["speed"]["speedup"]["ffn"] == pytest.approx(ffn["native"]["speedup"], abs=1e-3)
    assert "fit into the last-level cache" in ffn["native"]["note"], "so few weights: bytes say nothing"
    assert ffn["native"]["byte_ratio"] is None
    headline = {row["kernel"]: row for row in said["headline"]}
    assert set(headline) == {"s2", "s3", "ffn"}
    assert headline["ffn"]["baseline"] == best["provider"]
    run_id = said["run_id"]
    (run,) = Ledger(home).query("SELECT DISTINCT flow, recipe, status FROM runs").records()
    assert run == {"flow": "speed", "recipe": "bench-33x70", "status": "done"}
    assert len(Ledger(home).query("SELECT DISTINCT artifact FROM speed").rows) == 2, "timed anew every time"
    assert len(bench_rows(Ledger(home), run_id)) == len(rows)


@pytest.mark.slow
def test_a_checkpoint_from_elsewhere_and_then_its_variant(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(model), "--budget", "0.2", "--sparsity", "0.95", "--inline", "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    decode = [r for r in said["timings"] if r["kernel"] == "decode" and "p50_us" in r and r["p50_us"]]
    assert {(r["provider"], r["dtype"], r["masks"]) for r in decode} >= {
        ("native_certified", t, m) for t in ("float32", "float16") for m in ("recorded", "raised")
    }
    assert said["speed"]["speedup"]["decode"] > 0
    assert said["steps"] == {"done": 3}
    (variant,) = Ledger(home).query("SELECT DISTINCT variant FROM speed WHERE mask_source = 'recorded'").rows[0]
    assert variant.startswith("relu@")
    assert cli.main(["bench", variant, "--budget", "0.2", "--inline", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["steps"] == {"done": 1}, "on the text of the run before"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no run has made a prosparse variant yet"),
        (["no-such-model"], "is no folder, and no hub id"),
        (["MODEL", "--shape", "3x4"], "both a model"),
        (["--shape", "3y4"], "two numbers from 1 to"),
        (["--shape", "0x4"], "two numbers from 1 to"),
        (["--shape", "3x4", "--sparsity", "1.5"], "a share from 0 to 1"),
        (["MODEL", "--dtype", "bf16"], "drop --dtype"),
        (["MODEL", "--threads", "0"], "threads=0: more than 0"),
        (["MODEL", "--budget", "-1"], "budget_s=-1.0"),
        (["MODEL", "--sparsity", "1"], "raised_sparsity=1.0"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    named = [str(model) if a == "MODEL" else a for a in arguments]
    assert cli.main(["bench", *named, "--inline"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not home.exists()


def test_the_closing_lines_group_what_can_be_compared() -> None:
    def way(provider: str, ms: float | None, **changes: Any) -> dict[str, Any]:
        row = {"provider": provider, "dtype": "float32", "mask_source": "recorded", "cutoff": None, "sparsity": 0.8}
        is_dense = provider.endswith("_dense")
        over = {
            "speedup": None if ms is None or is_dense else 30 / ms,
            "baseline": None if is_dense else "native_dense",
        }
        return {**row, "prompt_tokens": 32, "ms": ms, **over, **changes}

    found = summary.decode_lines(
        [
            way("transformers_dense", 60.0),
            way("native_dense", 30.0),
            way("native_exact", 20.0),
            way("native_predicted", 10.0, cutoff=0.5),
            way("native_certified", None),
            way("native_exact", 15.0, mask_source="raised", sparsity=0.89),
            way("native_exact", 40.0, prompt_tokens=512, speedup=1.25, baseline="transformers_dense"),
            way("llama_cpp", 12.0, mask_source=None, dtype="float16", speedup=0.9),
        ]
    )
    assert found == [
        "ms/token    transformers dense 60.0, native dense 30.0, native exact 20.0 (1.50x) "
        "[after 32 tokens, float32, 80.0 % zeros; x: over our dense]",
        "ms/token    native exact 15.0 (2.00x) "
        "[after 32 tokens, float32, 89.0 % zeros, thresholds raised for timing; x: over our dense]",
        "ms/token    native exact 40.0 (1.25x) [after 512 tokens, float32, 80.0 % zeros; x: over transformers]",
        "ms/token    llama cpp 12.0 (0.90x) [after 32 tokens, float16, the dense original; x: over our dense]",
    ]


def test_the_closing_line_has_one_baseline_and_explains_what_is_above_its_byte_ratio() -> None:
    row = {"byte_ratio_note": None, "above_byte_ratio": False, "above_byte_ratio_note": None, "prompt_tokens": None}
    why = "above its byte ratio: it reads 18.0 GB/s, its baseline 12.0"
    headline = [
        {**row, "kernel": "s2", "baseline": "torch", "speedup": 4.0, "byte_ratio": 5.0},
        {**row, "kernel": "ffn", "baseline": "native_dense", "speedup": 3.99, "byte_ratio": 2.7}
        | {"above_byte_ratio": True, "above_byte_ratio_note": why},
        {**row, "kernel": "decode", "baseline": "native_dense", "speedup": 1.5, "byte_ratio": None, "prompt_tokens": 32}
        | {"byte_ratio_note": "n/a: the weights, 1.5 MiB, fit into the last-level cache of 32 MiB"},
    ]
    assert summary.speed_lines({"implementation": "native", "reasons": {"s3": "failed"}}, headline) == [
        "speed-up    over the faster of torch and our dense kernel: S2 4.00x (torch; byte ratio 5.00x), S3 n/a, "
        "FFN 3.99x! (our dense; byte ratio 2.70x), decode after 32 tokens 1.50x (our dense; byte ratio n/a) [native]",
        f"            ! FFN {why}",
        "            byte ratio n/a: the weights, 1.5 MiB, fit into the last-level cache of 32 MiB",
    ]
    assert summary.speed_lines({"implementation": "n/a", "reasons": dict.fromkeys("ab", "no gate")}, []) == [
        "speed-up    n/a: no gate"
    ]


def test_a_number_above_what_should_bound_it_is_marked_and_explained(tmp_path: Path) -> None:
    row = {"kernel": "ffn", "num_tokens": 1, "dtype": "float32", "mask_source": "random", "timer": "wall"}
    rows = [
        {**row, "provider": "native_dense", "p50_us": 200.0, "gbps": 12.0, "bandwidth_share": 0.8},
        {**row, "provider": "torch", "p50_us": 300.0, "gbps": 8.0, "bandwidth_share": 0.5},
        {**row, "provider": "native", "p50_us": 50.0, "gbps": 18.0, "bandwidth_share": 1.2, "byte_ratio": 2.7},
        {**row, "provider": "certified", "p50_us": 100.0, "byte_ratio_note": "n/a: the weights fit"},
    ]
    lines = [{"table": "speed", "gate_passed": True, **r} for r in rows]
    facts = "".join(json.dumps(line) + "\n" for line in lines)
    ledger = recorded(tmp_path, facts)
    ((title, columns, cells, notes),) = bench_tables(bench_rows(ledger, "r"))
    table = {line[columns.index("provider")]: dict(zip(columns, line, strict=True)) for line in cells}
    assert "above" not in title
    assert (table["native"]["speedup"], table["native"]["byte_ratio"]) == ("4 !", 2.7)
    assert table["native"]["of_ceiling"] == "1.2 !"
    assert notes[table["native"]["note"] - 1] == (
        f"{table['native']['note']}. above its byte ratio: it reads 18.0 GB/s, its baseline 12.0; "
        "above the ceiling: memory was never seen to be read as fast"
    )
    assert (table["certified"]["speedup"], table["certified"]["byte_ratio"]) == (2.0, "n/a")
    assert notes[table["certified"]["note"] - 1].endswith(". byte ratio n/a: the weights fit")
    ((_, columns, cells, _),) = bench_tables([{**r, "byte_ratio": None} for r in bench_rows(ledger, "r")])
    assert {line[columns.index("byte_ratio")] for line in cells} == {"", "n/a"}, "never left out where it is asked for"
    assert table["torch"]["speedup"] == table["torch"]["byte_ratio"] == "", "one baseline, the best"
    assert "best_dense native_dense" in title or table["native"]["best_dense"] == "native_dense"


def recorded(home: Path, facts: str) -> Ledger:
    """A ledger with one run, whose one step left these facts."""
    store, ledger = Store(home), Ledger(home)
    payload = {"step": "speed", "version": 1, "config": {}, "inputs": {}, "seed": 0}
    ledger.start_run(
        run_id="r",
        flow="speed",
        recipe="x",
        recipe_yaml="",
        overrides=[],
        model="m",
        provenance={"host": "h", "pid": 1},
    )
    work = store.work_folder("speed", fingerprint(payload))
    work.mkdir(parents=True)
    (work / FACTS).write_text(facts)
    provenance = {"created_at": "2026-01-01T00:00:00+00:00"}
    made = store.commit(work, step="speed", label="s", payload=payload, inputs={}, provenance=provenance, meta={})
    ledger.record_artifact(made.path)
    step = ledger.start_step("r", step="speed", stage=None, label="s", fingerprint=str(made.fingerprint))
    ledger.end_step(step, status="done", artifact=made.digest)
    return ledger

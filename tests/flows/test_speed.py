"""``prosparse bench``: any checkpoint or a shape, timed under named conditions; bad input named before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows import cli, console, summary
from flows.bench_table import bench_rows
from kernels import cpu
from prosparse_core.ledger import Ledger
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
    assert "over_torch" in shown
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
        assert row["of_ceiling"] >= 0
    ffn = {r["provider"]: r for r in rows if r["kernel"] == "ffn"}
    assert ffn["native"]["over_torch"] == pytest.approx(ffn["torch"]["p50_us"] / ffn["native"]["p50_us"], abs=1e-3)
    assert said["speed"]["speedup"]["ffn"] == pytest.approx(ffn["native"]["over_torch"], abs=1e-3)
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
        return {**row, "ms": ms, "over_own_dense": None if ms is None else 30 / ms, **changes}

    found = summary.decode_lines(
        [
            way("transformers_dense", 60.0),
            way("native_dense", 30.0),
            way("native_exact", 20.0),
            way("native_predicted", 10.0, cutoff=0.5),
            way("native_certified", None),
            way("native_exact", 15.0, mask_source="raised", sparsity=0.89),
            way("llama_cpp", 12.0, mask_source=None, dtype="float16", over_own_dense=0.9),
        ]
    )
    assert found == [
        "ms/token    transformers dense 60.0, native dense 30.0, native exact 20.0 (1.50x) [float32, 80.0 % zeros]",
        "ms/token    native exact 15.0 (2.00x) [float32, 89.0 % zeros, thresholds raised for timing]",
        "ms/token    llama cpp 12.0 (0.90x) [float16, the dense original]",
    ]

"""The predictions: worked by hand, within bounds, and beside the paper's own numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.roofline import (
    GPUS,
    KERNELS,
    PUBLISHED,
    SHAPES,
    Assumptions,
    Gpu,
    Shape,
    beside_published,
    main,
    predict,
)

PAPER = Path(__file__).parents[2] / "prosparse_core" / "ledger" / "published.csv"
A100, H100 = GPUS
LLAMA_7B, LLAMA_13B = SHAPES


def test_a_prediction_worked_by_hand():
    gpu = Gpu("made up", bandwidth_tbps=1.0, fp32_tflops=1000.0, tf32_tflops=1000.0)
    shape = Shape("made up", d_model=1000, d_ff=2000)
    assume = Assumptions(achieved=0.5, launch_us=2.0, ramp_us=3.0)
    found = predict(gpu, shape, "s2", 0.25, dtype="fp32", assumptions=assume)
    # 500 rows of 4,000 bytes, x of 4,000 bytes, s read and x1 written: 2,000 x 8 bytes
    assert found.num_bytes == 2_000_000 + 4_000 + 16_000
    assert found.ideal_us == pytest.approx(2.02)
    assert found.predicted_us == pytest.approx(2.02 / 0.5 + 2.0 + 3.0)
    assert found.num_launches == 1
    dense = predict(gpu, shape, "s3", None, dtype="bf16", assumptions=assume)
    assert dense.num_bytes == 4_000_000 + 3_000 * 2
    # a slow processor: 2 operations for each of the 500,000 weights that live
    slow = Gpu("slow", bandwidth_tbps=1.0, fp32_tflops=0.01, tf32_tflops=1.0)
    assert predict(slow, shape, "s2", 0.25, assumptions=assume).predicted_us == pytest.approx(100.0 + 5.0)


def test_dense_7b_is_the_matrix_at_the_peak_bandwidth():
    assert predict(A100, LLAMA_7B, "s3", None).ideal_us == pytest.approx(90.18 / 2.04, rel=1e-3)
    assert predict(H100, LLAMA_7B, "s3", None).ideal_us == pytest.approx(90.18 / 3.35, rel=1e-3)


@given(
    kernel=st.sampled_from(KERNELS),
    live=st.floats(0.0, 1.0),
    gpu=st.sampled_from(GPUS),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    tokens=st.integers(1, 8),
)
def test_never_faster_than_the_bytes_and_never_slower_for_fewer_live_rows(kernel, live, gpu, shape, dtype, tokens):
    tokens = 1 if kernel in ("s2", "s3") else tokens
    found = predict(gpu, shape, kernel, live, dtype=dtype, num_tokens=tokens)
    assert found.predicted_us > found.ideal_us > 0
    sparser = predict(gpu, shape, kernel, live / 2, dtype=dtype, num_tokens=tokens)
    assert sparser.predicted_us <= found.predicted_us
    assert sparser.num_bytes <= found.num_bytes


def test_an_exact_ffn_cannot_gain_more_than_its_gate_allows():
    dense = predict(A100, LLAMA_7B, "ffn", None)
    for live in (0.0, 0.1068, 0.5):
        sparse = predict(A100, LLAMA_7B, "ffn", live)
        assert dense.ideal_us / sparse.ideal_us <= 3 / (1 + 2 * live)
    assert dense.predicted_us / predict(A100, LLAMA_7B, "ffn", 0.1068).predicted_us == pytest.approx(2.34, abs=0.05)


def test_the_ffn_is_its_launches():
    whole, k1, k2 = (predict(A100, LLAMA_7B, kernel, 0.1068) for kernel in ("ffn", "k1", "k2"))
    assert whole.num_launches == k1.num_launches + k2.num_launches + 2, "a clear and a cast"
    small = whole.predicted_us - k1.predicted_us - k2.predicted_us
    assert 2 * Assumptions().launch_us < small < 2 * Assumptions().launch_us + 0.1


def test_a_list_that_overflows_costs_the_whole_of_down():
    below, above = (predict(A100, LLAMA_7B, "k2", live, num_tokens=8).num_bytes for live in (0.5, 0.51))
    assert above > 1.9 * below


def test_what_is_called_published_is_what_the_paper_says():
    with PAPER.open(encoding="utf-8") as file:
        paper = {(r["model"], r["setting"], r["metric"], r["source"]): float(r["value"]) for r in csv.DictReader(file)}
    for entry in PUBLISHED:
        for metric, value in (("s2_us", entry.s2_us), ("s3_us", entry.s3_us), ("sparsity_pct", entry.sparsity_pct)):
            if value is not None:
                assert paper[entry.model, entry.setting, metric, entry.source] == value, (entry, metric)
    timed = {key[:2] for key in paper if key[2] in ("s2_us", "s3_us")}
    assert {(entry.model, entry.setting) for entry in PUBLISHED} == timed, "every time the paper gives"


def test_predictions_stand_beside_published_times_of_the_same_gpu_alone():
    rows = beside_published()
    num_sparse = sum(entry.sparsity_pct is not None for entry in PUBLISHED)
    assert len(rows) == len(GPUS) * (len(PUBLISHED) * 3 + num_sparse * 2)
    for row in rows:
        assert row["kind"] == "predicted"
        assert not {"p50_us", "value", "num_reps"} & row.keys(), "nothing that looks like a measurement"
        has_time = row["gpu"] == "A100-80G" and row["kernel"] in ("s2", "s3")
        assert (row["published_us"] is not None) == has_time
        if has_time:
            assert row["predicted_us"] < row["published_us"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "s4", "live": 0.1}, "kernel 's4'"),
        ({"kernel": "s2", "live": 1.1}, "live is 1.1"),
        ({"kernel": "s2", "live": 0.1, "num_tokens": 2}, "s2 takes from 1 to 1"),
        ({"kernel": "ffn", "live": 0.1, "num_tokens": 9}, "ffn takes from 1 to 8"),
        ({"kernel": "ffn", "live": 0.1, "dtype": "int8"}, "'int8'"),
        ({"kernel": "k1", "live": None}, "k1 fuses"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        predict(A100, LLAMA_7B, **arguments)


def test_the_command_says_what_it_is(capsys):
    assert main([]) == 0
    table = capsys.readouterr().out
    assert table.startswith("Predicted from bytes moved; nothing here was measured by this program.")
    assert "85% of the peak bandwidth" in table
    line = next(line for line in table.splitlines() if "llama2-7b   prosparse  " in line and " s2 " in line)
    assert line.split()[-1] == "45.38"
    assert main(["--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["assumptions"] == {"achieved": 0.85, "launch_us": 1.5, "ramp_us": 1.0}
    assert {row["kind"] for row in answer["rows"]} == {"predicted"}

"""The whole export: which predictors fit, what is said or refused, and that a wrong file does not stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tokens
from powerinfer_parts import artifact, model_folder, random_predictors, variant

from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.formats import powerinfer_export as exporting
from prosparse_core.formats.powerinfer_export import PowerInferExport, export_powerinfer
from prosparse_core.formats.powerinfer_file import read_gguf
from prosparse_core.formats.powerinfer_verify import verify
from prosparse_core.prediction.mask import PredictedMask, logit
from prosparse_core.prediction.recording import record
from prosparse_core.store import Artifact
from prosparse_core.thresholds import THRESHOLDS
from prosparse_core.variants import Variant, load_model

WINDOWS = [tokens(batch=1, length=n, seed=n, vocab=40) for n in (30, 21)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model/`` in it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model_folder(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def _without_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prosparse_core.variants.load_tokenizer", lambda folder: None)


def export(
    model: Path, tmp_path: Path, *, of: Variant | None = None, meta: Any = None, **more: Any
) -> PowerInferExport:
    folder = artifact(tmp_path / "predictor", random_predictors(), **(meta or {}))
    return export_powerinfer(
        of or variant(model), folder, tmp_path / "m.gguf", windows=WINDOWS, name="tiny", strict=True, **more
    )


@pytest.mark.parametrize(
    ("meta", "cutoff", "threshold"),
    [
        ({"input": "pre_norm"}, None, 0.0),
        ({"input": "pre_norm"}, 0.45, logit(0.45)),
        ({"input": "pre_norm", "chosen": {"cutoffs": [0.4, 0.45, 0.48]}}, None, None),
        ({"input": "pre_norm", "chosen": {"cutoffs": [0.4, 0.45, 0.48]}}, 0.55, logit(0.55)),
        ({"input": "post_norm"}, None, 0.0),
        ({}, 0.5, 0.0),
    ],
)
def test_the_file_computes_what_the_predictors_do_in_torch(
    model: Path, tmp_path: Path, meta: dict[str, Any], cutoff: float | None, threshold: float | None
) -> None:
    found = export(model, tmp_path, meta=meta, cutoff=cutoff)
    assert verify(found.target) == []
    assert found.perplexity == pytest.approx(found.torch_perplexity, rel=0.01)
    assert abs(found.exact_perplexity / found.torch_perplexity - 1) > 0.02, "the predictors must matter in this test"
    assert found.num_tokens == 29 + 20
    assert found.notes == ()
    assert len(found.remarks) == 1
    written = read_gguf(found.target).keys["powerinfer.sparse_threshold"].data
    assert written == pytest.approx(found.sparse_threshold)
    if threshold is not None:
        assert found.sparse_threshold == threshold


@pytest.mark.parametrize("cutoff", [0.45, 0.5, 0.55])
def test_predicted_sparsity_is_of_the_models_neurons(model: Path, tmp_path: Path, cutoff: float) -> None:
    """53 of the file's 1024; the others are computed where the threshold is not above 0."""
    found = export(model, tmp_path, meta={"input": "pre_norm"}, cutoff=cutoff)
    relu, _ = load_model(model / "model")
    shares = []
    with PredictedMask(relu, random_predictors(), [cutoff] * 3, "pre_norm"):
        seen = record(relu, WINDOWS[-1:], num_tokens=99, precision="fp32", dtype=torch.float32, source="pre_norm")
    for layer, one in zip(seen.layers, random_predictors(), strict=True):
        with torch.no_grad():
            shares.append(float((one(layer.inputs) < logit(cutoff)).float().mean()))
    assert found.predicted_sparsity == pytest.approx(sum(shares) / 3, abs=0.01)


@pytest.mark.parametrize(
    ("meta", "cutoff", "message"),
    [
        ({"input": "post_norm"}, 0.4, "only 0.5 means the same"),
        ({"chosen": {"cutoffs": [0.4, 0.4, 0.4]}}, None, "only 0.5 means the same"),
        ({"input": "pre_norm", "chosen": {"cutoffs": [0.4, 0.5, 0.6]}}, None, "one threshold for all layers"),
        ({"input": "pre_norm"}, 1.0, "--cutoff 1: a probability strictly between 0 and 1"),
    ],
)
def test_cutoffs_the_file_cannot_say_are_refused(
    model: Path, tmp_path: Path, meta: dict[str, Any], cutoff: float | None, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        export(model, tmp_path, meta=meta, cutoff=cutoff)
    assert not (tmp_path / "m.gguf").exists()


def thresholds(folder: Path, values: list[float]) -> Artifact:
    folder.mkdir()
    (folder / THRESHOLDS).write_text(json.dumps({"per_layer": values}))
    return Artifact("calibrate", "c", "2" * 64, "3" * 64, folder)


def test_fatrelu_is_written_as_relu_and_said_or_refused(model: Path, tmp_path: Path) -> None:
    fatrelu = variant(model, "fatrelu", thresholds=thresholds(tmp_path / "t", [0.0, 0.1, 0.2]))
    folder = artifact(tmp_path / "predictor", random_predictors(), input="pre_norm")
    where: dict[str, Any] = {"windows": WINDOWS, "name": "tiny"}
    message = r"FATReLU's threshold 0 to 0\.2 is not expressible in this format: the file runs ReLU \(t = 0\)"
    with pytest.raises(BadInput, match=f"--strict: {message}"):
        export_powerinfer(fatrelu, folder, tmp_path / "m.gguf", strict=True, **where)
    assert not (tmp_path / "m.gguf").exists()
    found = export_powerinfer(fatrelu, folder, tmp_path / "m.gguf", **where)
    assert len(found.notes) == 1
    relu = export_powerinfer(variant(model), folder, tmp_path / "relu.gguf", strict=True, **where)
    assert relu.perplexity == found.perplexity
    none = variant(model, "fatrelu", thresholds=thresholds(tmp_path / "zero", [0.0] * 3))
    assert export_powerinfer(none, folder, tmp_path / "zero.gguf", strict=True, **where).notes == ()


@pytest.mark.parametrize("activation", ["original", "shifted_relu", "drelu"])
def test_other_activations_are_refused(model: Path, tmp_path: Path, activation: str) -> None:
    with pytest.raises(BadInput, match=f"prosparse runs {activation}: PowerInfer runs ReLU on the gate"):
        export(model, tmp_path, of=variant(model, activation))


def test_a_file_that_is_there_stays(model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(BadInput, match="is there already"):
        export(model, tmp_path)
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_file_that_computes_something_else_does_not_stay(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of queries and keys in the wrong order keep every rule of the format: only the numbers tell."""
    monkeypatch.setattr("prosparse_core.powerinfer.interleave", lambda w, heads: w)
    with pytest.raises(ProSparseError, match=r"the file has perplexity .* but torch with the same predictors has"):
        export(model, tmp_path, meta={"input": "pre_norm"})
    assert not (tmp_path / "m.gguf").exists()
    monkeypatch.undo()
    monkeypatch.setattr("prosparse_core.variants.load_tokenizer", lambda folder: None)
    monkeypatch.setattr(exporting, "norm_scale", lambda norm, d_model: torch.ones(d_model))
    (tmp_path / "again").mkdir()
    with pytest.raises(ProSparseError, match="but torch with the same predictors has"):
        export(model, tmp_path / "again", meta={"input": "post_norm"})


def test_a_file_that_breaks_a_rule_does_not_stay(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prosparse_core.powerinfer.padded_neurons", lambda d_ff: d_ff)
    with pytest.raises(ProSparseError, match="53 neurons a layer: up to 1000"):
        export(model, tmp_path)
    assert not (tmp_path / "m.gguf").exists()

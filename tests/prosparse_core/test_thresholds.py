"""Thresholds on disk: whose they are, and what is said when they are somebody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import tiny

from prosparse_core.errors import BadInput
from prosparse_core.store import RECORD, Artifact
from prosparse_core.substitute import use_thresholds
from prosparse_core.thresholds import THRESHOLDS, read_thresholds
from prosparse_core.variants import MODEL, Variant, load_variant

OURS, OTHERS = "a" * 64, "b" * 64


def written(folder: Path, **content: Any) -> Artifact:
    folder.mkdir(exist_ok=True)
    (folder / THRESHOLDS).write_text(json.dumps(content), encoding="utf-8")
    return Artifact("calibrate", "calibrate", "1" * 64, "2" * 64, folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Artifact:
    """A model of three layers without any weights: what is refused is refused before they are read."""
    tiny().config.save_pretrained(tmp_path / "stage" / MODEL)
    return Artifact("stage", "stage 0", "3" * 64, OURS, tmp_path / "stage")


def test_thresholds_per_layer_and_the_best_global_one(checkpoint: Artifact, tmp_path: Path) -> None:
    thresholds = written(tmp_path / "t", per_layer=[0, 0.1, 0.2], threshold=0.07, checkpoint=OURS)
    variant = Variant("prosparse", checkpoint, "fatrelu", thresholds)
    assert variant.layer_thresholds() == [0.0, 0.1, 0.2]
    assert variant.best_global_threshold() == 0.07
    star = Variant("prosparse_star", checkpoint, "relu")
    assert (star.layer_thresholds(), star.best_global_threshold()) == (None, None)


def test_a_global_threshold_is_its_own_best(checkpoint: Artifact, tmp_path: Path) -> None:
    variant = Variant("prosparse", checkpoint, "fatrelu", written(tmp_path / "t", per_layer=[0.1] * 3))
    assert variant.best_global_threshold() == 0.1


def test_a_format_with_one_threshold_cannot_carry_what_was_never_calibrated(
    checkpoint: Artifact, tmp_path: Path
) -> None:
    variant = Variant("prosparse", checkpoint, "fatrelu", written(tmp_path / "t", per_layer=[0.1, 0.2, 0.3]))
    with pytest.raises(BadInput, match="no global one") as caught:
        variant.best_global_threshold()
    assert "calibrate again" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"per_layer": [0.1] * 4, "checkpoint": OURS}, "holds 4 thresholds, but the model has 3 layers"),
        ({"per_layer": [0.1], "checkpoint": OURS}, "holds 1 thresholds, but the model has 3 layers"),
        (
            {"per_layer": [0.1] * 3, "checkpoint": OTHERS},
            "on the checkpoint bbbbbbbbbbbb, but the model is aaaaaaaaaaaa",
        ),
    ],
)
def test_thresholds_of_another_model_are_refused_before_its_weights_are_read(
    checkpoint: Artifact, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    variant = Variant("prosparse", checkpoint, "fatrelu", written(tmp_path / "t", **content))
    for refuse in (variant.layer_thresholds, variant.best_global_threshold, lambda: load_variant(variant)):
        with pytest.raises(BadInput, match=message) as caught:
            refuse()
        assert str(tmp_path / "t" / THRESHOLDS) in str(caught.value)
        assert "run the recipe again" in (caught.value.hint or "")


def test_the_record_of_the_artifact_knows_the_checkpoint_too(checkpoint: Artifact, tmp_path: Path) -> None:
    thresholds = written(tmp_path / "t", per_layer=[0.1] * 3)
    (tmp_path / "t" / RECORD).write_text(json.dumps({"inputs": {"checkpoint": {"digest": OTHERS}}}), encoding="utf-8")
    with pytest.raises(BadInput, match="calibrated on the checkpoint"):
        Variant("prosparse", checkpoint, "fatrelu", thresholds).layer_thresholds()


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", '{"per_layer": []}', '{"per_layer": [0.1, "x"]}', '{"per_layer": [-1]}', '{"per_layer": [NaN]}'],
)
def test_a_file_that_holds_no_thresholds_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / THRESHOLDS).write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=THRESHOLDS):
        read_thresholds(tmp_path)
    with pytest.raises(BadInput, match="not readable"):
        read_thresholds(tmp_path / "nowhere")


@pytest.mark.parametrize("values", [[float("nan")], [0.1, -0.1, 0.2], [float("inf")] * 3])
def test_a_model_takes_only_finite_thresholds_of_at_least_zero(values: list[float]) -> None:
    with pytest.raises(BadInput, match="finite thresholds of at least 0"):
        use_thresholds(tiny(), values)

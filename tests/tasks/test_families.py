"""The steps after training on FFNs of other layouts than the gated one with three matrices and no bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prosparse_core.errors import BadInput
from prosparse_core.formats.plain import export_hf_relu, export_vllm
from prosparse_core.powerinfer import refuse
from prosparse_core.recipe import parse
from prosparse_core.variants import MODEL, Variant, check_folder
from tasks.base_model import base_model
from tasks.calibrate import calibrate
from tasks.predictor import predictor
from tasks.preflight import check
from tasks.speed import speed
from tasks.stage import train_stage
from tasks.substitute import substitute
from tests.tasks.conftest import MODEL as SIZES
from tests.tasks.conftest import make_run

SECTIONS = {
    "calibrate": {"rule": "best", "thresholds": [0.0, 0.01], "refine": 0, "max_ppl_increase_pct": 0.01},
    "predictor": {
        "hidden": 16,
        "train_tokens": 256,
        "test_tokens": 128,
        "epochs": 1,
        "init": "svd",
        "input": "pre_norm",
    },
    "speed": {"num_tokens": 8, "budget_s": 0.2, "decode_tokens": 4},
    "train": {"tokens_per_step": 64, "lr": 1e-3, "stages": [{"until_step": 2, "l1": 0}, {"until_step": 4, "l1": 0.01}]},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["phi3", "gpt2", "opt"])
def test_every_step_up_to_speed(base: Any, model_type: str, tmp_path: Path) -> None:
    model = {"id": model_type, "source": f"random:{model_type}", "config": SIZES, "precision": "fp32"}
    run, _ = make_run(base.home, parse({**base.recipe, **SECTIONS, "model": model}))
    dense, train = base_model(run), run.recipe.train
    assert substitute(run, dense, base.corpora).meta()["swapped"] == 3
    trained = dense
    for index in range(2):
        trained = train_stage(run, train, index, before=trained, corpora=base.corpora, dense=dense)
    star = Variant("prosparse_star", trained, "relu")
    thresholds = calibrate(run, star, base.corpora)
    assert 0.2 < thresholds.meta()["sparsity"] < 1
    variant = Variant("prosparse", trained, "fatrelu", thresholds)
    assert predictor(run, variant, base.corpora).meta()["recall"] > 0.3

    meta = speed(run, variant, base.corpora).meta()
    assert 0.2 < meta["sparsity"] < 1
    if model_type == "phi3":
        assert meta["speedup"]["decode"] is not None or meta["reasons"]["decode"]
        assert meta["implementation"] in ("native", "dense")
    else:
        assert set(meta["speedup"].values()) == {None}
        assert set(meta["reasons"].values()) == {f"an FFN without a gate (family {model_type}): sparse FFNs are gated"}
        assert meta["gate_passed"] is True, "nothing that ran disagreed"

    config = check_folder(trained.path / MODEL)
    for refused in (lambda: refuse(config), lambda: export_vllm(star, tmp_path / "vllm")):
        with pytest.raises(BadInput, match=model_type):
            refused()
    export_hf_relu(star, tmp_path / "relu")  # compares the logits of a plain reload


def test_an_activation_in_the_code_cannot_be_exported_as_a_config(base: Any, tmp_path: Path) -> None:
    model = {"id": "bloom", "source": "random:bloom", "config": SIZES, "precision": "fp32"}
    data = {**base.recipe["data"], "attend_across_documents": True}
    run, _ = make_run(base.home, parse({**base.recipe, "model": model, "data": data}))
    with pytest.raises(BadInput, match="bloom has its activation built in"):
        export_hf_relu(Variant("prosparse_star", base_model(run), "relu"), tmp_path / "relu")
    assert not (tmp_path / "relu").exists()


def test_an_architecture_that_cannot_keep_documents_apart_is_refused_before_anything_is_built(base: Any) -> None:
    model = {"id": "bloom", "source": "random:bloom", "config": SIZES, "precision": "fp32"}
    recipe = parse({**base.recipe, "model": model})
    with pytest.raises(BadInput, match="no way to keep the documents") as caught:
        check(recipe, base.home)
    assert "data.attend_across_documents: true" in str(caught.value.hint)
    check(
        parse({**base.recipe, "model": model, "data": {**base.recipe["data"], "attend_across_documents": True}}),
        base.home,
    )

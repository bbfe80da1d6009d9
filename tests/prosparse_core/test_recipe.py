"""Recipes: every shipped one validates, and every error of a bad one is reported at once, with its place and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prosparse_core import recipe as recipes
from prosparse_core.data.sources import check_source
from prosparse_core.errors import BadInput
from prosparse_core.schedule import l1_lambda

PUBLISHED = {
    # arXiv 2402.13516 Tables 6 and 7: (accumulated step, lambda at that step)
    "llama2-7b": [(5000, 0), (6000, 5e-3), (10000, 5e-2), (12000, 5e-2), (16000, 2e-1), (16500, 2e-1)],
    "llama2-13b": [(5500, 0), (6750, 5e-3), (10750, 1e-2), (11000, 1e-2), (15000, 2e-2), (16000, 2e-2)],
    "minicpm-1b": [
        (10000, 0),
        (15000, 1e-3),
        (20000, 5e-3),
        (25000, 5e-3),
        (35000, 5e-2),
        (95000, 5e-2),
        (101000, 1e-2),
    ],
}
PUBLISHED_TOKENS = {"llama2-7b": 34.60e9, "llama2-13b": 134.22e9}


def raw_tiny() -> dict[str, Any]:
    return yaml.safe_load(recipes.find("tiny").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_validates_under_its_own_name(name: str) -> None:
    loaded = recipes.load(name)
    assert loaded.name == name
    assert recipes.parse(yaml.safe_load(loaded.to_yaml())) == loaded


@pytest.mark.parametrize("name", recipes.names())
def test_every_source_of_a_shipped_recipe_is_sound_without_a_network(name: str) -> None:
    for source in recipes.load(name).data.sources:
        check_source(source)
        assert source.kind != "hub" or source.stream, "what is on the hub is too much for a disk"


@pytest.mark.parametrize(("name", "steps"), PUBLISHED.items())
def test_lambda_at_every_published_step_is_the_papers(name: str, steps: list[tuple[int, float]]) -> None:
    stages = recipes.load(name).train.stages
    assert [(s.until_step, l1_lambda(stages, s.until_step)) for s in stages] == steps


@pytest.mark.parametrize(("name", "tokens"), PUBLISHED_TOKENS.items())
def test_tokens_are_the_papers(name: str, tokens: float) -> None:
    assert recipes.load(name).train.total_tokens == pytest.approx(tokens, rel=2e-4)


def test_all_errors_are_reported_at_once() -> None:
    raw = raw_tiny()
    raw["model"]["sorce"] = "x"
    raw["data"]["sources"][0]["weight"] = -1
    raw["train"]["lr"] = "fast"
    raw["calibrat"] = {}
    with pytest.raises(BadInput) as caught:
        recipes.parse(raw)
    text = str(caught.value)
    assert "4 problems" in text
    assert "model.sorce: unknown key; did you mean 'source'?" in text
    assert "data.sources[0].weight" in text
    assert "(got -1)" in text
    assert "train.lr" in text
    assert "(got 'fast')" in text
    assert "calibrat: unknown key; did you mean 'calibrate'?" in text


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([(10, 0), (5, 0.1)], "stages[1].until_step=5 must exceed stages[0].until_step=10"),
        ([(10, 0.5), (20, 0.5)], "its lambda is 0"),
        ([(10, 0), (20, 0.5), (30, 0.1)], "lambda never falls"),
        ([(10, 0), (20, 0.1), (30, 0.5)], "use ramp: sine"),
    ],
)
def test_stages_out_of_order_are_refused(stages: list[tuple[int, float]], expected: str) -> None:
    raw = raw_tiny()
    raw["train"]["stages"] = [{"until_step": t, "l1": v} for t, v in stages]
    with pytest.raises(BadInput) as caught:
        recipes.parse(raw)
    assert expected in str(caught.value)


def test_lambda_may_fall_in_an_sft_stage() -> None:
    raw = raw_tiny()
    raw["train"]["stages"] = [
        {"until_step": 10, "l1": 0},
        {"until_step": 20, "l1": 0.05},
        {"until_step": 30, "l1": 0.01, "phase": "sft"},
    ]
    stages = recipes.parse(raw).train.stages
    assert [l1_lambda(stages, s) for s in (20, 21, 30)] == [0.05, 0.01, 0.01]


def test_a_warm_up_that_is_not_flat_is_refused() -> None:
    raw = raw_tiny()
    raw["train"]["stages"] = [{"until_step": 10, "l1": 0}, {"until_step": 20, "l1": 0.1, "ramp": "sine"}]
    with pytest.raises(BadInput, match="warm-up stage is flat"):
        recipes.parse(raw)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": {"seq_len": 100}}, "must be a multiple of data.seq_len=100"),
        ({"train": {"micro_batch": 3}}, "must divide the 8 sequences"),
        ({"calibrate": {"thresholds": [0.1, 0.2]}}, "must rise from 0"),
        ({"predictor": {"cutoffs": [0.0, 0.5]}}, "strictly between 0 and 1"),
        ({"seed": 1.5}, "seed"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], expected: str) -> None:
    raw = raw_tiny()
    for key, value in change.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw else value
    with pytest.raises(BadInput) as caught:
        recipes.parse(raw)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([{"name": "a", "kind": "hub", "weight": 1}], "needs a path"),
        ([{"name": "a", "kind": "python-code", "weight": 0}], "weights of all sources are 0"),
        ([{"name": "a", "kind": "python-code", "weight": 1}] * 2, "same name: a"),
        ([{"name": "mixed", "kind": "python-code", "weight": 1}], "cannot be named 'mixed'"),
        ([{"name": "choices", "kind": "python-code", "weight": 1}], "cannot be named 'choices'"),
        ([{"name": "a/b", "kind": "python-code", "weight": 1}], "(got 'a/b')"),
        ([{"name": "..", "kind": "python-code", "weight": 1}], "(got '..')"),
        ([{"name": "a", "kind": "files", "path": "x", "weight": 1, "prompt": "{q}"}], "prompt and answer go together"),
    ],
)
def test_bad_sources_are_named(sources: list[dict[str, Any]], expected: str) -> None:
    raw = raw_tiny()
    raw["data"]["sources"] = sources
    with pytest.raises(BadInput) as caught:
        recipes.parse(raw)
    assert expected in str(caught.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(BadInput) as caught:
        recipes.load("llama-7b")
    assert "llama2-7b" in (caught.value.hint or "")


def test_a_recipe_may_be_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**raw_tiny(), "name": "mine"}), encoding="utf-8")
    assert recipes.load(str(path)).name == "mine"


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n"])
def test_a_file_that_is_no_recipe_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=r"broken\.yaml"):
        recipes.load(str(path))


def test_overrides_reach_sections_and_list_entries() -> None:
    loaded = recipes.load("tiny", ["train.lr=2e-4", "train.stages.1.l1=0.05", "runtime.threads=1"])
    assert (loaded.train.lr, loaded.train.stages[1].l1, loaded.runtime.threads) == (2e-4, 0.05, 1)


@pytest.mark.parametrize("override", ["train.lr", "train.stages.9.l1=1", "seed.x=1", "train.stages.0.ll=1"])
def test_a_bad_override_is_refused(override: str) -> None:
    with pytest.raises(BadInput):
        recipes.load("tiny", [override])


def test_a_calibration_split_below_one_window_is_refused_with_the_other_errors() -> None:
    raw = raw_tiny()
    raw["data"]["calibration_tokens"] = raw["data"]["seq_len"] - 1
    raw["train"]["lr"] = -1
    with pytest.raises(BadInput) as caught:
        recipes.parse(raw)
    assert "2 problems" in str(caught.value)
    assert "data.calibration_tokens=63 is less than one window (data.seq_len=64)" in str(caught.value)

"""``run``, ``plan`` and ``validate`` refuse the same, and the latter two say what nobody could check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli
from prosparse_core import recipe as recipes
from tests.toy_checkpoints import MINICPM_CHAT, SIZES, write_llama2, write_minicpm
from tests.true_datasets import write_mirror

VERBS = (["run", "--inline"], ["plan"], ["validate"])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("PROSPARSE_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama2(tmp_path_factory.mktemp("llama") / "model", ["so ren la so ko."] * 9, num_kv_heads=2)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


def refused(verb: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main([verb[0], *words, *verb[1:]])
    return code, " ".join(capsys.readouterr().err.split())


def test_what_lies_on_the_hub_is_named_and_not_checked(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for verb in ("validate", "plan"):
        assert cli.main([verb, "llama2-7b", "--json", "--set", "data.sources.1.revision=abc"]) == 0
        found = json.loads(capsys.readouterr().out)["not_checked"]
        assert found[0] == "model.source: meta-llama/Llama-2-7b-hf on the hub: its config, weights and tokenizer"
        what = "wikimedia/wikipedia (config 20231101.en; revision abc) on the hub: its files and columns"
        assert f"data.sources.wikipedia: {what}" in found
        assert len(found) == 1 + 4 + 1
        assert found[-1] == "the machine it is to run on: its disk, GPUs and compiler"
    assert cli.main(["validate", "llama2-7b"]) == 0
    assert capsys.readouterr().out.count("not checked: ") == 6


def test_nothing_is_left_unchecked_of_what_is_here(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_checked"] == []


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_is_valid(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", name]) == 0, capsys.readouterr().err
    assert not home.exists()


def without(*names: str) -> Any:
    def act(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return act


def configured(**changes: Any) -> Any:
    def act(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return act


def in_parts(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


def with_template(template: str) -> Any:
    def act(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    return act


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (without("model.safetensors"), "has no weights"),
        (in_parts, "lacks 1 of the 2 files of its weights, first model-00002-of-00002.safetensors"),
        (without("tokenizer.json"), "has no tokenizer"),
        (without("config.json"), "no readable config.json"),
        (configured(model_type="novel"), "no known FFN family"),
        (configured(max_position_embeddings=32), "data.seq_len=64: "),
        (with_template("{{ messages[0]['content'] }}"), "does not write the turns"),
        (with_template("{{ raise_exception('no chats') }}"), "refuses a prompt and its answer"),
    ],
)
def test_a_model_folder_that_cannot_be_trained_is_refused_at_once(
    verb: list[str], act: Any, message: str, home: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model, tmp_path / "copy")
    act(folder)
    words = ["tiny", "--set", f"model.source={folder}", "--set", "model.config={}"]
    code, said = refused(verb, words, capsys)
    assert (code, message in said) == (2, True), said
    assert not home.exists()


def test_whole_folders_of_the_known_kinds_are_valid(
    home: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    minicpm = write_minicpm(tmp_path / "minicpm", ["so ren la so ko."] * 9, num_kv_heads=2)
    assert MINICPM_CHAT in (minicpm / "chat_template.jinja").read_text(encoding="utf-8")
    for folder in (model, minicpm):
        words = ["validate", "tiny", "--json", "--set", f"model.source={folder}", "--set", "model.config={}"]
        assert cli.main(words) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)["not_checked"] == []


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.mirror": "/no/such"}, "data.mirror: /no/such is no folder"),
        ({"data.sources.1.path": "wikimedia/wikipaedia"}, "the mirror has no dataset wikimedia/wikipaedia"),
        ({"data.sources.1.config": "20231101.xx"}, "config '20231101.xx'"),
        ({"data.sources.2.column": "body"}, "has no column 'body'"),
        ({"data.sources.0.data_dir": "cobol"}, "data_dir 'cobol'"),
        ({"data.sources.0.data_dir": "git-commits-cleaned"}, "has no column 'content'"),
        ({"data.sources.3.turns": "role/content"}, "role/content"),
        ({"data.sources.3.weight": 1e-6}, "is less than 1/1024 of all weights"),
        ({"evaluate.benchmarks": "[piqqa]"}, "did you mean piqa"),
        ({"hardware.device": "a100-800g"}, "unknown device"),
        ({"predictor.input": "pre_norm", "model.config.model_type": "x"}, "model.config is only for"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_whatever_a_mirror_and_a_recipe_show_is_refused_alike(
    verb: list[str],
    change: dict[str, Any],
    message: str,
    home: Path,
    model: Path,
    mirror: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"data.mirror": mirror, "model.source": model, "model.shape": json.dumps(shape()), "data.seq_len": 64}
    small = {f"data.sources.{i}.max_tokens": 4096 for i in range(4)}
    sizes = {"train.tokens_per_step": 1024, "runtime.processes": "null", "runtime.nodes": 1}
    words = [word for key, value in (changes | small | sizes | change).items() for word in ("--set", f"{key}={value}")]
    code, said = refused(verb, ["llama2-7b", *words], capsys)
    assert (code, message in said) == (2, True), said
    assert not home.exists()


def shape() -> dict[str, int]:
    names = {"num_layers": "num_hidden_layers", "d_model": "hidden_size", "d_ff": "intermediate_size"}
    names |= {"vocab_size": "vocab_size", "num_heads": "num_attention_heads"}
    return {ours: SIZES[theirs] for ours, theirs in names.items()} | {"num_kv_heads": 2}


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_a_disk_that_is_too_small_is_told_where_the_recipe_runs(
    verb: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1 << 20}))
    code, said = refused(verb, ["smollm2-135m"], capsys)
    assert (code, "GiB free" in said) == (3, True), said
    code, said = refused(["plan"], ["smollm2-135m", "--gpu", "h200"], capsys)
    assert code == 0, said


def test_benchmarks_and_imports_on_the_hub_are_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tasks.evaluation.benchmark_data._revision", lambda dataset: "offline")
    raw = yaml.safe_load(recipes.find("tiny").read_text(encoding="utf-8"))
    raw["evaluate"] = {"benchmarks": ["piqa"]}
    raw["compare"]["imported"] = [{"setting": "relullama", "source": "SparseLLM/ReluLLaMA-7B"}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert cli.main(["validate", "mine.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_checked"] == [
        "evaluate.benchmarks: the data of piqa on the hub",
        "compare.imported.relullama: SparseLLM/ReluLLaMA-7B on the hub: its config, weights and tokenizer",
    ]

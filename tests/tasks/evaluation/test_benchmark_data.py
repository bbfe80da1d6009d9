"""A mirror is read as the hub lays it out, without a network; what is not in it is named, and so is what is wrong."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import pytest

from prosparse_core.errors import BadInput, EnvironmentProblem
from tasks.evaluation import benchmark_data
from tasks.evaluation.benchmark_data import Hub, Mirror, MissingData, open_datasets
from tests.tasks.mini_hub import PIQA, write_jsonl, write_mini_hub, write_parquet


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_hub(tmp_path_factory.mktemp("hub"))


def test_a_mirror_is_read_without_a_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was asked"))
    found = open_datasets(str(hub)).load("baber/piqa", None, ["validation"])
    assert list(found) == ["validation"]
    assert [dict(row) for row in found["validation"]] == PIQA
    copa = open_datasets(str(hub)).load("aps/super_glue", "copa", ["validation"])["validation"]
    assert copa[0]["choice2"] == "It sang."


def test_what_is_missing_is_named_with_its_place(hub: Path) -> None:
    mirror = Mirror(hub)
    for arguments, said in (
        (("no/such", None, ["test"]), f"dataset no/such not found in {hub}"),
        (("aps/super_glue", "rte", ["test"]), f"dataset aps/super_glue has no configuration rte in {hub}"),
        (("aps/super_glue", None, ["test"]), f"dataset aps/super_glue has no configuration default in {hub}"),
        (("baber/piqa", None, ["train"]), f"dataset baber/piqa (default) has no split train in {hub}"),
    ):
        with pytest.raises(MissingData) as caught:
            mirror.load(*arguments)
        assert str(caught.value) == said
    with pytest.raises(BadInput, match="is no folder"):
        open_datasets(str(hub / "not-there"))


def test_the_layout_says_it_where_no_readme_does(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a/b/main/train-00000-of-00002.parquet", PIQA[:1])
    write_parquet(tmp_path / "a/b/main/train-00001-of-00002.parquet", PIQA[1:])
    write_jsonl(tmp_path / "a/b/main/auxiliary_train.jsonl", PIQA[:2])
    write_jsonl(tmp_path / "a/flat/data/test-00000-of-00001-0123abcd.jsonl", PIQA)
    write_jsonl(tmp_path / "a/flat/validation.json", PIQA)
    mirror = Mirror(tmp_path)
    found = mirror.load("a/b", "main", ["train", "auxiliary_train"])
    assert [dict(row) for row in found["train"]] == PIQA, "the only configuration needs no name, shards go together"
    assert len(found["auxiliary_train"]) == 2
    flat = mirror.load("a/flat", None, ["test", "validation"])
    assert flat["test"].to_list() == flat["validation"].to_list() == PIQA


def test_class_labels_of_a_parquet_file_stay(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    path = tmp_path / "a/b/default/test.parquet"
    path.parent.mkdir(parents=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["x"], "label": [1]}, features=features).to_parquet(str(path))
    found = Mirror(tmp_path).load("a/b", None, ["test"])["test"]
    assert found.features["label"].int2str(found[0]["label"]) == "yes"


def test_a_wrong_schema_names_file_and_column(tmp_path: Path) -> None:
    path = tmp_path / "baber/piqa/default/validation.parquet"
    write_parquet(path, [{"goal": "g", "solution": "s", "label": 0}])
    with pytest.raises(BadInput) as caught:
        Mirror(tmp_path).identity("baber/piqa", None, ["validation"], ("goal", "sol1", "sol2", "label"))
    assert str(caught.value) == f"{path} lacks the columns sol1, sol2: it has goal, solution, label"
    path.write_bytes(b"PAR1 is how it begins")
    with pytest.raises(BadInput, match="cannot be read as parquet"):
        Mirror(tmp_path).identity("baber/piqa", None, ["validation"], ("goal",))
    path.unlink()
    write_jsonl(path.with_suffix(".jsonl"), [])
    with pytest.raises(BadInput, match="lacks the column goal"):
        Mirror(tmp_path).identity("baber/piqa", None, ["validation"], ("goal",))
    (tmp_path / "baber/piqa/README.md").write_text("---\nconfigs:\n- name: x\n---\n")
    with pytest.raises(BadInput, match="its configs block is not as on the hub"):
        Mirror(tmp_path).identity("baber/piqa", None, ["validation"], ("goal",))


def test_the_identity_is_the_content_not_the_place(hub: Path, tmp_path: Path) -> None:
    there = write_mini_hub(tmp_path / "elsewhere")
    arguments: tuple[Any, ...] = ("baber/piqa", None, ["validation"], ("goal",))
    first = Mirror(hub).identity(*arguments)
    assert Mirror(there).identity(*arguments) == first
    write_parquet(there / "baber/piqa/default/validation.parquet", PIQA[::-1])
    assert Mirror(there).identity(*arguments) != first


def test_the_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fail(self: Any, dataset: str, **_: Any) -> None:
        asked.append(dataset)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    monkeypatch.setattr(benchmark_data, "_unreachable", [])
    benchmark_data._revision.cache_clear()
    assert [Hub().identity(f"an/{i}", None, [], []) for i in range(3)] == ["offline"] * 3
    assert asked == ["an/0"]
    benchmark_data._revision.cache_clear()

    def refuse(*_: Any) -> None:
        raise ConnectionError("no route\nto it")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(MissingData, match=r"^dataset an/x not found in the hub: no route$"):
        Hub().load("an/x", None, ["test"])


@pytest.mark.parametrize(
    ("error", "lasts"),
    [
        (ConnectionError("reset"), False),
        (TimeoutError("after 10 s"), False),
        (datasets.exceptions.DatasetGenerationError("while reading"), True),
        (datasets.exceptions.DatasetNotFoundError("an/x"), True),
        (ValueError("no configuration 'main'"), True),
        (RuntimeError("Dataset scripts are no longer supported"), True),
    ],
)
def test_a_failure_that_passes_ends_the_step_and_is_no_result(
    monkeypatch: pytest.MonkeyPatch, error: Exception, lasts: bool
) -> None:
    """With the commit known the step would be in the store for good, its n/a with it."""
    monkeypatch.setattr(benchmark_data, "_revision", lambda dataset: "0a1b2c")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(MissingData if lasts else EnvironmentProblem, match="dataset an/x"):
        Hub().load("an/x", None, ["test"])
    broken = datasets.exceptions.DatasetGenerationError("while reading")
    broken.__cause__ = ConnectionError("reset")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=broken))
    with pytest.raises(EnvironmentProblem, match="cannot be had: DatasetGenerationError"):
        Hub().load("an/x", None, ["test"])

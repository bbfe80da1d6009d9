"""Datasets of the hub read from a mirror: their true schemas, what identifies them, what is told of what is missing."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prosparse_core.data.sources import check_source, documents, open_hub_rows, source_identity
from prosparse_core.data.stream import DocumentStream
from prosparse_core.errors import BadInput
from prosparse_core.recipe import Data, Source, load, names
from tests.true_datasets import DATASETS, LANGUAGES, NUM_ROWS, write_mirror, write_parquet, write_zstd


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


def hub(path: str, mirror: Path, **more: Any) -> Source:
    return Source(name="mine", kind="hub", weight=1, path=path, mirror=str(mirror), **more)


SHIPPED = {
    json.dumps(s.model_dump(exclude={"weight", "max_tokens", "mirror"}), sort_keys=True): s
    for name in names()
    for s in load(name).data.sources
    if s.kind == "hub"
}


def test_the_mirror_has_every_dataset_that_a_shipped_recipe_names() -> None:
    assert {s.path for s in SHIPPED.values()} == set(DATASETS)


@pytest.mark.parametrize("source", [pytest.param(s, id=s.name) for s in SHIPPED.values()])
def test_every_source_of_a_shipped_recipe_reads_the_true_schema(source: Source, mirror: Path) -> None:
    source = source.model_copy(update={"mirror": str(mirror)})
    check_source(source)
    found = list(documents(source, seed=1))
    assert len(found) == NUM_ROWS
    assert [d.id for d in found] != [d.id for d in documents(source, seed=2)], "shuffled by the seed"
    plain = [d.id for d in open_hub_rows(source, "1 epoch 0", None)[1]]
    assert sorted(plain) == sorted(d.id for d in found)
    for place in (1, NUM_ROWS // 2, NUM_ROWS - 1):  # within a file, a frame, a folder
        stream = DocumentStream(source, 1, None)
        assert [d.id for d in itertools.islice(stream, place)] == plain[:place]
        after = next(iter(DocumentStream(source, 1, json.loads(json.dumps(stream.position)))))
        assert after.id == plain[place]


def test_a_dataset_whose_folders_differ_cannot_be_read_as_one(mirror: Path) -> None:
    """Why the recipes name folders: StarCoder's commits have no column of its code."""
    with pytest.raises(BadInput, match=r"files of 'bigcode/starcoderdata' differ in their columns") as error:
        list(documents(hub("bigcode/starcoderdata", mirror, column="content"), seed=1))
    assert "data_dir" in (error.value.hint or "")


def test_the_files_of_several_folders_come_in_turns(mirror: Path) -> None:
    source = hub("bigcode/starcoderdata", mirror, column="content", data_dir=["python", "rust", "go"])
    found = [d.text.split("\n")[0].rpartition("/")[2] for d in open_hub_rows(source, 3, None)[1]]
    assert sorted(found) == sorted(["python", "rust", "go"] * (NUM_ROWS // len(LANGUAGES)))
    assert set(found[:6]) == {"python", "rust", "go"}, "two files of each, in turns"
    with pytest.raises(BadInput, match=r"data_dir 'cobol'\) cannot be opened"):
        check_source(source.model_copy(update={"data_dir": ["python", "cobol"]}))


def test_the_identity_of_a_mirror_is_what_would_be_read(mirror: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(mirror / "wikimedia", tmp_path / "wikimedia").parent
    for stream in (False, True):
        before, other = (
            source_identity(hub("wikimedia/wikipedia", m, config="20231101.en", stream=stream)) for m in (mirror, copy)
        )
        assert before == other, "wherever it lies"
        assert list(before["bytes" if stream else "files"]) == [
            f"20231101.en/train-0000{i}-of-00002.parquet" for i in (0, 1)
        ]
        assert before != source_identity(hub("wikimedia/wikipedia", mirror, config="20231101.de", stream=stream))
        json.dumps(before)
    unread = copy / "wikimedia" / "wikipedia" / "20231101.de" / "train-00000-of-00002.parquet"
    unread.unlink()
    source = hub("wikimedia/wikipedia", copy, config="20231101.en")
    assert source_identity(source) == source_identity(source.model_copy(update={"mirror": str(mirror)}))
    write_parquet(copy / "wikimedia/wikipedia/20231101.en/train-00001-of-00002.parquet", [{"text": "other"}])
    assert source_identity(source) != source_identity(source.model_copy(update={"mirror": str(mirror)}))


def test_a_revision_is_the_hub_s_and_a_mirror_is_read_as_it_is(mirror: Path) -> None:
    source = hub("wikimedia/wikipedia", mirror, config="20231101.en", revision="no-such-revision")
    check_source(source)
    assert "revision" not in source_identity(source)


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("openbmb/Other", {}, r"the mirror has no dataset openbmb/Other: there is no folder .*openbmb/Other$"),
        ("wikimedia/wikipedia", {"config": "20231101.xx"}, r"config '20231101\.xx'.*cannot be opened"),
        ("monology/pile-uncopyrighted", {"split": "dev"}, r"split 'dev'\) cannot be opened"),
        ("monology/pile-uncopyrighted", {"column": "body"}, "has no column 'body'"),
    ],
)
def test_what_a_mirror_lacks_is_told(mirror: Path, path: str, more: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_source(hub(path, mirror, **more))


def test_a_mirror_that_is_no_folder_is_named_by_its_key(tmp_path: Path) -> None:
    for act in (check_source, source_identity):
        with pytest.raises(BadInput, match=r"data\.mirror: .*nowhere is no folder"):
            act(hub("some/where", tmp_path / "nowhere"))


def test_every_frame_of_a_zst_file_is_read(tmp_path: Path) -> None:
    write_zstd(tmp_path / "some" / "where" / "train.jsonl.zst", [{"text": str(i)} for i in range(30)], frames=3)
    assert len(list(documents(hub("some/where", tmp_path), seed=0))) == 30


def test_the_mirror_of_the_data_is_that_of_its_hub_sources(tmp_path: Path) -> None:
    raw = {
        "seq_len": 8,
        "mirror": "a",
        "sources": [
            {"name": "one", "kind": "hub", "path": "x/y", "weight": 1},
            {"name": "two", "kind": "hub", "path": "x/y", "weight": 1, "mirror": "b"},
            {"name": "three", "kind": "python-code", "weight": 1},
        ],
    }
    data = Data.model_validate(raw)
    assert [s.mirror for s in data.sources] == ["a", "b", None]
    assert Data.model_validate(data.model_dump(mode="json")) == data
    with pytest.raises(ValueError, match="mirror is of sources of kind 'hub'"):
        Source.model_validate({"name": "x", "kind": "python-code", "weight": 1, "mirror": "a"})


def test_a_mirror_may_move_between_runs_that_stream_from_it(mirror: Path, tmp_path: Path) -> None:
    from prosparse_core.data import stream

    place = tmp_path / "store" / "mixture" / "abc"
    place.mkdir(parents=True)
    source = hub("wikimedia/wikipedia", mirror, config="20231101.en", stream=True)
    plain = source.model_dump(mode="json", exclude={"mirror"})
    (place / stream.DESCRIPTION).write_text(json.dumps({"mine": {"source": plain}, "other": {"source": {}}}))
    for folder in ("one", "two"):
        stream.tell_mirrors(place, [source.model_copy(update={"mirror": str(tmp_path / folder)})])
        found = stream._descriptions(place, stream.index_of(place))
        assert found["mine"]["source"]["mirror"] == str(tmp_path / folder)
        assert "mirror" not in found["other"]["source"]

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse_core.data.documents import HELD_OUT_PCT, Document, shuffled, split_of, stable_hash
from prosparse_core.data.sources import SHUFFLE_BUFFER, check_source, documents, source_identity
from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.recipe import Source


def files(path: Path | str, **more: Any) -> Source:
    return Source(name="mine", kind="files", weight=1, path=str(path), **more)


def read(source: Source, seed: int = 0) -> list[Document]:
    return list(documents(source, seed=seed))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# the split


def test_the_split_is_a_property_of_the_name_for_ever() -> None:
    assert stable_hash("a", 1) == 0xCD85A665880B4301
    golden = {"argparse.py": "calibration", "json/decoder.py": "train", "turtle.py": "evaluation", "ast.py": "train"}
    assert {name: split_of(name) for name in golden} == golden


def test_about_the_stated_share_is_held_out() -> None:
    splits = [split_of(f"file {i}") for i in range(20_000)]
    for split in ("calibration", "evaluation"):
        assert splits.count(split) / 20_000 == pytest.approx(HELD_OUT_PCT / 100, abs=0.008)


@given(st.lists(st.text(), unique=True), st.integers())
def test_shuffling_depends_on_the_seed_and_on_nothing_else(names: list[str], seed: int) -> None:
    order = shuffled(names, seed)
    assert sorted(order) == sorted(names)
    assert order == shuffled(reversed(names), seed)
    assert [n for n in order if n in names[1:]] == shuffled(names[1:], seed)


def test_equal_up_to_white_space_is_the_same_text() -> None:
    assert Document("1", "a", "x  =\n\t1").key == Document("2", "b", " x = 1 ").key
    assert Document("1", "a", "x = 1").key != Document("1", "a", "x = 2").key


def test_a_short_answer_is_the_same_only_to_the_same_prompt() -> None:
    assert Document("1", "a", "yes", "is it?").key != Document("2", "b", "yes", "was it?").key
    assert Document("1", "a", "yes", "is it?").key == Document("2", "b", "yes", "is  it?").key
    long = "because " * 30
    assert Document("1", "a", long, "is it?").key == Document("2", "b", long, "was it?").key


# files


def test_a_folder_of_texts_gives_a_document_a_file(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.md", "sub/c.rst", "d.py", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name} é", encoding="utf-8")
    found = read(files(tmp_path))
    assert {d.file: d.text for d in found} == {
        name: f"text of {name} é" for name in ("a.txt", "sub/b.md", "sub/c.rst", "d.py")
    }
    assert {d.id for d in found} == {d.file for d in found}
    orders = {tuple(d.file for d in read(files(tmp_path), seed)) for seed in range(20)}
    assert len(orders) > 5


def test_a_file_and_a_glob(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert [d.file for d in read(files(tmp_path / "a.txt"))] == ["a.txt"]
    assert {d.file for d in read(files(tmp_path / "sub" / "*.txt"))} == {"b.txt"}
    assert {d.file for d in read(files(tmp_path / "**" / "*.txt"))} == {"a.txt", "sub/b.txt", "sub/deep/c.txt"}


def test_names_do_not_depend_on_where_the_data_lies(tmp_path: Path) -> None:
    found = []
    for root in ("one", "two"):
        folder = tmp_path / root
        folder.mkdir()
        (folder / "a.txt").write_text("same", encoding="utf-8")
        found.append((read(files(folder)), source_identity(files(folder))))
    assert found[0] == found[1]


ROWS = [{"question": f"what is {i} + {i}?", "answer": f"it is {2 * i}", "level": i} for i in range(9)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_by_column_and_by_template(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    by_column = read(files(path, column="answer"))
    assert sorted(d.text for d in by_column) == sorted(str(row["answer"]) for row in ROWS)
    assert all(d.prompt is None for d in by_column)
    by_template = read(files(path, template="Q: {question}\nA: {answer} ({level}) {{}}"))
    assert "Q: what is 3 + 3?\nA: it is 6 (3) {}" in [d.text for d in by_template]
    instructions = read(files(path, prompt=" {question} ", answer="{answer}\n"))
    assert {(d.prompt, d.text) for d in instructions} == {(row["question"], row["answer"]) for row in ROWS}


def test_the_same_row_is_the_same_unit_wherever_it_stands(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    write_rows(tmp_path / "b.jsonl", [{"text": "three"}, {"text": " one\n"}])
    found = read(files(tmp_path))
    assert len(found) == 4
    assert len({d.file for d in found}) == 3
    assert len({d.id for d in found}) == 4


def test_two_answers_to_one_question_are_one_unit(tmp_path: Path) -> None:
    rows = [{"q": "why?", "a": "because"}, {"q": "why?", "a": "therefore"}, {"q": "how?", "a": "so"}]
    found = read(files(write_rows(tmp_path / "a.jsonl", rows), prompt="{q}", answer="{a}"))
    assert len({d.file for d in found}) == 2


def test_rows_are_shuffled_by_the_seed_also_beyond_the_buffer(tmp_path: Path) -> None:
    num = SHUFFLE_BUFFER + 500
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(num)])
    first, again, other = read(files(path), 1), read(files(path), 1), read(files(path), 2)
    assert first == again
    assert first != other
    assert sorted(d.text for d in first) == sorted(f"row {i}" for i in range(num))


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}, {"text": " \n", "n": 3}, {"text": "b", "n": None}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert sorted(d.text for d in read(files(path))) == ["a", "b"]
    assert [d.text for d in read(files(path, template="{text}{n}"))] == ["a1"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(
    "more", [{"column": "body"}, {"template": "{question} {body}"}, {"prompt": "{question}", "answer": "{body}"}]
)
def test_a_missing_column_is_told_with_those_there_are(tmp_path: Path, suffix: str, more: dict[str, str]) -> None:
    source = files(write_rows(tmp_path / f"rows{suffix}", ROWS), **more)
    with pytest.raises(BadInput, match="no column 'body'") as error:
        read(source)
    assert error.value.hint is not None
    assert "answer, level, question" in error.value.hint
    with pytest.raises(BadInput, match="no column 'body'"):
        check_source(source)


@pytest.mark.parametrize("template", ["{}", "{0}", "no field", "{a.b}", "{a[0]}", "{", "{a", "}"])
def test_a_template_must_name_columns(tmp_path: Path, template: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"a": "x"}])
    with pytest.raises(BadInput, match="template="):
        read(files(path, template=template))
    with pytest.raises(BadInput, match="template="):
        check_source(Source(name="h", kind="hub", weight=1, path="some/where", template=template))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a\.jsonl:3: expected an object, this is list"),
        ("a.jsonl", b'{"text": ["x"]}\n', "column 'text' holds list, not text"),
        ("a.json", b'{"text": "x"}', "not a list of objects"),
        ("a.json", b'["x"]', "expected an object, this is str"),
        ("a.csv", b"text\n\xff\n", "not a UTF-8 CSV"),
        ("a.parquet", b"no parquet at all", "not a parquet file"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read(files(tmp_path / name))


@pytest.mark.parametrize("path", ["missing.jsonl", "missing/", "*.jsonl", "empty"])
def test_nothing_to_read(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "picture.png").write_bytes(b"png")
    for act in (read, source_identity, check_source):
        with pytest.raises(BadInput, match="nothing to read at path="):
            act(files(tmp_path / path))


def test_an_unknown_suffix_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"x")
    for path in ("a.docx", "*.docx"):
        with pytest.raises(BadInput, match=r"cannot read .*a\.docx"):
            read(files(tmp_path / path))


def test_a_source_without_any_text_fails_its_check(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="has no text"):
        check_source(files(tmp_path / "a.jsonl"))


# the hub


def test_a_dataset_is_streamed_by_the_datasets_library(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.parquet", ROWS)
    hub = Source(name="h", kind="hub", weight=1, path=str(tmp_path / "data"), template="{question} {answer}")
    found = read(hub)
    assert sorted(d.text for d in found) == sorted(f"{row['question']} {row['answer']}" for row in ROWS)
    assert found == read(hub)
    assert len({d.id for d in found}) == len(ROWS)
    with pytest.raises(BadInput, match="no column 'text'") as error:
        read(hub.model_copy(update={"template": None}))
    assert error.value.hint is not None
    assert "answer, level, question" in error.value.hint
    with pytest.raises(BadInput, match=r"split 'test'.*Bad split"):
        read(hub.model_copy(update={"split": "test"}))
    with pytest.raises(BadInput, match=r"config 'other'.*not found"):
        read(hub.model_copy(update={"config": "other"}))
    with pytest.raises(BadInput, match="cannot be opened"):
        read(hub.model_copy(update={"path": str(tmp_path / "elsewhere")}))


def test_without_a_network_the_hub_is_an_environment_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: object, **options: object) -> None:
        assert options["streaming"] is True
        raise ConnectionError("Couldn't reach 'some/where' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(EnvironmentProblem, match="cannot be reached"):
        read(Source(name="h", kind="hub", weight=1, path="some/where"))


def test_only_the_hub_uses_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_rows(tmp_path / "a.parquet", ROWS)
    assert read(files(tmp_path, column="answer"))
    hub = Source(name="h", kind="hub", weight=1, path="some/where", revision="abc")
    assert source_identity(hub) == {"path": "some/where", "config": None, "split": "train", "revision": "abc"}
    check_source(hub)


# identity


def change(path: Path) -> None:
    path.write_text("other", encoding="utf-8")


def add(path: Path) -> None:
    (path.parent / "c.txt").write_text("one", encoding="utf-8")


def rename(path: Path) -> None:
    path.rename(path.parent / "z.txt")


@pytest.mark.parametrize("act", [change, add, rename])
def test_the_identity_of_files_is_their_names_and_contents(tmp_path: Path, act: Callable[[Path], None]) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    before = source_identity(files(tmp_path))
    assert before == source_identity(files(tmp_path, column="whatever"))
    act(tmp_path / "a.txt")
    assert source_identity(files(tmp_path)) != before
    json.dumps(before)


def test_identities_are_had_without_heavy_imports_and_do_not_vary(tmp_path: Path) -> None:
    code = (
        "import sys, json\n"
        "from prosparse_core.recipe import Source\n"
        "from prosparse_core.data.sources import source_identity\n"
        "kinds = ['python-code', 'package-docs', 'code-instructions']\n"
        "print(json.dumps([source_identity(Source(name=k, kind=k, weight=1)) for k in kinds]))\n"
        "heavy = {'torch', 'datasets', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).resolve().parents[3]
    found = {
        subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(found) == 1
    python_code, docs, instructions = json.loads(found.pop())
    assert python_code == instructions
    assert python_code["python"] == ".".join(map(str, sys.version_info[:3]))
    assert any(line.startswith("numpy==") for line in docs["distributions"])

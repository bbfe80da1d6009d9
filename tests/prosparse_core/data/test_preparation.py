"""Preparing a mixture in several processes and after interruptions: the same bytes as alone and straight through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_corpora import SEED, SEQ_LEN, data_of, digests, files, notes
from tiny_tokenizers import CHAT, tiny_tokenizer

from prosparse_core.data import encoding, train_windows
from prosparse_core.data.documents import Document, Turn, conversation
from prosparse_core.data.encoding import Batch, Encoders, batched
from prosparse_core.data.held_out import HeldOut
from prosparse_core.data.packing import Encoder, RowWriter
from prosparse_core.data.processes import MOST_PROCESSES, num_processes
from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.mixing import prepare
from prosparse_core.progress import Silent
from prosparse_core.recipe import Data

SHARD = 16 * SEQ_LEN


def small_data(base: Path) -> Data:
    """Texts, rows and conversations, each of several shards."""
    if not base.exists():
        notes(base / "notes", 400)
        rows = [{"text": f"row {i} " * (i % 30 + 5), "q": f"What is {i}?", "a": f"It is {i}. " * 9} for i in range(900)]
        for row in rows:
            row["talk"] = [row["q"], row["a"], "And more?", f"{row['a']} Yes."]
        (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data_of(
        files("notes", base / "notes", 0.5),
        files("rows", base / "rows.jsonl", 0.2, max_tokens=20_000),
        files("talks", base / "rows.jsonl", 0.3, messages="talk", turns="alternating"),
    )


def build(base: Path, name: str, **more: Any) -> dict[str, str]:
    folder = base / name
    options = {"seed": SEED, "shard_tokens": SHARD, **more}
    prepare(small_data(base / "data"), tiny_tokenizer(chat=CHAT), folder, **options)
    return digests(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preparation")


@pytest.fixture(scope="module")
def straight(base: Path) -> dict[str, str]:
    found = build(base, "straight")
    manifest = json.loads((base / "straight" / "manifest.json").read_text())
    assert all(entry["train"]["windows"] > 4 * SHARD // SEQ_LEN for entry in manifest["corpora"])
    return found


class Stop(Exception):
    pass


class StopAfter(Silent):
    def __init__(self, updates: int) -> None:
        self._left = updates

    def update(self, done: float, total: float, **fields: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise Stop


def test_two_processes_write_the_bytes_of_one(base: Path, straight: dict[str, str]) -> None:
    assert build(base, "two", processes=2) == straight


@pytest.mark.parametrize(("processes", "stops"), [(1, (1, 900, 900, 1500)), (2, (2600,))])
def test_an_interrupted_preparation_goes_on_at_the_next_shard(
    base: Path, straight: dict[str, str], processes: int, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"interrupted-{processes}"
    tokenized: list[int] = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, found: tokenized.append(len(found)) or encode(self, found))
    for updates in stops:
        with pytest.raises(Stop):
            build(base, name, progress=StopAfter(updates), processes=processes)
        assert not (base / name / "manifest.json").exists()
    before = [json.loads(p.read_text()) for p in sorted((base / name / ".progress").iterdir())]
    assert any(entry.get("windows") for entry in before)
    tokenized.clear()
    assert build(base, name, processes=processes) == straight
    assert not (base / name / ".progress").exists()
    if processes == 1:
        manifest = json.loads((base / name / "manifest.json").read_text())
        assert sum(tokenized) < 0.8 * sum(entry["train"]["documents"] for entry in manifest["corpora"])


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {parent!r}]
from test_preparation import build
build(Path({base!r}), {name!r}, processes={processes})
"""


def start(base: Path, name: str, processes: int) -> subprocess.Popen[bytes]:
    here = Path(__file__).resolve().parent
    code = PROGRAM.format(tests=str(here), parent=str(here.parent), base=str(base), name=name, processes=processes)
    return subprocess.Popen([sys.executable, "-c", code], cwd=here.parents[2])


def wait_for(what: Any, limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_preparation_goes_on_and_leaves_no_process_behind(
    base: Path, straight: dict[str, str], processes: int
) -> None:
    name = f"killed-{processes}"
    record = base / name / ".progress" / "notes.json"
    process = start(base, name, processes)
    wait_for(lambda: record.is_file() or process.poll() is not None)
    children = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(children) == (processes if processes > 1 else 0)
    wait_for(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
    assert not (base / name / "manifest.json").exists()
    assert build(base, name, processes=3 - processes) == straight


# the processes

NO_SYSTEM = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHAT


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Encoders]]:
    """This process, and two others."""
    held_out = HeldOut()
    held_out.add_file("argparse.py")  # may be drawn for calibration
    held_out.keys.add(Document("", "", "held out").key)
    tokenizer = tiny_tokenizer(chat=NO_SYSTEM)
    with Encoders(tokenizer, held_out) as one, Encoders(tokenizer, held_out, 2) as two:
        yield {1: one, 2: two}


def documents(num: int) -> Iterator[Document]:
    return (Document(str(i), f"f{i}", f"text {i} " * (i % 7 + 1)) for i in range(num))


def test_batches_come_in_their_order_and_few_are_read_ahead(pools: dict[int, Encoders]) -> None:
    read = 0

    def counted() -> Iterator[Document]:
        nonlocal read
        for document in documents(64 * 20):
            read += 1
            yield document

    ids: list[str] = []
    for batch in pools[2].run(batched(counted(), lambda count: count)):
        ids += [e.document.id for e in batch.encoded]
        assert batch.after == len(ids)
        assert read - len(ids) <= encoding.IN_FLIGHT * 2 * 64
    assert ids == [str(i) for i in range(64 * 20)]


def test_several_runs_take_turns_and_one_may_end_early(pools: dict[int, Encoders]) -> None:
    abandoned, run = (pools[2].run(batched(documents(64 * 8), lambda count: count)) for _ in range(2))
    next(abandoned)
    alone = pools[1].run(batched(documents(64 * 8), lambda count: count))
    for one, other in zip(run, alone, strict=True):
        assert one.after == other.after
        for a, b in zip(one.encoded, other.encoded, strict=True):
            assert a.document == b.document
            assert (a.tokens.tolist(), a.mask.tolist()) == (b.tokens.tolist(), b.mask.tolist())
        abandoned.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_held_out_is_known_to_every_process(pools: dict[int, Encoders], processes: int) -> None:
    batch = [Document("a", "argparse.py", "x"), Document("b", "b", " held\nout"), Document("c", "c", "y")]
    (found,) = pools[processes].run([Batch(batch, None)])
    assert [e.document.id for e in found.encoded] == ["c"]
    assert (found.num_held_out, found.num_duplicates) == (1, 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_process_cannot_encode_is_said_as_if_it_were_this_one(
    pools: dict[int, Encoders], processes: int
) -> None:
    odd = conversation("talks:7", "f", [Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")])
    found = pools[processes].run(Batch([document], i) for i, document in enumerate([*documents(3), odd, *documents(3)]))
    assert [next(found).after for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BadInput, match=r"refuses the conversation talks:7 .*no system") as error:
        next(found)
    assert error.value.hint is not None


@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_that_is_broken_matters_only_when_it_is_reached(pools: dict[int, Encoders], processes: int) -> None:
    def broken() -> Iterator[Document]:
        yield from documents(64 * 4)
        raise BadInput("row 257 is broken")

    found = pools[processes].run(batched(broken(), lambda count: count))
    assert [next(found).after for _ in range(4)] == [64, 128, 192, 256]
    with pytest.raises(BadInput, match="row 257"):
        next(found)


def test_a_process_that_is_killed_is_noticed() -> None:
    with Encoders(tiny_tokenizer(), HeldOut(), 2) as encoders:
        found = encoders.run(batched(documents(64 * 50), lambda count: count))
        next(found)
        encoders._workers[0]._process.kill()
        with pytest.raises(
            ProSparseError, match="process 0 of those that prepare the data ended with code -9"
        ) as error:
            list(found)
    assert "goes on from the last shard" in str(error.value.hint)


def test_small_recipes_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert num_processes(None, 400_000) == 1
    assert num_processes(None, 9_000_000) == 2
    assert num_processes(None, 10**12) == MOST_PROCESSES
    assert num_processes(40, 1) == 40
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert num_processes(None, 10**12) == 2


def test_rows_that_are_not_there_are_not_gone_on_from(tmp_path: Path) -> None:
    import numpy as np

    def write(num_rows: int, values: list[int]) -> list[int]:
        with RowWriter(tmp_path / "x.npy", 2, np.int32, num_rows) as writer:
            for value in values:
                writer.add(np.array([value, value], dtype=np.int32))
            writer.sync()
        return np.load(tmp_path / "x.npy")[:, 0].tolist()

    assert write(0, [1, 2, 3]) == [1, 2, 3]
    assert write(2, [4, 5]) == [1, 2, 4, 5]
    assert write(1, []) == [1]
    with pytest.raises(ProSparseError, match="fewer than 2 rows"):
        write(2, [])
    assert train_windows.SHARD_TOKENS > 1_000_000

"""The store: atomic, refuses what is damaged, one process per fingerprint, and locks that die with their holder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prosparse_core import store as stores
from prosparse_core.errors import EnvironmentProblem, ProSparseError
from prosparse_core.store import RECORD, Artifact, Store, canonical_json, fingerprint

PAYLOAD = {"step": "mixture", "version": 1, "config": {"a": 1.5}, "inputs": {}, "seed": 1}


def commit(store: Store, payload: dict = PAYLOAD, files: dict[str, str] | None = None) -> Artifact:
    work = store.work_folder("mixture", fingerprint(payload))
    work.mkdir(parents=True)
    for name, text in (files or {"data/a.txt": "hello", "log.jsonl": "{}\n"}).items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text, encoding="utf-8")
    return store.commit(
        work, step="mixture", label="mixture", payload=payload, inputs={}, provenance={"wall_s": 1}, meta={"n": 3}
    )


def test_fingerprints_do_not_depend_on_the_order_of_keys_or_the_process() -> None:
    assert fingerprint({"b": 1, "a": [1, 2]}) == fingerprint({"a": [1, 2], "b": 1})
    code = "from prosparse_core.store import fingerprint; print(fingerprint({'a': 0.1, 'b': 'é'}))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert other.stdout.strip() == fingerprint({"b": "é", "a": 0.1})


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": object()}, {"a": {1, 2}}])
def test_what_cannot_be_written_exactly_cannot_be_hashed(value: dict) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical_json(value)


def test_commit_and_find(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = commit(store)
    found = store.find("mixture", "mixture", fingerprint(PAYLOAD))
    assert found == made
    assert found is not None
    assert found.meta() == {"n": 3}
    assert not store.work_folder("mixture", fingerprint(PAYLOAD)).exists()
    record = json.loads((made.path / RECORD).read_text(encoding="utf-8"))
    assert record["payload"] == PAYLOAD
    assert [(f["path"], f["volatile"]) for f in record["files"]] == [("data/a.txt", False), ("log.jsonl", True)]
    assert stores.verify(made.path) == []


def test_the_digest_is_of_content_not_of_timings(tmp_path: Path) -> None:
    a = commit(Store(tmp_path / "a"), files={"w": "1", "log.jsonl": "fast"})
    b = commit(Store(tmp_path / "b"), files={"w": "1", "log.jsonl": "slow"})
    c = commit(Store(tmp_path / "c"), files={"w": "2", "log.jsonl": "fast"})
    assert a.digest == b.digest != c.digest


def test_a_damaged_artifact_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = commit(store)
    (made.path / "data" / "a.txt").write_text("hell", encoding="utf-8")
    with pytest.raises(ProSparseError, match=r"data/a\.txt is missing or not 5 bytes") as caught:
        store.find("mixture", "mixture", fingerprint(PAYLOAD))
    assert str(made.path) in (caught.value.hint or "")
    (made.path / "data" / "a.txt").write_text("HELLO", encoding="utf-8")
    assert stores.verify(made.path) == ["data/a.txt"]
    (made.path / RECORD).write_text("{", encoding="utf-8")
    with pytest.raises(ProSparseError, match="not readable"):
        store.find("mixture", "mixture", fingerprint(PAYLOAD))


def test_work_without_a_record_is_not_an_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.folder("mixture", fingerprint(PAYLOAD)).mkdir(parents=True)
    assert store.find("mixture", "mixture", fingerprint(PAYLOAD)) is None


def test_remove_forgets_artifact_and_work(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = commit(store)
    store.work_folder("mixture", fingerprint(PAYLOAD)).mkdir()
    store.remove("mixture", fingerprint(PAYLOAD))
    assert not made.path.exists()
    assert not store.work_folder("mixture", fingerprint(PAYLOAD)).exists()


HOLD = """
import sys, time
from pathlib import Path
from prosparse_core.store import Store
with Store(Path(sys.argv[1])).lock("f" * 64):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_waits_and_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "held"
    waits: list[float] = []

    def on_wait() -> None:
        waits.append(time.monotonic())
        os.kill(holder.pid, signal.SIGKILL)

    with Store(tmp_path).lock("f" * 64, on_wait=on_wait, poll_s=0.05):
        assert len(waits) == 1
    holder.wait()
    holder.stdout.close()


def test_too_little_room_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"a run needs .* GiB, but the disk of"):
        stores.require_space(tmp_path, 1 << 60, "a run")
    stores.require_space(tmp_path, 1, "a run")


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(EnvironmentProblem, match="cannot make the folder"):
        stores.make_folder(tmp_path / "file" / "below")

"""The private file and the published snapshot: many processes, kill -9, users who write to it, damage, full disks."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest
from ledger_fixture import ask, assert_whole, private, spawn, start_run

from prosparse_core.errors import EnvironmentProblem
from prosparse_core.ledger import Ledger, files

# Says "step N" once step N of its run is acknowledged.
WRITER = """
import sys
from pathlib import Path
from prosparse_core.ledger import Ledger
ledger, run, count = Ledger(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
ledger.start_run(run_id=run, flow="f", recipe="r", recipe_yaml=run, overrides=[], model="m", provenance={})
for i in range(count):
    ledger.start_step(run, step="stage", stage=i, label=run, fingerprint=f"{run}-{i}")
    print("step", i, flush=True)
"""
# Reads until told to stop; a count that falls or a failed query ends it with an error.
READER = """
import sys, time
from pathlib import Path
from prosparse_core.ledger import Ledger
home, last, reads = Path(sys.argv[1]), 0, 0
while not (home / "stop").exists() or not reads:
    found = Ledger(home).query("SELECT count(*) FROM steps").rows[0][0]
    assert found >= last, (found, last)
    last, reads = found, reads + 1
print(reads, last)
"""


# Many processes.


def test_four_writers_and_two_readers(tmp_path: Path) -> None:
    start_run(Ledger(tmp_path), "before")
    count = 4
    readers = [spawn(READER, tmp_path) for _ in range(2)]
    writers = [spawn(WRITER, tmp_path, f"w{i}", count) for i in range(4)]
    for process in writers:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert len(out.splitlines()) == count
    (tmp_path / "stop").touch()
    for process in readers:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert int(out.split()[0]) >= 1
    rows = (
        Ledger(tmp_path)
        .query("SELECT run_id, count(*), count(DISTINCT step_id) FROM steps GROUP BY ALL ORDER BY ALL")
        .rows
    )
    assert rows == [(f"w{i}", count, count) for i in range(4)]


def test_a_snapshot_replaced_while_it_is_opened_is_read_again(ledger: Ledger, monkeypatch: Any) -> None:
    start_run(ledger, "before")
    real, failures = ledger._ask, iter([True, True, False])

    def ask_while_a_writer_publishes(sql: str) -> Any:
        if next(failures):
            start_run(ledger, "meanwhile" + str(ledger.path.stat().st_mtime_ns))
            raise duckdb.IOException("Could not read enough bytes")
        return real(sql)

    monkeypatch.setattr(ledger, "_ask", ask_while_a_writer_publishes)
    assert ledger.query("SELECT count(*) FROM runs WHERE run_id LIKE 'meanwhile%'").rows == [(2,)]


def test_a_snapshot_that_stays_unreadable_is_said_at_once(ledger: Ledger, monkeypatch: Any) -> None:
    start_run(ledger, "before")
    asked = []

    def fail(sql: str) -> Any:
        asked.append(sql)
        raise duckdb.IOException("Could not read enough bytes")

    monkeypatch.setattr(ledger, "_ask", fail)
    with pytest.raises(EnvironmentProblem, match="Could not read enough bytes"):
        ledger.query("SELECT 1")
    assert len(asked) == 1


def test_kill_9_in_the_middle_of_writing_loses_no_acknowledged_row(tmp_path: Path, warnings: Any) -> None:
    ledger, chance, acknowledged = Ledger(tmp_path), random.Random(7), set()
    start_run(ledger, "before")
    for attempt in range(4):
        process = spawn(WRITER, tmp_path, f"k{attempt}", 10_000)
        assert process.stdout is not None
        with process:
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().splitlines()
        acknowledged |= {f"k{attempt}-{line.split()[1]}" for line in ["step 0", *lines] if len(line.split()) == 2}
        found = {row[0] for row in ask(ledger, "SELECT fingerprint FROM steps")}
        assert acknowledged <= found
    start_run(ledger, "after")
    found = {row[0] for row in ask(ledger, "SELECT fingerprint FROM steps")}
    assert acknowledged <= found
    assert len(found) == ask(ledger, "SELECT count(*) FROM steps")[0][0]
    assert not warnings.records, "a kill is no reason to suspect anybody"
    assert ask(ledger, "SELECT max_by(run_id, started_at) FROM runs") == [("after",)]


@pytest.mark.parametrize("where", ["write_json", "os.replace", "_copy"])
def test_a_kill_at_every_point_of_publishing(ledger: Ledger, where: str, warnings: Any, monkeypatch: Any) -> None:
    class Killed(BaseException):
        pass

    def die(*arguments: object, **more: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        target = files.os if where.startswith("os.") else files
        patch.setattr(target, where.removeprefix("os."), die)
        with pytest.raises(Killed):
            start_run(ledger, "killed")
    assert_whole(Ledger(ledger.home))
    start_run(ledger, "after")
    assert_whole(ledger, "killed", "after")
    assert not warnings.records
    assert sorted(p.name for p in ledger.home.iterdir()) == [".ledger", "ledger.duckdb", "store"]


def test_together_is_all_or_nothing(ledger: Ledger) -> None:
    def half() -> None:
        with ledger.together():
            start_run(ledger, "half")
            assert_whole(ledger)  # not published yet
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert_whole(ledger)
    with ledger.together():
        start_run(ledger, "one")
        ledger.end_run("one", "done")
    assert_whole(ledger, "one")


def test_a_writer_that_never_lets_go(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCK_TIMEOUT_S", 0.05)
    with ledger._files.write(), pytest.raises(EnvironmentProblem, match="locked") as caught:
        Ledger(ledger.home).end_run("first", "done")
    assert "process" in str(caught.value.hint)


# People and the published file.


def test_opening_it_in_any_way_to_read_is_harmless(ledger: Ledger, warnings: Any) -> None:
    with duckdb.connect(str(ledger.path)) as con:  # without -readonly, as people do
        assert con.execute("SELECT setting FROM leaderboard").fetchall() == [("prosparse",)]
    with duckdb.connect(str(ledger.path), read_only=True) as con:
        start_run(ledger, "meanwhile")
        assert con.execute("SELECT count(*) FROM runs").fetchall() == [(1,)], "the reader keeps the snapshot it opened"
    assert_whole(ledger, "meanwhile")
    assert not warnings.records


def test_what_a_user_wrote_is_kept_beside_and_ours_comes_back(ledger: Ledger, warnings: Any) -> None:
    with duckdb.connect(str(ledger.path)) as con:
        con.execute("CREATE TABLE mine AS SELECT 42 AS answer")
        con.execute("DELETE FROM run_starts")
    assert_whole(ledger)  # asking is enough to publish ours again
    assert "-readonly" in warnings.text
    [kept] = ledger.home.glob("ledger.changed-*.duckdb")
    assert kept.name in warnings.text
    with duckdb.connect(str(kept), read_only=True) as con:
        assert con.execute("FROM mine").fetchall() == [(42,)]
    warnings.clear()
    start_run(ledger, "next")
    assert_whole(ledger, "next")
    assert not warnings.records, "said once"


def leave_a_write_ahead_log(ledger: Ledger) -> Path:
    """A user's session that wrote to the snapshot and died."""
    code = "import duckdb, os, sys; c = duckdb.connect(sys.argv[1]); c.execute('CREATE TABLE t (a INT)'); os._exit(9)"
    process = spawn(code, ledger.path)
    process.communicate(timeout=60)
    assert process.returncode == 9
    wal = ledger.path.with_name("ledger.duckdb.wal")
    assert wal.exists()
    return wal


def test_a_users_write_ahead_log_does_not_spoil_the_next_snapshot(ledger: Ledger, warnings: Any) -> None:
    wal = leave_a_write_ahead_log(ledger)
    start_run(ledger, "next")
    assert not wal.exists()
    assert_whole(ledger, "next")
    assert "-readonly" in warnings.text


def test_a_stale_write_ahead_log_of_another_snapshot(ledger: Ledger, warnings: Any) -> None:
    """What a session that was open while we published leaves behind: it fits the old file, not the new one."""
    wal = leave_a_write_ahead_log(ledger)
    stale = wal.read_bytes()
    start_run(ledger, "next")
    wal.write_bytes(stale)
    assert_whole(ledger, "next")
    assert not wal.exists()


def test_somebody_holds_it_open_for_writing(ledger: Ledger) -> None:
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(ledger.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(duckdb.IOException):
            duckdb.connect(str(ledger.path), read_only=True)
        assert_whole(ledger)
        start_run(ledger, "next")
        assert_whole(ledger, "next")
        process.kill()


def test_this_process_holds_it_open_for_writing(ledger: Ledger) -> None:
    with duckdb.connect(str(ledger.path)):
        assert_whole(ledger)


def test_somebody_holds_the_private_file(ledger: Ledger) -> None:
    with duckdb.connect(str(private(ledger)), read_only=True):
        with pytest.raises(EnvironmentProblem, match="open in another program") as caught:
            start_run(ledger, "next")
        assert str(ledger.path) in str(caught.value.hint)
        assert_whole(ledger)
    start_run(ledger, "next")
    assert_whole(ledger, "next")


def test_a_deleted_snapshot_is_published_again(ledger: Ledger) -> None:
    ledger.path.unlink()
    assert_whole(ledger)


def test_a_deleted_private_folder_is_made_again_from_the_snapshot(ledger: Ledger) -> None:
    shutil.rmtree(ledger.home / ".ledger")
    assert_whole(ledger)
    start_run(ledger, "next")
    assert_whole(ledger, "next")


def test_a_copied_home_is_not_taken_for_a_changed_one(ledger: Ledger, tmp_path: Path, warnings: Any) -> None:
    shutil.copytree(ledger.home, tmp_path / "copy")
    copy = Ledger(tmp_path / "copy")
    assert_whole(copy)
    start_run(copy, "next")
    assert_whole(copy, "next")
    assert not warnings.records

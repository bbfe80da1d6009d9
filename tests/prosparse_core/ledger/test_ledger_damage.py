"""Damaged files, other versions, full disks: what was recorded comes back, and what cannot be done is said."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest
from ledger_fixture import (
    SCORE,
    VARIANT,
    ask,
    assert_whole,
    make_artifact,
    private,
    record_step,
    spawn,
    start_run,
)

from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.ledger import Ledger, files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10_000])


def scribble(path: Path) -> None:
    """Other bytes in the middle of every block: what the header says is still true."""
    data = bytearray(path.read_bytes())
    for start in range(3 * 4096 + 100_000, len(data), 262_144):
        data[start : start + 64] = b"\xa5" * 64
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_text(path: Path) -> None:
    path.write_text("not a database " * 1000)


def other_database(path: Path) -> None:
    path.unlink()
    with duckdb.connect(str(path)) as con:
        con.execute("CREATE TABLE t (a INT)")


DAMAGES = [truncate, scribble, empty, other_text, other_database]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_private_file_is_made_again_aloud(ledger: Ledger, damage: Any, warnings: Any) -> None:
    damage(private(ledger))
    start_run(ledger, "next")
    assert_whole(ledger, "next")
    assert "damaged" in warnings.text
    assert "store" in warnings.text
    assert list((ledger.home / ".ledger").glob("private.damaged-*")), "the damaged file is kept"


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_both_files_damaged_the_store_gives_the_facts_back(ledger: Ledger, damage: Any, warnings: Any) -> None:
    damage(private(ledger))
    damage(ledger.path)
    start_run(ledger, "next")
    assert ask(ledger, "SELECT run_id FROM runs") == [("next",)]
    assert ask(ledger, "SELECT value, run_id, setting FROM results") == [(0.5, None, "prosparse")]
    assert "not readable" in warnings.text or "newer" in warnings.text or "lost" in warnings.text
    assert list(ledger.home.glob("ledger.*-*.duckdb")), "what was there is kept"


@pytest.mark.parametrize("damage", [truncate, empty, other_text])
def test_a_damaged_snapshot_is_published_again(ledger: Ledger, damage: Any, warnings: Any) -> None:
    damage(ledger.path)
    assert_whole(ledger)
    assert warnings.records


# Versions.


def change(path: Path, sql: str) -> None:
    with duckdb.connect(str(path)) as con:
        con.execute(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE schema_version SET version = version + 1",
        "UPDATE schema_version SET signature = 'x'; ALTER TABLE speed ADD COLUMN watts DOUBLE",
        "UPDATE schema_version SET signature = 'x'; CREATE TABLE energy (artifact VARCHAR)",
    ],
)
def test_a_ledger_of_a_newer_version_is_left_alone(ledger: Ledger, sql: str) -> None:
    change(private(ledger), sql)
    before = private(ledger).read_bytes()
    with pytest.raises(EnvironmentProblem, match="newer version") as caught:
        start_run(ledger, "next")
    assert caught.value.exit_code == 3
    assert "update" in str(caught.value.hint)
    assert private(ledger).read_bytes() == before


def test_a_ledger_of_an_older_version_gets_the_new_columns_and_views(ledger: Ledger, warnings: Any) -> None:
    sql = (
        "UPDATE schema_version SET signature = 'x'; DROP VIEW leaderboard; DELETE FROM published; "
        "ALTER TABLE evaluations DROP COLUMN headline; CREATE OR REPLACE VIEW loss_curve AS SELECT 1"
    )
    change(private(ledger), sql)
    start_run(ledger, "next")
    assert_whole(ledger, "next")
    assert ask(ledger, "SELECT setting, accuracy FROM leaderboard") == [("prosparse", 0.5)]
    assert ask(ledger, "SELECT count(headline), (SELECT count(*) FROM published) > 400 FROM evaluations") == [(0, True)]
    assert not warnings.records


def test_the_file_is_of_the_format_every_duckdb_1_can_read(ledger: Ledger) -> None:
    for path in (ledger.path, private(ledger)):
        with duckdb.connect(str(path), read_only=True) as con:
            [(tags,)] = con.execute("SELECT tags FROM duckdb_databases() WHERE path IS NOT NULL").fetchall()
        assert tags["storage_version"] == "v1.0.0+"
    # Tried with duckdb 1.0.0, 1.1.3 and 1.4.2: they stumble over a stored index, and over if().
    assert ask(ledger, "FROM duckdb_indexes()") == []
    assert ask(ledger, "FROM duckdb_constraints() WHERE constraint_type IN ('PRIMARY KEY', 'UNIQUE')") == []
    views = ask(
        ledger, "SELECT view_name FROM duckdb_views() WHERE NOT internal AND regexp_matches(sql, '(?i)\\bif\\(')"
    )
    assert views == []


# Disks.

CRAMPED = """
import resource, sys
from pathlib import Path
from prosparse_core.errors import EnvironmentProblem
from prosparse_core.ledger import Ledger
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    {call}
except EnvironmentProblem as problem:
    print(problem.exit_code, problem, problem.hint)
"""
LARGE_RUN = """text = "".join(__import__("random").Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=3_000_000))
    Ledger(Path(sys.argv[1])).start_run(
        run_id="large", flow="f", recipe="r", recipe_yaml=text, overrides=[], model="m", provenance={})"""


@pytest.mark.parametrize("spare", [-100_000, 262_144, 2_000_000], ids=["commit", "checkpoint", "large checkpoint"])
def test_a_full_disk_while_writing(ledger: Ledger, spare: int) -> None:
    limit = private(ledger).stat().st_size + spare
    out, err = spawn(CRAMPED.format(call=LARGE_RUN), ledger.home, limit).communicate(timeout=60)
    assert out.startswith("3 the disk of "), (out, err)
    assert "free some space" in out
    assert_whole(ledger)
    start_run(ledger, "next")
    found = [row[0] for row in ask(ledger, "SELECT run_id FROM runs ORDER BY started_at")]
    assert (found[0], found[-1]) == ("first", "next")
    if "large" in found:  # refused after it had been committed: then it is there in full
        assert ask(ledger, "SELECT length(recipe_yaml) FROM runs WHERE run_id = 'large'") == [(3_000_000,)]
    assert sorted(p.name for p in (ledger.home / ".ledger").iterdir()) == ["lock", "private.duckdb", "published.json"]


def test_a_full_disk_while_recording_facts(ledger: Ledger) -> None:
    log = [{"stage": 0, "step": i, "lm_loss": 1.0} for i in range(5_000)]
    made = make_artifact(ledger.home, "stage", "s", log=log)
    call = f"Ledger(Path(sys.argv[1])).record_artifact(Path({str(made.path)!r}))"
    out, err = spawn(CRAMPED.format(call=call), ledger.home, 100_000).communicate(timeout=60)
    assert out.startswith("3 the disk of "), (out, err)
    assert ask(ledger, "SELECT count(*) FROM train_metrics") == [(0,)]
    ledger.record_artifact(made.path)
    assert ask(ledger, "SELECT count(*) FROM train_metrics") == [(5_000,)]


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file, not a folder")
    with pytest.raises(EnvironmentProblem) as caught:
        start_run(Ledger(tmp_path / "home"), "r")
    assert "PROSPARSE_HOME" in str(caught.value.hint)


def test_a_home_of_which_only_the_snapshot_is_there_to_read(ledger: Ledger, tmp_path: Path) -> None:
    """A ledger somebody sent: a folder with nothing but ledger.duckdb."""
    (tmp_path / "sent").mkdir()
    shutil.copy(ledger.path, tmp_path / "sent")
    sent = Ledger(tmp_path / "sent")
    assert_whole(sent)
    assert [p.name for p in (tmp_path / "sent").iterdir()] == ["ledger.duckdb"], "asking writes nothing"


def test_a_snapshot_nothing_can_read_is_an_environment_problem(tmp_path: Path) -> None:
    (tmp_path / "ledger.duckdb").write_text("nothing")
    with pytest.raises(EnvironmentProblem, match="cannot be opened"):
        Ledger(tmp_path).query("FROM runs")


def test_names_with_quotes_and_spaces(tmp_path: Path) -> None:
    home = tmp_path / "it's a; home"
    ledger = Ledger(home)
    start_run(ledger, "it's", recipe="a'b", overrides=["x='y'"])
    made = make_artifact(home, "evaluate", "e'", [{**VARIANT, "variant": "v'"}, {**SCORE, "variant": "v'"}])
    record_step(ledger, "it's", made)
    assert ask(ledger, "SELECT run_id, recipe, variant FROM results") == [("it's", "a'b", "v'")]
    with contextlib.suppress(BadInput):
        ledger.query("FROM runs WHERE run_id = 'it's'")


def test_the_stamp_names_what_was_published(ledger: Ledger) -> None:
    stamp = json.loads((ledger.home / ".ledger" / "published.json").read_text())
    assert stamp["public"][0]["sha256"] == files._sha256(ledger.path) == files._sha256(private(ledger))
    assert len(stamp["public"]) == 2, "and its predecessor, in case of a kill before the rename"

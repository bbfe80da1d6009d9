"""Two processes against one: equal losses step by step, resumed by any number of processes, and clear refusals."""

from __future__ import annotations

import json
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from trained_in_ranks import MODES, Notes, interrupted, lines, train
from two_ranks import run_two

from prosparse_core import monitor
from prosparse_core.distributed.ranks import ALONE, joined
from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.recipe import parse

pytestmark = pytest.mark.slow
NUMBERS = ("lm_loss", "l1", "sparsity", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found; they start once for all tests. Checkpoints of one process wait for them."""
    for mode in ("ddp", "fsdp"):
        interrupted(folder / f"{mode}-by-1", mode)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_two("trained_in_ranks.py", str(port), str(folder))
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def assert_equal_steps(log: list[dict[str, Any]], other: list[dict[str, Any]], rel: float = 1e-5) -> None:
    assert [e["step"] for e in log] == [e["step"] for e in other]
    for a, b in zip(log, other, strict=True):
        for name in NUMBERS:
            assert a[name] == pytest.approx(b[name], rel=rel), (name, a["step"])


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one_step_by_step(mode: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone, _ = train(tmp_path, mode)
    assert len(alone) == 7
    # bf16 rounds products to 8 bits, of which sums in another order leave a little
    assert_equal_steps(ranks[0][mode], alone, rel=3e-3 if "bf16" in mode else 1e-5)


def test_one_process_that_passes_the_same_halves_is_equal_to_the_bit(
    ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Doubling and halving are exact: what rounding differs by is how large a batch a product sums over."""
    alone, _ = train(tmp_path, "ddp-halves")
    for a, b in zip(ranks[0]["ddp-halves"], alone, strict=True):
        assert {n: a[n] for n in ("l1", "sparsity", "grad_norm")} == {n: b[n] for n in ("l1", "sparsity", "grad_norm")}


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_number_of_processes_may_change_on_resume(
    mode: str, ranks: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    straight, _ = train(tmp_path, mode)
    assert_equal_steps(ranks[0][f"{mode}-by-1"], straight)  # saved by one process, resumed by two
    notes = Notes()
    resumed, _ = train(folder / f"{mode}-for-1", mode, ALONE, notes)  # saved by two, resumed by one
    assert_equal_steps(resumed, straight)
    assert "2 processes" in notes.notes[0]
    assert "bitwise" in notes.notes[0]
    assert notes.notes[1] == "resuming after step 4"


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_resume_to_the_bit(mode: str, ranks: list[dict[str, Any]]) -> None:
    for a, b in zip(ranks[0][mode], ranks[0][f"{mode}-by-2"], strict=True):
        assert {n: a[n] for n in NUMBERS} == {n: b[n] for n in NUMBERS}


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_looks_at_held_out_text_leave_no_trace_and_see_the_same(
    mode: str, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    for a, b in zip(ranks[0][mode], ranks[0][f"{mode}-watched"], strict=True):
        assert {n: a[n] for n in NUMBERS} == {n: b[n] for n in NUMBERS}
    train(tmp_path, mode, monitor_every=2)
    alone, seen = lines(tmp_path / monitor.LOG), ranks[0][f"{mode}-held-out"]
    assert len(seen) == 8
    for x, y in zip(alone, seen, strict=True):
        assert {k: x[k] for k in ("step", "corpus", "num_tokens")} == {
            k: y[k] for k in ("step", "corpus", "num_tokens")
        }
        assert y["lm_loss"] == pytest.approx(x["lm_loss"], rel=1e-5)
        assert y["sparsity"] == pytest.approx(x["sparsity"], abs=1e-4)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_rollback_of_two_processes_is_that_of_one(mode: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone, _ = train(tmp_path, f"{mode}-spoilt")
    assert [e["step"] for e in ranks[0][f"{mode}-spoilt"] if e["skipped"]] == [5, 6]
    assert [e["step"] for e in ranks[0][f"{mode}-events"]] == [6]
    taken = [[e for e in log if not e["skipped"]] for log in (ranks[0][f"{mode}-spoilt"], alone)]
    assert_equal_steps(*taken)


def test_ranks_that_see_something_else_are_named(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["digests"].startswith("BadInput: ")
        assert "rank 1 has another data than rank 0: digest 1, not digest 0" in found["digests"]
        assert "model" not in found["digests"]


def test_a_full_disk_of_one_rank_leaves_the_checkpoint_before(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["full"]["said"].startswith("EnvironmentProblem: the disk of ")
        assert "the checkpoint before" in found["full"]["said"]
        assert found["full"]["left"] == ["step-00000003"]
        assert found["full"]["resumes"] == [3, {}]


def test_a_checkpoint_of_another_model_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "[53, 32] here, [61, 32] there" in found["other"]["narrow"]
        assert "belongs to another model (delete that folder" in found["other"]["named"]


def test_the_number_of_processes_is_never_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ProSparseError, match="1 training processes were started, the recipe asks for 2"):
        joined(2, "cpu").__enter__()


@pytest.mark.parametrize(
    ("processes", "nodes", "near"), [(3, 1, "2 or 4"), (5, 1, "4 or 8"), (2, 3, "4 or 8"), (9, 1, "8")]
)
def test_processes_that_do_not_divide_a_step_are_refused(processes: int, nodes: int, near: str) -> None:
    raw = {
        "name": "a",
        "description": "b",
        "model": {"id": "m", "source": "random:llama"},
        "data": {"seq_len": 16, "sources": [{"name": "code", "kind": "python-code", "weight": 1}]},
        "train": {"tokens_per_step": 128, "lr": 1e-3, "stages": [{"until_step": 1, "l1": 0}]},
        "runtime": {"processes": processes, "nodes": nodes},
    }
    with pytest.raises(BadInput, match=rf"divide the 8 sequences .* the nearest that do: {near}$"):
        parse(raw)

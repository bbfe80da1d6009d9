"""Code that is not trusted: it ends, leaves nothing behind, and passes only when it ran to its end."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from tasks.evaluation.benchmark_sandbox import Limits, isolation, run_program

QUICK = Limits(cpu_s=1, wall_s=2.0, memory_bytes=256 << 20, file_bytes=1 << 16)


@pytest.mark.parametrize(
    ("program", "passed", "reason"),
    [
        ("x = 1", True, "passed"),
        ("assert 1 == 2, 'no'", False, "AssertionError: no"),
        ("import sys\nsys.exit(0)", False, "SystemExit: 0"),
        ("raise KeyboardInterrupt", False, "KeyboardInterrupt: "),
        ("import os\nos._exit(0)", False, "left with exit code 0"),
        ("import os\nos._exit(7)", False, "left with exit code 7"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", False, "killed by SIGSEGV"),
        ("def f(:", False, "SyntaxError: "),
        ("print('x' * 10_000_000)", True, "passed"),
        ("if __name__ == '__main__':\n    raise ValueError('ran')", False, "ValueError: ran"),
        ("class Odd(Exception):\n    def __str__(self): raise OSError\nraise Odd", False, "Odd"),
    ],
)
def test_how_a_program_ends(program: str, passed: bool, reason: str) -> None:
    found = run_program(program)
    assert found.passed is passed
    assert found.reason.startswith(reason)


def test_endless_loops_end() -> None:
    began = time.monotonic()
    busy = run_program("while True: pass", QUICK)
    assert (busy.passed, busy.reason) == (False, "CPU time used up")
    asleep = run_program("import time\ntime.sleep(60)", Limits(wall_s=0.5))
    assert (asleep.passed, asleep.reason) == (False, "timed out")
    stubborn = run_program(
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass",
        QUICK,
    )
    assert not stubborn.passed
    assert time.monotonic() - began < 15


def test_memory_is_limited() -> None:
    found = run_program("x = bytearray(1 << 30)", QUICK)
    assert (found.passed, found.reason) == (False, "MemoryError: ")


def test_files_are_limited_in_size_and_gone_afterwards() -> None:
    before = set(Path(os.path.realpath("/tmp")).glob("prosparse-code-*"))
    assert run_program("open('small', 'w').write('x')", QUICK).passed
    big = run_program("open('big', 'wb').write(b'x' * (1 << 20))", QUICK)
    assert (big.passed, big.reason.partition(":")[0]) == (False, "OSError")
    assert set(Path(os.path.realpath("/tmp")).glob("prosparse-code-*")) == before


def test_it_sees_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "1")
    program = (
        "import os, sys\nassert 'A_SECRET' not in os.environ\nassert not os.listdir('.')\n"
        "assert sys.stdin.read() == ''\nassert not hasattr(sys.modules['__main__'], 'answer')"
    )
    assert run_program(program).reason == "passed"


def test_processes_it_starts_die_with_it(tmp_path: Path) -> None:
    mark = f"prosparse-test-{os.getpid()}"
    program = (
        "import os, sys, time\n"
        "def loose():\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}])\n"
        "    os._exit(0)\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        loose()\n"
        "time.sleep(0.3)\n"
    )
    found = run_program(program)
    # Where the user may not have one process more, there is none to be killed.
    assert found.passed or found.reason.startswith("BlockingIOError")
    running = [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]
    assert not running


def test_a_fork_bomb_is_cleared() -> None:
    found = run_program("import os\nfor _ in range(6):\n    os.fork()\nimport time\ntime.sleep(60)", Limits(wall_s=1.0))
    assert not found.passed
    children = psutil.Process().children(recursive=True)
    assert not [c for c in children if "benchmark_guard" in " ".join(c.cmdline())]


def test_what_the_machine_permits_holds(tmp_path: Path) -> None:
    how = isolation()
    assert how in ("no network, files read-only", "no network", "limits only")
    target = tmp_path / "written"
    run_program(f"open({str(target)!r}, 'w').write('x')")
    assert target.exists() is (how != "no network, files read-only")
    if how.startswith("no network"):
        program = "import socket\ns = socket.socket()\ns.settimeout(1)\ns.connect(('127.0.0.1', 9))"
        assert run_program(program).reason.startswith("OSError: [Errno 101]")

"""Stands between us and a program that is not trusted; run as ``python -I benchmark_guard.py < REQUEST``.

It knows the standard library only. It takes away network and disk where it may, forks the program with limits set,
waits, kills whatever the program left behind, and writes one JSON object: passed, reason, isolation.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, SYS_MOUNT_SETATTR = -100, 0x8000, 1, 442
DONE = b"done"
CLEAR_S = 3.0


def main() -> None:
    request = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    isolation = isolate(libc, request["folder"])
    os.chdir(request["folder"])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        run(request, writer)
    os.close(writer)
    status = wait(child, time.monotonic() + request["wall_s"])
    clear()
    said = read(reader)
    passed = status == 0 and said.endswith(DONE)
    json.dump({"passed": passed, "reason": reason(status, said), "isolation": isolation}, sys.stdout)


def isolate(libc: Any, folder: str) -> str:
    """Namespaces of our own, as far as the kernel lets us have them."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS) == 0:
        with contextlib.suppress(OSError):
            write("/proc/self/setgroups", "deny")
            write("/proc/self/uid_map", f"{user} {user} 1")
            write("/proc/self/gid_map", f"{group} {group} 1")
        return "no network, files read-only" if read_only(libc, folder) else "no network"
    return "no network" if libc.unshare(CLONE_NEWNET) == 0 else "limits only"


def read_only(libc: Any, folder: str) -> bool:
    """Every mount read-only for us, but a small disk in memory over ``folder``."""
    if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        return False
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    if libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes)) != 0:
        return False
    return bool(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=16m") == 0)


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as handle:
        handle.write(text)


def run(request: dict[str, Any], writer: int) -> None:
    """In the child: limits, silence, then the program; never returns."""
    for limit, value in (
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_FSIZE, request["file_bytes"]),
        (resource.RLIMIT_NOFILE, request["open_files"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_s"], request["cpu_s"] + 1))  # SIGXCPU, then SIGKILL
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    said = DONE
    try:
        code = compile(request["program"], "<program>", "exec")
        exec(code, {"__name__": "__main__"})
    except BaseException as error:
        said = describe(error)
    with contextlib.suppress(BaseException):
        os.write(writer, said)
    os._exit(0 if said == DONE else 1)


def describe(error: BaseException) -> bytes:
    text = ""
    with contextlib.suppress(BaseException):  # the program's own exceptions may fail at being printed
        text = str(error)
    return f"{type(error).__name__}: {text}"[:200].encode("utf-8", "replace")


def wait(child: int, until: float) -> int | None:
    """The child's wait status; None when its time was up."""
    pause = 0.001
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return None


def clear() -> None:
    """Kill whoever is left: orphans come to us, wherever they fled to."""
    until = time.monotonic() + CLEAR_S
    while time.monotonic() < until:
        for process in children():
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def children() -> list[int]:
    """Of this process; from /proc/*/stat, for not every kernel lists them in one file."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as handle:
            if int(handle.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


def read(reader: int) -> bytes:
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 4096)
    except BlockingIOError:
        return b""


def reason(status: int | None, said: bytes) -> str:
    if status is None:
        return "timed out"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "CPU time used up" if number == signal.SIGXCPU else f"killed by {signal.Signals(number).name}"
    if said.endswith(DONE) and status == 0:
        return "passed"
    return said.decode("utf-8", "replace") or f"left with exit code {os.WEXITSTATUS(status)}"


if __name__ == "__main__":
    main()

"""Compiles the native kernels with the system's compiler on first use, and keeps the result.

The cache folder is ``$PROSPARSE_KERNEL_CACHE``, else ``$XDG_CACHE_HOME/prosparse/kernels``, else
``~/.cache/prosparse/kernels``. A library's name is the sha256 of its sources, the compiler and its version, the flags
and the CPU, so a change of any of them builds anew and a shared home folder serves different machines. Processes that
come at the same time compile once (flock), and a library appears whole or not at all (rename). No network.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_HEADERS = ("decode", "cpu_predict", "cpu_batch", "cpu_token", "cpu_screen", "cpu_plan", "cpu_simd")
SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu.cpp", *(f"{header}.h" for header in _HEADERS)))
COMPILERS = ("c++", "g++", "clang++")
COMMON_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fPIC", "-shared")
# From the best to the most portable: a compiler without OpenMP or without -march=native still gives right kernels.
FLAG_SETS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
COMPILE_TIMEOUT_S = 300


@dataclass(frozen=True)
class Build:
    """A compiled library and what it was compiled with."""

    path: Path
    compiler: str
    flags: tuple[str, ...]


def cache_folder() -> Path:
    """Where compiled kernels are kept; see the module's docstring. Not created here."""
    if chosen := os.environ.get("PROSPARSE_KERNEL_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "prosparse" / "kernels"


def find_compiler() -> list[str]:
    """The compiler's command: ``$CXX`` if set, else ``c++``, ``g++`` or ``clang++``. RuntimeError if there is none."""
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if command and shutil.which(command[0]):
            return command
        raise RuntimeError(f"native kernels: $CXX is {chosen!r}, which is not on the PATH; unset it or set it right")
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise RuntimeError(
        f"native kernels: no C++ compiler on the PATH ({', '.join(COMPILERS)}); install one (Debian, Ubuntu: "
        "apt-get install g++) or point $CXX at it"
    )


def build() -> Build:
    """The compiled kernels for this machine, from the cache or made now. RuntimeError says why there are none."""
    compiler = find_compiler()
    version = _compiler_version(compiler)
    candidates = [(flags, cache_folder() / f"cpu-{_key(compiler, version, flags)}.so") for flags in FLAG_SETS]
    for flags, path in candidates:  # a lesser set was only ever built after the better ones had failed
        if path.exists():
            return Build(path, version, flags)
    attempts = []
    for flags, path in candidates:
        error = _compile_once(compiler, flags, path)
        if error is None:
            return Build(path, version, flags)
        attempts.append(f"with {' '.join(flags) or 'no extra flags'}: {error}")
        logger.warning("native kernels: %s failed %s", compiler[0], attempts[-1])
    raise RuntimeError(f"native kernels: {' '.join(compiler)} cannot compile {SOURCES[0]}:\n" + "\n".join(attempts))


def _compiler_version(compiler: Sequence[str]) -> str:
    try:
        answer = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"native kernels: {' '.join(compiler)} --version failed: {error}") from error
    return answer.stdout.splitlines()[0] if answer.stdout else compiler[0]


def cpu_identity() -> str:
    """What -march=native depends on: the architecture, and on Linux the CPU's model and instruction sets."""
    lines = [platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        wanted = ("model name", "flags", "Features", "CPU part")
        first_cpu = info.read_text(errors="replace").split("\n\n")[0]
        lines += [line for line in first_cpu.splitlines() if line.startswith(wanted)]
    else:
        lines.append(platform.processor())
    return "\n".join(lines)


def _key(compiler: Sequence[str], version: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    parts = [source.read_bytes() for source in SOURCES]
    parts += [text.encode() for text in (*compiler, version, *COMMON_FLAGS, *flags, cpu_identity())]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _compile_once(compiler: Sequence[str], flags: Sequence[str], path: Path) -> str | None:
    """Puts the library at ``path``, unless another process just did. Returns the compiler's complaint, if any."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return None
            handle, temporary = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
            os.close(handle)
            try:
                return _compile(compiler, flags, Path(temporary), path)
            finally:
                Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"native kernels: cannot write {path.parent} ({error.strerror}); set PROSPARSE_KERNEL_CACHE to a folder "
            "that can be written"
        ) from error


def _compile(compiler: Sequence[str], flags: Sequence[str], temporary: Path, path: Path) -> str | None:
    command = [*compiler, *COMMON_FLAGS, *flags, str(SOURCES[0]), "-o", str(temporary)]
    logger.info("native kernels: compiling once for this machine: %s", shlex.join(command))
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer after {COMPILE_TIMEOUT_S} s"
    if answer.returncode != 0:
        return (answer.stderr or answer.stdout).strip()[-2000:]
    os.chmod(temporary, 0o755)
    os.replace(temporary, path)
    return None

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import build

REPOSITORY = Path(build.__file__).parents[1]
RUN_ONE = """
import torch
from kernels import cpu
ones = torch.ones(2, 3)
print(cpu.NativeFFN(ones, ones, ones).ffn(torch.ones(3)).tolist())
"""


def run(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


@pytest.fixture
def counting_compiler(tmp_path: Path) -> tuple[Path, Path]:
    """A compiler that leaves a line in a log each time it really compiles; in a hurry, so without optimisation."""
    try:
        real = build.find_compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    log, script = tmp_path / "compiled.log", tmp_path / "counting-c++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo compiled >> {log}\nexec {" ".join(real)} "$@" -O0\n')
    script.chmod(0o755)
    return script, log


def test_two_processes_compile_once_and_a_third_not_at_all(tmp_path, counting_compiler):
    script, log = counting_compiler
    environment = {"CXX": str(script), "PROSPARSE_KERNEL_CACHE": str(tmp_path / "cache")}
    racing = [run(RUN_ONE, **environment) for _ in range(2)]
    assert [finish(process) for process in racing] == ["[18.0, 18.0, 18.0]"] * 2
    assert log.read_text().splitlines() == ["compiled"]
    assert finish(run(RUN_ONE, **environment)) == "[18.0, 18.0, 18.0]"
    assert log.read_text().splitlines() == ["compiled"]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_damaged_library_is_made_again(tmp_path, counting_compiler):
    script, log = counting_compiler
    cache = tmp_path / "cache"
    environment = {"CXX": str(script), "PROSPARSE_KERNEL_CACHE": str(cache)}
    finish(run(RUN_ONE, **environment))
    (library,) = cache.glob("*.so")
    library.write_bytes(b"not a library")
    assert finish(run(RUN_ONE, **environment)) == "[18.0, 18.0, 18.0]"
    assert len(log.read_text().splitlines()) == 2


def test_a_compiler_without_openmp_or_native_tuning_still_gives_right_kernels(tmp_path, counting_compiler):
    script, _ = counting_compiler
    picky = tmp_path / "picky-c++"
    picky.write_text(
        '#!/bin/sh\nfor a in "$@"; do case $a in -fopenmp|-m*) echo "unknown option $a" >&2; exit 1;; esac; done\n'
        f'exec {script} "$@"\n'
    )
    picky.chmod(0o755)
    code = RUN_ONE + (
        "print(cpu.available().why, cpu.load().build.flags)\n"
        "try: cpu.NativeFFN(ones, ones, ones, 2)\n"
        "except ValueError as error: print(error)\n"
    )
    out = finish(run(code, CXX=str(picky), PROSPARSE_KERNEL_CACHE=str(tmp_path / "cache"))).splitlines()
    assert out[0] == "[18.0, 18.0, 18.0]"
    assert "one thread" in out[1]
    assert out[1].endswith(" ()")
    assert "without OpenMP" in out[2]


NO_KERNELS = """
import logging
import torch
from kernels import cpu
from kernels.sparse_ffn import SparseFFN
logging.basicConfig(format="%(levelname)s %(message)s")
found = cpu.available()
print(bool(found), found.why)
try: cpu.load()
except RuntimeError as error: print("load:", error)
w = torch.ones(2, 3)
modules = [SparseFFN(w, w, w.T, 0.0) for _ in range(3)]
print(modules[0].implementation, "|", modules[0].why)
print(modules[0](torch.ones(3)).tolist())
try: SparseFFN(w, w, w.T, 0.0, "native")
except RuntimeError as error: print("native:", error)
"""


def test_without_a_compiler_everything_says_so_and_the_module_falls_back_aloud(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {"PATH": str(empty), "PROSPARSE_KERNEL_CACHE": str(tmp_path / "cache"), "CXX": ""}
    process = run(NO_KERNELS, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("False native kernels: no C++ compiler on the PATH (c++, g++, clang++)")
    assert lines[1].startswith("load: native kernels: no C++ compiler")
    assert lines[2].startswith("dense | native cannot be used: native kernels: no C++ compiler")
    assert lines[3] == "[18.0, 18.0, 18.0]"
    assert lines[4].startswith("native: implementation 'native' cannot be used")
    assert err.count("WARNING sparse FFN falls back to dense torch") == 1, err


def test_a_compiler_named_but_missing_and_one_that_fails_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PROSPARSE_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(RuntimeError, match=r"\$CXX is 'no-such-compiler -O1'"):
        build.build()
    broken = tmp_path / "broken-c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo broken 1.0\necho "cc1plus: no space" >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(RuntimeError, match=r"cannot compile .*cpu.cpp(.|\n)*cc1plus: no space"):
        build.build()
    assert not list((tmp_path / "cache").glob("*.so"))
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_cache_folder_that_cannot_be_written_names_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PROSPARSE_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", "/bin/echo")
    with pytest.raises(RuntimeError, match="set PROSPARSE_KERNEL_CACHE"):
        build.build()


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("PROSPARSE_KERNEL_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert build.cache_folder() == Path("/a")
    monkeypatch.delenv("PROSPARSE_KERNEL_CACHE")
    assert build.cache_folder() == Path("/b/prosparse/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert build.cache_folder() == Path("/home/someone/.cache/prosparse/kernels")


def test_the_name_depends_on_sources_compiler_flags_and_cpu(monkeypatch, tmp_path):
    base = build._key(["c++"], "c++ 12", ("-fopenmp",))
    assert base == build._key(["c++"], "c++ 12", ("-fopenmp",))
    others = {
        build._key(["g++"], "c++ 12", ("-fopenmp",)),
        build._key(["c++"], "c++ 13", ("-fopenmp",)),
        build._key(["c++"], "c++ 12", ()),
    }
    monkeypatch.setattr(build, "cpu_identity", lambda: "another CPU")
    others.add(build._key(["c++"], "c++ 12", ("-fopenmp",)))
    changed = tmp_path / "cpu.cpp"
    changed.write_text("// changed")
    monkeypatch.setattr(build, "SOURCES", (changed,))
    others.add(build._key(["c++"], "c++ 12", ("-fopenmp",)))
    assert len(others | {base}) == 6


def test_this_cpu_is_identified():
    assert "flags" in build.cpu_identity() or "Features" in build.cpu_identity() or sys.platform != "linux"

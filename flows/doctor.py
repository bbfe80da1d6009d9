"""``prosparse doctor``: does this machine have what a run needs?"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prosparse_core.errors import ProSparseError
from prosparse_core.store import dropped, verify

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finding:
    """One check: fine, a warning (something is slower or missing), or broken (a run would fail)."""

    check: str
    state: Literal["fine", "warning", "broken"]
    found: str
    way_out: str = ""


def examine(home: Path, *, verify_store: bool = False) -> list[Finding]:
    """Every check, in the order a run would meet them; ``verify_store`` also reads and hashes every artifact."""
    checks: list[Callable[[], Iterator[Finding]]] = [_versions, _server, _kernels_name, _compiler, lambda: _disk(home)]
    if verify_store:
        checks.append(lambda: _store(home))
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    constraints = ROOT / "constraints.txt"
    if not constraints.is_file():
        return
    differing = []
    for line in constraints.read_text(encoding="utf-8").splitlines():
        name, eq, version = line.partition("==")
        if not eq or line.startswith("#"):
            continue
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.partition("+")[0] != version.strip():
            differing.append(f"{name} {installed} (known to work: {version.strip()})")
    if differing:
        yield Finding("versions", "warning", "; ".join(differing[:5]), "pip install -c constraints.txt -e .")
    else:
        yield Finding("versions", "fine", "as in constraints.txt")


def _server() -> Iterator[Finding]:
    """Some FastAPI releases kill the Prefect server at import, and ``pip check`` stays clean."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import prefect.server.api.server"], capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        yield Finding("prefect server", "broken", last, "pip install -c constraints.txt prefect fastapi")
    else:
        yield Finding("prefect server", "fine", f"prefect {importlib.metadata.version('prefect')} imports")


def _kernels_name() -> Iterator[Finding]:
    """transformers probes a package named ``kernels``; ours is only a folder, the one on the index would collide."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("package name kernels", "fine", "no other package of that name")
        return
    yield Finding(
        "package name kernels", "broken", f"the package kernels {version} is installed", "pip uninstall kernels"
    )


def _compiler() -> Iterator[Finding]:
    found = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if found:
        yield Finding("C++ compiler", "fine", str(shutil.which(found)))
    else:
        yield Finding("C++ compiler", "warning", "none: kernels run in plain torch", "apt-get install g++")


def _disk(home: Path) -> Iterator[Finding]:
    at = next(p for p in [home, *home.parents] if p.exists())
    free = shutil.disk_usage(at).free / 2**30
    state: Literal["fine", "warning"] = "fine" if free > 10 else "warning"
    yield Finding("disk", state, f"{free:.0f} GiB free at {at}", "" if free > 10 else "smollm2-135m needs about 9 GiB")


def _store(home: Path) -> Iterator[Finding]:
    """Bits rot, and people edit: an artifact whose files no longer have their recorded hashes is worth nothing."""
    damaged, sound, freed = [], 0, 0
    for record in sorted((home / "store").glob("*/*/artifact.json")):
        try:
            changed = verify(record.parent)
            freed += sum(file["bytes"] for file in dropped(record.parent).values())
        except ProSparseError as error:
            changed = [str(error)]
        sound += not changed
        damaged += [f"{record.parent.relative_to(home)}: {', '.join(changed)}"] if changed else []
    if damaged:
        yield Finding("store", "broken", "; ".join(damaged), "delete these folders; the next run makes them again")
    else:
        rest = f"; {freed / 2**30:.2f} GiB of optimizer state dropped (runtime.keep=last)" if freed else ""
        yield Finding("store", "fine", f"{sound} artifacts, every file as it was written{rest}")

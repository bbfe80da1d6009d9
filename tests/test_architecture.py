"""The arrows of the house: which room may import which, and where each large dependency may appear."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("flows", "tasks", "prosparse_core", "kernels")
ALLOWED = {
    "flows": {"flows", "tasks", "prosparse_core"},
    "tasks": {"tasks", "prosparse_core", "kernels"},
    "prosparse_core": {"prosparse_core"},
    "kernels": {"kernels"},
}
ONLY_IN = {
    "prefect": ("flows/", "tasks/"),
    "lm_eval": ("tasks/evaluate.py", "tasks/evaluation/"),
    "rich": ("flows/console.py",),
    "duckdb": ("prosparse_core/ledger/",),
    "triton": ("kernels/triton_",),
}
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Absolute module names a file imports; only those that run at import time when ``top_level``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _at_import_time(tree) if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent.name == "remote_code", f"{path}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _at_import_time(node)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_arrows(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    room = relative.split("/")[0]
    for module in imports(path):
        top = module.split(".")[0]
        if top in ROOMS:
            assert top in ALLOWED[room], f"{relative} imports {module}: {room} may import {sorted(ALLOWED[room])}"
        if top in ONLY_IN:
            assert relative.startswith(ONLY_IN[top]), f"{relative} imports {module}: only {ONLY_IN[top]} may"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("room", ["flows", "tasks"])
def test_flows_and_tasks_are_cheap_to_import(room: str) -> None:
    """``plan`` imports them all: torch and the rest of the heavy libraries wait until a step runs."""
    heavy = {"torch", "transformers", "datasets", "lm_eval", "triton", "numpy"}
    for path in (ROOT / room).rglob("*.py"):
        if path.name in ("sparse_decode.py", "scoring.py", "export_check.py"):
            continue  # imported inside bodies only
        found = {m.split(".")[0] for m in imports(path, top_level=True)} & heavy
        assert not found, f"{path.name} imports {sorted(found)} at import time"


def test_the_main_path_is_one_page() -> None:
    assert len((ROOT / "flows" / "full.py").read_text(encoding="utf-8").splitlines()) <= 90


def test_kernels_is_a_docstring_only() -> None:
    """transformers probes a package named kernels: ours must import in an instant and claim no version."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1
    assert isinstance(tree.body[0], ast.Expr)


@pytest.mark.slow
def test_transformers_imports_beside_our_kernels_folder() -> None:
    import subprocess

    code = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LlamaForCausalLM"

"""Three real corpora that every machine with this package has: Python's own sources, the documentation of the packages
we depend on, and instructions made from code (docstring -> function)."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prosparse_core.data.documents import Document, shuffled, split_of, stable_hash
from prosparse_core.errors import BadInput, EnvironmentProblem

PACKAGE = "prosparse"
MIN_CHARS = 400
"""Shorter files are mostly licence headers and re-exports."""
MAX_DOC_CHARS = 200_000

_SKIPPED_FOLDERS = {
    # tests, other people's packages, applications
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"),
    # generated tables
    *("encodings", "pydoc_data", "msilib", "__pycache__"),
}
_SKIPPED_FILES = ("_sysconfigdata", "stringprep.py", "entities.py")


@dataclass(frozen=True)
class Builtin:
    """A corpus found on the machine: its documents in the order of a seed, and its identity."""

    documents: Callable[[int], Iterator[Document]]
    identity: Callable[[], dict[str, Any]]


@functools.cache
def stdlib_files() -> dict[str, Path]:
    """Relative name -> path of the standard library's modules, without tests, applications and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(d for d in inside if d not in _SKIPPED_FOLDERS and not d.startswith("config-"))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith(_SKIPPED_FILES) and path.stat().st_size >= MIN_CHARS:
                found[path.relative_to(root).as_posix()] = path
    return found


@functools.cache
def _stdlib_identity() -> dict[str, Any]:
    sizes = ((name, path.stat().st_size) for name, path in stdlib_files().items())
    return {"python": platform.python_version(), "files": f"{stable_hash(*sorted(sizes)):016x}"}


def python_code(seed: int) -> Iterator[Document]:
    """Whole modules of the standard library; the file is the unit that is held out."""
    files = stdlib_files()
    for name in shuffled(files, seed):
        yield Document(name, name, files[name].read_text(encoding="utf-8"))


@functools.cache
def requirement_closure() -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that this package needs, directly or not, by normalised name; itself left out.

    Only these, so that installing something else on the machine changes no corpus.

    Raises:
        EnvironmentProblem: this package is not installed, so its requirements are unknown.
    """
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(PACKAGE, "")]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name not in found:
            try:
                found[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                if name == PACKAGE:
                    raise EnvironmentProblem(f"the package {PACKAGE} is not installed", hint="make setup") from None
                continue
        for line in _requirements(found[name]):
            if "extra ==" in line and not extra and " or " not in line:
                continue  # the common case, without the cost of parsing it
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                normalised = re.sub(r"[-_.]+", "-", requirement.name).lower()
                todo += [(normalised, wanted) for wanted in ("", *requirement.extras)]
    del found[PACKAGE]
    return dict(sorted(found.items()))


def _header(distribution: importlib.metadata.Distribution) -> list[str]:
    """The lines above the long description; the general parser would read all of it, which is slow for 150 of them."""
    return (distribution.read_text("METADATA") or "").split("\n\n", 1)[0].splitlines()


def _requirements(distribution: importlib.metadata.Distribution) -> list[str]:
    lines = _header(distribution)
    if not lines:
        return distribution.requires or []
    return [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]


@functools.cache
def _closure_identity() -> dict[str, Any]:
    def version(distribution: importlib.metadata.Distribution) -> str:
        lines = (line for line in _header(distribution) if line.startswith("Version: "))
        return next(lines, f"Version: {distribution.version}").removeprefix("Version: ")

    return {"distributions": [f"{name}=={version(found)}" for name, found in requirement_closure().items()]}


def package_docs(seed: int) -> Iterator[Document]:
    """Long descriptions and shipped documentation of our requirements; a distribution is held out as a whole."""
    found: list[Document] = []
    for name, distribution in requirement_closure().items():
        found.append(Document(f"{name}:description", name, str(distribution.metadata.json.get("description", ""))))
        for path in filter(_is_documentation, distribution.files or []):
            try:
                text = Path(str(path.locate())).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # listed but removed, or no text: neither is documentation
            found.append(Document(f"{name}:{path.as_posix()}", name, text))
    return _in_order((d for d in found if MIN_CHARS <= len(d.text) <= MAX_DOC_CHARS), seed)


def _in_order(found: Iterable[Document], seed: int) -> Iterator[Document]:
    """Shuffled across files, so that the first documents already come from many of them."""
    by_id = {document.id: document for document in found}
    return (by_id[id] for id in shuffled(by_id, seed))


_NO_PROSE_FOLDERS = {"test", "tests", "testing", "data", "licenses", "_vendor", "vendored", "third_party"}
_NO_PROSE_FILES = (
    *("license", "licence", "copying", "copyright", "notice"),
    *("authors", "cmakelists", "requirements"),
)


def _is_documentation(path: importlib.metadata.PackagePath) -> bool:
    suffix, stem = path.suffix.lower(), path.stem.lower()
    if suffix not in (".md", ".rst", ".txt") or stem.startswith(_NO_PROSE_FILES):
        return False
    folders = [part.lower() for part in path.parts[:-1]]
    if _NO_PROSE_FOLDERS.intersection(folders) or any(f.endswith((".dist-info", ".egg-info")) for f in folders):
        return False
    # text files are mostly tables and word lists
    return suffix != ".txt" or "readme" in stem or bool({"doc", "docs"}.intersection(folders))


@dataclass(frozen=True)
class Function:
    """A function with a docstring, cut from its file and moved to the left margin."""

    file: str
    name: str
    """Qualified: ``Class.method``."""
    line: int
    signature: str
    """On one line: ``def name(arguments) -> returned``."""
    header: str
    """Decorators and ``def``, as written; ends with a newline."""
    docstring: str
    """Cleaned of quotes and indentation."""
    docstring_source: str
    """As written; ends with a newline."""
    body: str
    """What follows the docstring, indented, without the last newline."""

    @property
    def document(self) -> Document:
        """The instruction: signature and docstring asked, code without the docstring answered."""
        owner, dot, _ = self.name.rpartition(".")
        what = f"method `{self.signature}` of the class `{owner}`" if dot else f"function `{self.signature}`"
        prompt = f"Write the Python {what}.\n\n{self.docstring}"
        return Document(f"{self.file}:{self.line}:{self.name}", self.file, self.header + self.body, prompt)


MAX_FUNCTION_CHARS = 6000
MIN_BODY_CHARS = 30


def functions(file: str, text: str) -> Iterator[Function]:
    """The functions and methods of a module that have a docstring and a body that does something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return
    lines = text.split("\n")
    todo: list[tuple[ast.AST, str]] = [(tree, "")]
    while todo:
        node, prefix = todo.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                function = _function(child, prefix + child.name, file, lines)
                if function is not None:
                    yield function
            elif isinstance(child, ast.ClassDef):
                todo.append((child, f"{prefix}{child.name}."))
            elif isinstance(child, ast.If | ast.Try):
                todo.append((child, prefix))


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, file: str, lines: list[str]) -> Function | None:
    docstring = (ast.get_docstring(node) or "").strip()
    if not docstring or len(node.body) < 2:
        return None
    quoted, *rest = node.body
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    only = rest[0] if len(rest) == 1 else None
    if isinstance(only, ast.Pass | ast.Raise) or isinstance(getattr(only, "value", None), ast.Constant):
        return None  # abstract, a placeholder or a constant
    assert quoted.end_lineno is not None
    assert node.end_lineno is not None
    if quoted.lineno == node.lineno or rest[0].lineno <= quoted.end_lineno:
        return None

    def cut(first: int, last: int) -> str | None:
        part = lines[first - 1 : last]
        margin = " " * node.col_offset
        if any(line.strip() and not line.startswith(margin) for line in part):
            return None
        return "\n".join(line[node.col_offset :].rstrip() for line in part)

    header, quotes = cut(start, quoted.lineno - 1), cut(quoted.lineno, quoted.end_lineno)
    body = cut(quoted.end_lineno + 1, node.end_lineno)
    if header is None or quotes is None or body is None:
        return None
    body = body.lstrip("\n")
    if len(body) < MIN_BODY_CHARS or len(header) + len(docstring) + len(body) > MAX_FUNCTION_CHARS:
        return None
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    signature = f"{keyword} {node.name}({ast.unparse(node.args)}){returns}"
    return Function(file, name, node.lineno, signature, header + "\n", docstring, quotes + "\n", body)


def code_instructions(seed: int) -> Iterator[Document]:
    """Instructions from the standard library's functions; the file they stand in is held out as a whole."""
    return _in_order((function.document for function in _stdlib_functions()), seed)


def _stdlib_functions() -> Iterator[Function]:
    for name in stdlib_files():
        yield from _functions_in(name)


@functools.cache
def _functions_in(name: str) -> tuple[Function, ...]:
    return tuple(functions(name, stdlib_files()[name].read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Question:
    """Signature and docstring; which of four bodies is the right one?"""

    function: Function
    bodies: list[str]
    answer: int

    @property
    def row(self) -> dict[str, Any]:
        question = self.function.header + self.function.docstring_source
        function = self.function
        return {
            "id": function.document.id,
            "file": function.file,
            "question": question,
            "choices": self.bodies,
            "answer": self.answer,
        }


NUM_CHOICES = 4
POOL_PER_QUESTION = 8
"""Functions that questions and wrong answers are taken from, where there are so many: enough of similar length."""
_CHOICE_CHARS = range(40, 601)


def choice_questions(num_questions: int, *, seed: int, drawn: Container[str] = ()) -> tuple[list[Question], list[str]]:
    """Multiple choice from evaluation files: the wrong bodies are those of functions of similar length.

    The right answers are spread evenly over the positions.

    Args:
        drawn: files that are held out already; others are taken only when these have too few functions.

    Returns:
        The questions, and the files that they need held out.

    Raises:
        BadInput: the files that may be held out have too few suitable functions.
    """
    pool: dict[str, Function] = {}
    names = [name for name in shuffled(stdlib_files(), "choices") if split_of(name) == "evaluation"]
    for name in sorted(names, key=lambda name: name not in drawn):
        if len(pool) >= max(POOL_PER_QUESTION * num_questions, 4 * NUM_CHOICES):
            break
        for function in _functions_in(name):
            short = len(function.header) + len(function.docstring_source) <= 1500
            if short and len(function.body) in _CHOICE_CHARS:
                pool.setdefault(function.body, function)
    if len(pool) < max(num_questions, 4 * NUM_CHOICES):
        raise BadInput(
            f"data.choice_questions={num_questions}, but held-out code has {len(pool)} suitable functions",
            hint="lower data.choice_questions (0 for none)",
        )
    by_length = sorted(pool, key=lambda body: (len(body), body))
    place = {body: i for i, body in enumerate(by_length)}
    chosen = shuffled(pool, stable_hash("choices", seed))[:num_questions]
    questions = []
    for number, body in enumerate(chosen):
        near = sorted(by_length, key=lambda other: (abs(place[other] - place[body]), place[other]))[1:10]
        bodies = shuffled(near, stable_hash("wrong", seed, body))[: NUM_CHOICES - 1]
        bodies.insert(number % NUM_CHOICES, body)
        questions.append(Question(pool[body], bodies, number % NUM_CHOICES))
    return questions, sorted({pool[body].file for question in questions for body in question.bodies})


BUILTIN: dict[str, Builtin] = {
    "python-code": Builtin(python_code, _stdlib_identity),
    "package-docs": Builtin(package_docs, _closure_identity),
    "code-instructions": Builtin(code_instructions, _stdlib_identity),
}

from __future__ import annotations

import ast
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prosparse_core.data import code_corpora
from prosparse_core.data.code_corpora import (
    BUILTIN,
    MAX_FUNCTION_CHARS,
    NUM_CHOICES,
    choice_questions,
    functions,
    requirement_closure,
    stdlib_files,
)
from prosparse_core.data.sources import Document, split_of
from prosparse_core.errors import BadInput, EnvironmentProblem

MODULE = textwrap.dedent(
    '''
    import os

    @decorated(1)
    @twice
    def first(a, b=2, *rest, key: int = 3) -> dict[str,
                                                   int]:  # a remark
        """Add things up.

            indented
        """
        # why

        total = a + b + sum(rest) + key
        return {"total": total}

    class Box:
        """A box."""

        async def open(self, how):
            \'\'\'Open it.\'\'\'
            text = """
            kept with its indentation
            """
            return await how(text)

        class Inner:
            def deep(self):
                "Look deeper."
                def nested():
                    """Nested functions are part of this one."""
                    return self.value + 1
                return nested() + nested()

        def under_indented(self):
            """A string that starts further left than the method cannot be moved."""
            return """
      here
            """ + str(self)

    if os.name == "posix":
        def conditional(path):
            """Only on some systems."""
            return os.path.join(path, "a", "b", "c")
    else:
        try:
            def tried(path):
                """Elsewhere."""
                return os.path.join(path, "d", "e", "f")
        except OSError:
            pass

    def no_docstring(a):
        return a + 1 + 2 + 3 + 4 + 5 + 6 + 7

    def only_docstring():
        """There is nothing else."""

    def passing():
        """Nothing happens, at some length, so that it is not length that excludes it."""
        pass

    def abstract():
        """Not here."""
        raise NotImplementedError("a long enough message about it, longer than a tiny body")

    def dots():
        """Not here either."""
        ...

    def on_one_line(): """Docstring."""; return "a long enough string to be a body by its length"

    def same_line():
        """Docstring."""; return "a long enough string to be a body by its length"

    def tiny():
        """Too small."""
        return 1
    '''
)


@pytest.fixture(scope="module")
def cut() -> dict[str, code_corpora.Function]:
    return {f.name: f for f in functions("module.py", MODULE)}


def test_functions_with_docstring_and_body_are_found(cut: dict[str, code_corpora.Function]) -> None:
    assert set(cut) == {"first", "Box.open", "Box.Inner.deep", "conditional", "tried"}


def test_a_function_is_cut_as_it_is_written(cut: dict[str, code_corpora.Function]) -> None:
    first = cut["first"]
    assert first.signature == "def first(a, b=2, *rest, key: int=3) -> dict[str, int]"
    assert first.header.startswith("@decorated(1)\n@twice\ndef first(a, b=2,")
    assert first.header.endswith("int]:  # a remark\n")
    assert first.docstring == "Add things up.\n\nindented"
    assert first.docstring_source == '    """Add things up.\n\n        indented\n    """\n'
    assert first.body == ('    # why\n\n    total = a + b + sum(rest) + key\n    return {"total": total}')


def test_a_method_moves_to_the_left_margin(cut: dict[str, code_corpora.Function]) -> None:
    method = cut["Box.open"]
    assert method.header == "async def open(self, how):\n"
    assert method.body == '    text = """\n    kept with its indentation\n    """\n    return await how(text)'
    assert method.signature == "async def open(self, how)"


def test_the_instruction_asks_by_signature_and_docstring_and_is_answered_by_code(
    cut: dict[str, code_corpora.Function],
) -> None:
    document = cut["Box.Inner.deep"].document
    assert document.prompt == "Write the Python method `def deep(self)` of the class `Box.Inner`.\n\nLook deeper."
    assert document.text.startswith("def deep(self):\n    def nested():\n")
    assert document.file == "module.py"
    assert "Look deeper" not in document.text
    assert cut["tried"].document.prompt == "Write the Python function `def tried(path)`.\n\nElsewhere."


def test_a_module_that_does_not_parse_or_warns_gives_what_it_has() -> None:
    assert list(functions("bad.py", "def f(:\n")) == []
    warned = 'def f(x):\n    """Do."""\n    return "\\d" + x + "a long enough string"\n'
    assert [f.name for f in functions("escape.py", warned)] == ["f"]


def docstring_of(tree: ast.Module) -> str:
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    return (ast.get_docstring(function) or "").strip()


def test_every_function_of_the_standard_library_is_valid_python() -> None:
    num = 0
    for name, path in list(stdlib_files().items())[::8]:
        for function in functions(name, path.read_text(encoding="utf-8")):
            tree = ast.parse(function.header + function.docstring_source + function.body)
            assert docstring_of(tree) == function.docstring
            assert len(ast.parse(function.header + function.body).body) == 1
            assert len(function.document.text) <= MAX_FUNCTION_CHARS
            num += 1
    assert num > 200


def test_the_standard_library_without_tests_tables_and_strangers() -> None:
    files = stdlib_files()
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(files)
    folders = {part for name in files for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    assert not [name for name in files if "_sysconfigdata" in name]


@pytest.mark.parametrize("kind", sorted(BUILTIN))
def test_a_builtin_corpus_is_large_and_ordered_by_the_seed(kind: str) -> None:
    found = list(BUILTIN[kind].documents(1))
    assert found == list(BUILTIN[kind].documents(1))
    other = list(BUILTIN[kind].documents(2))
    assert found != other
    assert set(found) == set(other)
    assert len({d.id for d in found}) == len(found)
    assert sum(len(d.text) for d in found) > 1_000_000
    assert {split_of(d.file) for d in found} == {"train", "calibration", "evaluation"}
    assert all(d.text.strip() for d in found)
    assert all((d.prompt is not None) == (kind == "code-instructions") for d in found)


def test_code_and_instructions_hold_out_the_same_files() -> None:
    code = {d.file: split_of(d.file) for d in BUILTIN["python-code"].documents(0)}
    for document in BUILTIN["code-instructions"].documents(0):
        assert code[document.file] == split_of(document.file)


def test_identities_are_quick() -> None:
    for builtin in BUILTIN.values():
        began = time.perf_counter()
        builtin.identity()
        assert time.perf_counter() - began < 3  # 0.15 s on an idle machine


# the requirement closure, on distributions made for the test


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(code_corpora, "PACKAGE", "zz-root")
    caches = (requirement_closure, code_corpora._closure_identity)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


LONG = "# A title\n\n" + "Some prose that is worth learning. " * 30


def install(site: Path, name: str, requires: list[str], files: dict[str, str] | None = None, text: str = LONG) -> None:
    info = site / f"{name.replace('-', '_')}-1.5.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.5", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n\n" + text, encoding="utf-8")
    for path, content in (files or {}).items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content, encoding="utf-8")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in (files or {})), encoding="utf-8")


def closure_names() -> list[str]:
    requirement_closure.cache_clear()
    return list(requirement_closure())


def test_the_closure_follows_requirements_extras_and_markers(site: Path) -> None:
    install(
        site,
        "zz-root",
        [
            "ZZ_Direct[fast]>=1",
            'zz-windows; sys_platform == "no such platform"',
            'zz-dev; extra == "dev"',
            "zz-not-installed",
            'zz-marked; python_version >= "3.8"',
        ],
    )
    direct = ["zz.transitive", 'zz-fast; extra == "fast"', 'zz-slow; extra == "slow"']
    install(site, "zz-direct", [*direct, 'zz-either; extra == "slow" or python_version >= "3"'])
    install(site, "zz-transitive", ["zz-root"])  # a circle
    for name in ("zz-windows", "zz-dev", "zz-marked", "zz-fast", "zz-slow", "zz-either", "zz-stranger"):
        install(site, name, [])
    assert closure_names() == ["zz-direct", "zz-either", "zz-fast", "zz-marked", "zz-transitive"]
    assert BUILTIN["package-docs"].identity() == {
        "distributions": ["zz-direct==1.5", "zz-either==1.5", "zz-fast==1.5", "zz-marked==1.5", "zz-transitive==1.5"]
    }


def test_the_docs_of_a_distribution(site: Path) -> None:
    install(site, "zz-root", ["zz-direct", "zz-brief"])
    names = ("readme.md", "guide.rst", "docs/page.txt", "data/words.md", "tests/notes.md", "LICENSE.md", "table.txt")
    shipped = {f"zz/{name}": f"{name}\n{LONG}" for name in (*names, "README.txt", "CMakeLists.txt", "code.py")}
    install(site, "zz-direct", [], shipped | {"zz/short.md": "short", "zz_direct-1.5.dist-info/top_level.txt": LONG})
    install(site, "zz-brief", [], text="UNKNOWN")
    (site / "zz" / "guide.rst").unlink()  # listed, but removed since
    found = list(BUILTIN["package-docs"].documents(0))
    assert {d.id for d in found} == {
        "zz-direct:description",
        *(f"zz-direct:zz/{name}" for name in ("readme.md", "docs/page.txt", "README.txt")),
    }
    assert {d.file for d in found} == {"zz-direct"}
    assert Document("zz-direct:description", "zz-direct", LONG) in found


def test_without_the_package_its_requirements_are_unknown(site: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="zz-root is not installed"):
        requirement_closure()


def test_our_own_closure_has_what_we_need_and_not_ourselves() -> None:
    names = closure_names()
    assert {"torch", "numpy", "prefect", "jinja2"} <= set(names)
    assert "prosparse" not in names


# multiple choice


def test_choice_questions_ask_for_the_body() -> None:
    questions, files = choice_questions(30, seed=3)
    assert {q.function.file for q in questions} <= set(files)
    assert len(questions) == 30
    assert len({q.function.document.id for q in questions}) == 30
    for question in questions:
        row = question.row
        assert split_of(row["file"]) == "evaluation"
        assert len(row["choices"]) == len(set(row["choices"])) == NUM_CHOICES
        assert row["choices"][row["answer"]] == question.function.body
        for body in row["choices"]:
            assert docstring_of(ast.parse(row["question"] + body)) == question.function.docstring
        lengths = sorted(map(len, row["choices"]))
        assert lengths[-1] - lengths[0] <= 200


def test_right_answers_are_spread_evenly_and_the_seed_decides() -> None:
    answers = [q.answer for q in choice_questions(40, seed=0)[0]]
    assert [answers.count(place) for place in range(NUM_CHOICES)] == [10] * NUM_CHOICES
    rows = [q.row for q in choice_questions(20, seed=0)[0]]
    assert rows == [q.row for q in choice_questions(20, seed=0)[0]]
    assert rows != [q.row for q in choice_questions(20, seed=1)[0]]


def test_questions_take_no_more_files_than_they_need() -> None:
    questions, files = choice_questions(10, seed=0)
    candidates = [name for name in stdlib_files() if split_of(name) == "evaluation"]
    assert set(files) < set(candidates)
    found = (f for name in files for f in functions(name, stdlib_files()[name].read_text(encoding="utf-8")))
    bodies = {function.body: function.file for function in found}
    assert {bodies[body] for question in questions for body in question.bodies} <= set(files)
    large = "unittest/case.py"  # with functions enough
    assert choice_questions(3, seed=0, drawn={large})[1] == [large]


def test_too_many_questions_are_refused() -> None:
    with pytest.raises(BadInput, match=r"choice_questions=100000, but held-out code has \d+ suitable functions"):
        choice_questions(100_000, seed=0)

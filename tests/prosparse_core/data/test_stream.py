"""A corpus that comes in shards: the same batches whenever and wherever one begins, in bounded room."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpora import SEED, SEQ_LEN, data_of, files, notes
from tiny_tokenizers import CHAT, tiny_tokenizer

from prosparse_core.data.encoding import Encoders
from prosparse_core.data.held_out import HELD_OUT, HeldOut
from prosparse_core.data.rendering import Renderer
from prosparse_core.data.stream import DESCRIPTION, DocumentStream, Maker, shard_name, states
from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.mixing import Batch, Mixture, prepare
from prosparse_core.recipe import Source, parse
from prosparse_core.recipe_train import Stage

SHARDS, SEQUENCES, STEPS = 3, 4, 40
SHARD_TOKENS = 12 * SEQ_LEN


def rows_file(folder: Path, num: int = 300) -> Path:
    """Rows of a text, and of a question with its answer."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        with open(folder / f"part{part}.jsonl", "w", encoding="utf-8") as file:
            for i in range(part * num // 2, (part + 1) * num // 2):
                text = f"row {i} " + " ".join(str(i * 7919 + k * k) for k in range(i % 17 + 4))
                file.write(json.dumps({"text": text, "q": f"what is {i}?", "a": text}) + "\n")
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streamed rows, streamed instructions, and notes that lie on disk, in a store."""
    base = tmp_path_factory.mktemp("streams")
    rows = rows_file(base / "rows")
    streamed: dict[str, Any] = {"stream": True, "max_tokens": SHARDS * SHARD_TOKENS}
    data = data_of(
        files("rows", rows, 0.5, **streamed),
        files("chats", rows, 0.3, prompt="{q}", answer="{a}", **streamed),
        files("notes", notes(base / "notes"), 0.2),
        stream_shards=SHARDS,
    )
    folder = base / "store" / "mixture" / "x"
    folder.mkdir(parents=True)
    prepare(data, tiny_tokenizer(chat=CHAT), folder, seed=SEED)
    return folder


@contextlib.contextmanager
def opened(corpora: Path, work: Path, seed: int = SEED) -> Iterator[Mixture]:
    with contextlib.closing(Mixture(corpora, seed, work)) as mixture:
        yield mixture


def equal(a: Batch, b: Batch) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and a.corpora == b.corpora


@pytest.mark.slow
def test_batches_do_not_depend_on_where_one_begins(corpora: Path, tmp_path: Path) -> None:
    index = corpora.parents[1] / ".streams" / "x"
    straight = []
    most = 0
    with opened(corpora, tmp_path) as mixture:
        for step in range(1, STEPS + 1):
            straight.append(mixture.batch(step, SEQUENCES))
            there = [p.name.split("-")[0] for p in (tmp_path / "stream").glob("[a-z]*.tokens.npy")]
            most = max(most, *(there.count(name) for name in ("rows", "chats")))
    assert 1 <= most <= SHARDS
    assert not (tmp_path / "stream").exists()
    assert len(states(index, "rows")) > SHARDS, "more shards than fit at a time"
    assert {i for batch in straight for i in batch.corpora} == {0, 1, 2}
    assert len({batch.tokens[i].numpy().tobytes() for batch in straight for i in range(SEQUENCES)}) > 100

    shutil.rmtree(index)  # as on another machine: the shards before are gone over again
    with opened(corpora, tmp_path) as mixture:
        for step in range(STEPS // 2, STEPS + 1):
            assert equal(mixture.batch(step, SEQUENCES), straight[step - 1]), step
        mixture.rewind()  # a rollback
        for step in (3, 4, STEPS):
            assert equal(mixture.batch(step, SEQUENCES), straight[step - 1]), step
    first = mixture.sample(0)
    assert first == Mixture(corpora, SEED).sample(0)


STAGES = [
    Stage(until_step=8, l1=0, mixture={"rows": 1, "notes": 1}),
    Stage(until_step=16, l1=0, mixture={"chats": 1}),
    Stage(until_step=26, l1=0, mixture={"rows": 3, "chats": 1}),
]


@pytest.mark.slow
def test_stages_with_corpora_of_their_own_go_on_in_each_stream(corpora: Path, tmp_path: Path) -> None:
    """Walked through, or begun anew in each stage and in the middle of one, which needs only that stage's streams."""
    with contextlib.closing(Mixture(corpora, SEED, tmp_path / "all", stages=STAGES)) as mixture:
        straight = [mixture.batch(step, SEQUENCES) for step in range(1, 27)]
    assert {c for batch in straight[8:16] for c in batch.corpora} == {1}
    taken: dict[int, list[bytes]] = {0: [], 1: []}
    for batch in straight:
        for tokens, corpus in zip(batch.tokens, batch.corpora, strict=True):
            taken.setdefault(corpus, []).append(tokens.numpy().tobytes())
    plain = Mixture(corpora, SEED, stages=STAGES)
    for corpus in (0, 1):
        places = [w for c, w in (plain.sample(i, SEQUENCES) for i in range(26 * SEQUENCES)) if c == corpus]
        assert places == list(range(len(places)))
        assert len(set(taken[corpus])) == len(taken[corpus]), "a window came twice"
    for index, steps in enumerate([(1, 8), (9, 12, 16), (20, 26)]):
        work = tmp_path / str(index)
        with contextlib.closing(Mixture(corpora, SEED, work, stages=STAGES[: index + 1])) as mixture:
            for step in steps:
                assert equal(mixture.batch(step, SEQUENCES), straight[step - 1]), step
            assert mixture._streams is not None
            assert set(mixture._streams._first) == [{"rows"}, {"chats"}, {"rows", "chats"}][index]


@pytest.mark.slow
def test_what_stops_the_preparation_is_said(corpora: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store" / "mixture" / "x"
    shutil.copytree(corpora, copy)
    about = json.loads((copy / DESCRIPTION).read_text())
    about["rows"]["source"]["path"] = str(tmp_path / "gone")
    (copy / DESCRIPTION).write_text(json.dumps(about))
    with opened(copy, tmp_path) as mixture, pytest.raises(BadInput, match="source 'rows': nothing to read at"):
        mixture.batch(1, SEQUENCES)


def test_a_preparation_that_was_killed_is_noticed(corpora: Path, tmp_path: Path) -> None:
    with opened(corpora, tmp_path) as mixture:
        assert mixture._streams is not None
        start = mixture._streams._start

        def start_and_kill(first: dict[str, int]) -> None:
            start(first)
            assert mixture._streams is not None
            assert mixture._streams._process is not None
            mixture._streams._process.kill()

        mixture._streams._start = start_and_kill  # type: ignore[method-assign]
        with pytest.raises(ProSparseError, match="prepares the stream ended with code -9"):
            mixture.batch(1, SEQUENCES)


def encoders_of(corpora: Path, processes: int = 1) -> Encoders:
    held_out = HeldOut.from_plain(json.loads((corpora / HELD_OUT).read_text()))
    return Encoders(tiny_tokenizer(chat=CHAT), held_out, processes)


def made(corpora: Path, name: str, folder: Path, num: int) -> list[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """(first window, tokens, mask) of the first shards of a corpus, made one after the other in this process."""
    import numpy as np

    for part in ("index", "scratch"):
        (folder / part).mkdir(parents=True)
    about = json.loads((corpora / DESCRIPTION).read_text())[name]
    maker = Maker(about, encoders_of(corpora), folder / "index", folder / "scratch")
    found = []
    number, start, position = 0, 0, None
    for number in range(num):
        state = maker.make(number, start, position, needed=0)
        assert state.windows >= about["windows_per_shard"]
        path = folder / "scratch" / f"{shard_name(name, number)}.tokens.npy"
        mask = path.with_name(path.name.replace(".tokens.", ".mask."))
        found.append(
            (start, torch.from_numpy(np.load(path)), torch.from_numpy(np.load(mask)) if mask.exists() else None)
        )
        start, position = state.end, state.ends
    assert [s.number for s in states(folder / "index", name)] == list(range(num))
    return found


def test_shards_are_the_same_from_two_processes_and_with_two_corpora_in_turns(corpora: Path, tmp_path: Path) -> None:
    about = json.loads((corpora / DESCRIPTION).read_text())

    def shards(processes: int) -> dict[str, bytes]:
        folder = tmp_path / str(processes)
        folder.mkdir()
        with encoders_of(corpora, processes) as encoders:
            makers = [Maker(about[name], encoders, folder, folder) for name in ("rows", "chats")]
            ends: list[tuple[int, Any]] = [(0, None)] * 2
            for number, (place, maker) in itertools.product(range(3), enumerate(makers)):
                state = maker.make(number, *ends[place], needed=0)
                ends[place] = (state.end, state.ends)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    one, two = shards(1), shards(2)
    assert {name.split("-")[0] for name in one} == {"rows", "chats"}
    assert len(one) == 3 * (3 + 4)  # states, tokens, beginnings, and of chats masks
    assert one == two


def test_a_stream_holds_every_training_document_and_no_held_out_one(corpora: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=CHAT)
    shards = made(corpora, "rows", tmp_path, 24)
    text = "".join(tokenizer.decode(tokens.flatten()) for _, tokens, _ in shards)
    rows = [json.loads(s) for p in sorted((corpora.parents[2] / "rows").iterdir()) for s in p.read_text().splitlines()]
    mixture = Mixture(corpora, SEED)
    held_out = {d.text for split in ("calibration", "evaluation") for d in mixture.held_out(split, "rows")}
    render = Renderer(Source(name="rows", kind="files", weight=1, path="x"))
    kept_out = HeldOut.from_plain(json.loads((corpora / HELD_OUT).read_text()))
    trained = [r["text"] for r in rows if kept_out.verdict(render(r, id="")) == "train"]  # type: ignore[arg-type]
    assert not [t for t in held_out if t + "</s>" in text]
    missing = [t for t in trained if t + "</s>" not in text]
    assert len(trained) > 250
    assert len(missing) <= 2 * len(shards), "at most the ends of shards"


def test_instructions_keep_their_masks(corpora: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=CHAT)
    for _, tokens, mask in made(corpora, "chats", tmp_path, 2):
        assert mask is not None
        assert 0.2 < mask.float().mean() < 0.95
        labels = tokenizer.decode(tokens[mask.bool()])
        assert "row" in labels
        assert "what is" not in labels


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_a_source_goes_on_from_any_position(kind: str, tmp_path: Path) -> None:
    rows_file(tmp_path / "rows", 20)
    notes(tmp_path / "rows" / "notes", 3) if kind == "files" else None
    source = Source(name="rows", kind=kind, weight=1, path=str(tmp_path / "rows"), stream=True)  # type: ignore[arg-type]
    straight = list(itertools.islice(DocumentStream(source, SEED, None), 60))  # more than two epochs
    assert len({d.id for d in straight}) == (23 if kind == "files" else 20)
    for stop in (1, 10, 19, 20, 23, 41):
        stream = DocumentStream(source, SEED, None)
        list(itertools.islice(stream, stop))
        position = json.loads(json.dumps(stream.position))
        rest = list(itertools.islice(DocumentStream(source, SEED, position), 60 - stop))
        assert [d.text for d in rest] == [d.text for d in straight[stop:]], stop


def test_a_stream_of_the_hub_takes_its_files_in_turns_in_an_order_of_the_seed(tmp_path: Path) -> None:
    """In their own order, one after the other, a file would be a whole shard: StarCoder's are a language each."""
    for part in range(20):
        rows = [json.dumps({"text": f"language {part} program {i}"}) for i in range(part % 3 + 2)]
        (tmp_path / f"part{part:02d}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    source = Source(name="rows", kind="hub", weight=1, path=str(tmp_path), stream=True)
    num = sum(part % 3 + 2 for part in range(20))
    orders = []
    for seed in (1, 2):
        epochs = [d.text for d in itertools.islice(DocumentStream(source, seed, None), 2 * num)]
        assert sorted(epochs[:num]) == sorted(epochs[num:])
        assert epochs[:num] != epochs[num:]
        assert len(set(epochs[:num])) == num
        assert len({text.split()[1] for text in epochs[:8]}) == 8, "the first eight rows are of eight files"
        orders.append(epochs)
    assert orders[0] != orders[1]
    for stop in (3, 8, 9, 30, num - 1, num, num + 5):
        stream = DocumentStream(source, 1, None)
        list(itertools.islice(stream, stop))
        position = json.loads(json.dumps(stream.position))
        rest = [d.text for d in itertools.islice(DocumentStream(source, 1, position), 2 * num - stop)]
        assert rest == orders[0][stop:], stop


def test_a_source_without_training_text_is_refused(corpora: Path, tmp_path: Path) -> None:
    about = json.loads((corpora / DESCRIPTION).read_text())["rows"]
    about["seq_len"] = 10_000_000
    with pytest.raises(BadInput, match="fewer training tokens than one window"):
        Maker(about, encoders_of(corpora), tmp_path, tmp_path).make(0, 0, None, 0)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"kind": "python-code"}, "is small: it cannot be streamed"),
        ({"max_tokens": 4 * 60}, "a shard must hold one window"),
        ({"max_tokens": 600}, "the 512 tokens of a step"),
    ],
)
def test_streams_that_cannot_work_are_refused(source: dict[str, Any], said: str) -> None:
    raw = {
        "name": "a",
        "description": "b",
        "model": {"id": "m", "source": "random:llama"},
        "data": {
            "seq_len": SEQ_LEN,
            "sources": [{"name": "s", "kind": "files", "path": "x", "weight": 1, "stream": True, **source}],
        },
        "train": {"tokens_per_step": 512, "lr": 1e-3, "stages": [{"until_step": 1, "l1": 0}]},
    }
    with pytest.raises(BadInput, match=said):
        parse(raw)

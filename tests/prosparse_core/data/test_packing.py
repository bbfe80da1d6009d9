from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHAT, tiny_tokenizer

from prosparse_core.data.packing import Encoded, Encoder, RowWriter, Window, pack_texts, pack_whole
from prosparse_core.data.sources import Document
from prosparse_core.errors import BadInput

TEXT = Document("t", "t", "def f(x):\n    return x\n")
CHATTED = Document("c", "c", "def über(x):\n    return '→'", "Write `über`.")


def ids(tokenizer: object, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({}, [], ["</s>"]),
        ({"adds_bos": True}, ["<s>"], ["</s>"]),
        ({"bos": False}, [], ["</s>"]),
        ({"eos": False}, ["<s>"], []),
        ({"eos": False, "adds_bos": True}, ["<s>"], []),
    ],
)
def test_a_text_stands_between_the_tokens_that_separate_documents(
    options: dict[str, bool], before: list[str], after: list[str]
) -> None:
    tokenizer = tiny_tokenizer(**options)
    encoded = Encoder(tokenizer).encode([TEXT])[0]
    surround = tokenizer.convert_tokens_to_ids
    assert encoded.tokens.tolist() == [*surround(before), *ids(tokenizer, TEXT.text), *surround(after)]
    assert encoded.mask.all()
    assert encoded.tokens.dtype == np.int32


def test_a_tokenizer_without_bos_and_eos_is_refused() -> None:
    with pytest.raises(BadInput, match="neither a BOS nor an EOS"):
        Encoder(tiny_tokenizer(bos=False, eos=False))


@pytest.mark.parametrize("options", [{}, {"bos": False}, {"eos": False}, {"adds_bos": True}])
@pytest.mark.parametrize("document", [CHATTED, Document("a", "a", "assistant", "a"), Document("e", "e", "|", "end|")])
def test_a_chat_has_its_labels_on_the_answer_and_the_end_of_its_turn(
    options: dict[str, bool], document: Document
) -> None:
    tokenizer = tiny_tokenizer(chat=CHAT, **options)
    encoder = Encoder(tokenizer)
    encoded = encoder.encode([document])[0]
    whole = f"<|user|>\n{document.prompt}<|end|>\n<|assistant|>\n{document.text}<|end|>\n"
    assert encoded.tokens.tolist() == ids(tokenizer, whole)
    assert tokenizer.decode(encoded.tokens[encoded.mask == 1]) == document.text + "<|end|>"
    assert encoder.description["instruction_format"] == "chat_template"


def test_what_the_template_writes_is_what_the_encoder_writes() -> None:
    tokenizer = tiny_tokenizer(chat=CHAT)
    turns = [{"role": "user", "content": CHATTED.prompt}, {"role": "assistant", "content": CHATTED.text}]
    expected = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert Encoder(tokenizer).encode([CHATTED])[0].tokens.tolist() == list(expected)


@pytest.mark.parametrize(
    ("options", "before", "end"),
    [({}, "", "</s>"), ({"adds_bos": True}, "<s>", "</s>"), ({"eos": False}, "<s>", "")],
)
def test_without_a_chat_template_the_plain_format_is_used(options: dict[str, bool], before: str, end: str) -> None:
    tokenizer = tiny_tokenizer(**options)
    encoded = Encoder(tokenizer).encode([CHATTED])[0]
    whole = f"{before}### Instruction:\n{CHATTED.prompt}\n\n### Response:\n{CHATTED.text}{end}"
    assert tokenizer.decode(encoded.tokens) == whole
    assert tokenizer.decode(encoded.tokens[encoded.mask == 1]) == CHATTED.text + end


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }}",
        "{{ messages[1]['content'] }}{{ messages[0]['content'] }}",
        "{{ messages[0]['content'] }}{{ messages[1]['content'] }}{{ messages[1]['content'] }}",
        "{{ raise_exception('no assistant here') }}",
    ],
)
def test_a_chat_template_that_does_not_fit_is_refused(template: str) -> None:
    with pytest.raises(BadInput, match="chat template"):
        Encoder(tiny_tokenizer(chat=template)).encode([CHATTED])


def test_a_slow_tokenizer_cannot_place_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer(chat=CHAT)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(BadInput, match="fast tokenizer"):
        Encoder(tokenizer).encode([CHATTED])


def test_encoding_keeps_the_order_of_texts_and_chats() -> None:
    encoder = Encoder(tiny_tokenizer())
    mixed = [CHATTED, TEXT, CHATTED, TEXT, TEXT]
    assert [e.document for e in encoder.encode(mixed)] == mixed


LONG = ["".join(f"x_{i} = {i * i}\n" for i in range(3000)), " ".join(f"word{i}" for i in range(3000)), "→" * 4000]


@pytest.mark.parametrize("text", [*LONG, "short\n"])
def test_spans_lie_apart_all_over_a_text_and_have_at_most_a_window(text: str) -> None:
    encoder = Encoder(tiny_tokenizer())
    document = Document("i", "f", text)
    spans = list(encoder.spans(document, 512, 7))
    whole = len(encoder.encode([document])[0].tokens)
    assert len(spans) == max(1, whole // 512)
    for encoded in spans:
        assert len(encoded.tokens) <= 512
        assert len(encoded.tokens) > 256 or encoded.document.text == text
        assert encoded.tokens.tolist() == encoder.encode([encoded.document])[0].tokens.tolist()
    if text in LONG[:2]:  # every piece of these is found in one place only
        places = sorted((text.index(e.document.text), len(e.document.text)) for e in spans)
        assert all(at + length <= after for (at, length), (after, _) in itertools.pairwise(places))
        assert places[0][0] == 0
        assert places[-1][0] > 0.7 * len(text)
        assert all(text[at - 1] in "\n " for at, _ in places[1:])
        order = [text.index(e.document.text) for e in spans]
        assert order == [text.index(e.document.text) for e in encoder.spans(document, 512, 7)]
        assert order != [text.index(e.document.text) for e in encoder.spans(document, 512, 8)]


def test_the_first_spans_are_from_anywhere_in_their_documents() -> None:
    """Not the heads of files, which is where licences and imports are."""
    encoder, text = Encoder(tiny_tokenizer()), LONG[0]
    places = []
    for i in range(60):
        first = next(encoder.spans(Document(f"d{i}", f"f{i}", text), 512, 7))
        places.append(text.index(first.document.text) / len(text))
    assert sum(p == 0 for p in places) < 12
    assert 0.3 < sum(places) / 60 < 0.6


@pytest.mark.parametrize(
    ("eos", "also", "end"),
    [
        ("<|end|>", ["<|endoftext|>"], "<|endoftext|>"),  # a chat model: its EOS ends a turn
        ("<|end|>", ["</s>"], "</s>"),
        ("</s>", ["<|endoftext|>"], "</s>"),
        ("<|end|>", [], "<|end|>"),
    ],
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_separator_is_what_models_are_pretrained_with(eos: str, also: list[str], end: str, adds_bos: bool) -> None:
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    names = ["a", "<s>", eos, *also]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": also})
    encoder = Encoder(tokenizer)
    names_of = tokenizer.convert_ids_to_tokens
    assert names_of(encoder.suffix) == [end]
    assert names_of(encoder.prefix) == (["<s>"] if adds_bos else [])
    assert names_of(encoder.separator.before) == ("<s>" if adds_bos else end)
    assert encoder.description["document_separator"] == ("<s>" if adds_bos else end)
    assert names_of(encoder.lead(is_chat=True)) == names_of([encoder.separator.before]), "no template: the plain format"
    tokenizer.chat_template = CHAT
    assert Encoder(tokenizer).lead(is_chat=True) == []
    assert Encoder(tokenizer).lead(is_chat=False) == [encoder.separator.before]


def fake(lengths: list[tuple[int, int]]) -> list[Encoded]:
    """Documents of (prompt, answer) lengths whose every token is unique."""
    made, at = [], 0
    for number, (prompt, answer) in enumerate(lengths):
        mask = np.array([0] * prompt + [1] * answer, dtype=np.uint8)
        tokens = np.arange(at, at + prompt + answer, dtype=np.int32)
        made.append(Encoded(Document(str(number), str(number), ""), tokens, mask))
        at += prompt + answer
    return made


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=150)


@given(LENGTHS, st.integers(2, 33))
@settings(max_examples=100, deadline=None)
def test_texts_are_joined_and_cut(lengths: list[tuple[int, int]], seq_len: int) -> None:
    made = fake(lengths)
    windows = list(pack_texts(made, seq_len))
    total = sum(a + b for a, b in lengths)
    assert len(windows) == total // seq_len
    joined = np.concatenate([w.tokens for w in windows]) if windows else np.empty(0)
    assert joined.tolist() == list(range(total // seq_len * seq_len))
    for window in windows:
        assert all(set(made[int(d.id)].tokens) & set(range(int(joined[-1]) + 1)) for d in window.starts)
    begun = [int(d.id) for w in windows for d in w.starts]
    assert begun == [i for i, e in enumerate(made) if windows and e.tokens[0] <= joined[-1]]


def begins_by_hand(windows: list[Window], made: list[Encoded], num_leading: int) -> list[list[int]]:
    """Where in each window a document begins: token by token, from which document each one is."""
    owner = {int(t): i for i, e in enumerate(made) for t in e.tokens}
    found = []
    for window in windows:
        owners = [owner[t] for t in window.tokens.tolist()]
        places = [i for i in range(1, len(owners)) if owners[i] != owners[i - 1]]
        found.append([int(i in {0, *(p - num_leading for p in places)}) for i in range(len(owners))])
    return found


@given(LENGTHS, st.integers(2, 33), st.sampled_from([0, 1]), st.sampled_from([pack_texts, pack_whole]))
@settings(max_examples=150, deadline=None)
def test_a_window_says_where_its_documents_begin(
    lengths: list[tuple[int, int]], seq_len: int, num_leading: int, pack: Callable[..., Iterator[Window]]
) -> None:
    made = fake(lengths)
    windows = list(pack(made, seq_len, num_leading))
    # A separator that is the last token of its window leads nothing: the document that it leads is in the next one.
    assert [w.begins.tolist() for w in windows] == begins_by_hand(windows, made, num_leading)
    plain = list(pack(made, seq_len))
    assert [w.tokens.tolist() for w in windows] == [w.tokens.tolist() for w in plain]


@pytest.mark.parametrize(
    ("options", "text", "chat"),
    [({}, 1, 1), ({"adds_bos": True}, 0, 0), ({"eos": False}, 0, 0), ({"chat": CHAT}, 1, 0), ({"bos": False}, 1, 1)],
)
def test_a_separator_leads_where_documents_have_no_beginning_of_their_own(
    options: dict[str, Any], text: int, chat: int
) -> None:
    encoder = Encoder(tiny_tokenizer(**options))
    assert (encoder.num_leading(is_chat=False), encoder.num_leading(is_chat=True)) == (text, chat)


@given(LENGTHS, st.integers(2, 60))
@settings(max_examples=200, deadline=None)
def test_instructions_stay_whole(lengths: list[tuple[int, int]], seq_len: int) -> None:
    made = fake(lengths)
    windows = list(pack_whole(made, seq_len))
    owner = {int(t): (e, i) for e in made for i, t in enumerate(e.tokens)}
    seen: dict[int, int] = {}
    for window in windows:
        assert window.tokens.shape == window.mask.shape == (seq_len,)
        assert window.mask[1:].any()
        num_repeated = 0
        for token, label in zip(window.tokens.tolist(), window.mask.tolist(), strict=True):
            document, place = owner[token]
            if label or not document.mask[place]:
                seen[token] = seen.get(token, 0) + 1
            else:
                num_repeated += 1  # an answer without a label: only filler is that
            assert not label or document.mask[place]
        assert num_repeated <= window.num_filler < seq_len
        for document in window.starts:
            encoded = made[int(document.id)]
            if len(encoded.tokens) <= seq_len:
                at = window.tokens.tolist().index(encoded.tokens[0])
                # the filler may have shown the beginning of this very document only in an earlier window
                whole = window.tokens[at : at + len(encoded.tokens)]
                assert whole.tolist() == encoded.tokens.tolist()
                assert window.mask[at : at + len(whole)].tolist() == encoded.mask.tolist()
    assert all(count == 1 for token, count in seen.items() if owner[token][0].mask[owner[token][1]])
    used = sum(seq_len - w.num_filler for w in windows)
    assert used <= sum(a + b for a, b in lengths)


def test_packing_whole_documents_by_hand() -> None:
    made = fake([(3, 3), (4, 4), (1, 3), (2, 2)])
    first, second = list(pack_whole(made, 10))
    # 6 tokens, then the first that fits the 4 left is the third document
    assert first.tokens.tolist() == [0, 1, 2, 3, 4, 5, 14, 15, 16, 17]
    assert first.mask.tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 1, 1]
    assert [d.id for d in first.starts] == ["0", "2"]
    # 8 tokens, then two unlabelled ones from the beginning of the next
    assert second.tokens.tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 18, 19]
    assert second.mask.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert (first.num_filler, second.num_filler) == (0, 2)


def test_a_document_longer_than_a_window_continues_in_the_next_and_empty_windows_are_left_out() -> None:
    windows = list(pack_whole(fake([(9, 5), (1, 1)]), 4))
    assert [w.tokens.tolist() for w in windows] == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert [d.id for w in windows for d in w.starts] == ["0", "1"]


@pytest.mark.parametrize("num_rows", [0, 1, 1000])
def test_rows_become_an_array_that_maps(tmp_path: Path, num_rows: int) -> None:
    rows = np.arange(num_rows * 7, dtype=np.int32).reshape(num_rows, 7)
    with RowWriter(tmp_path / "x.npy", 7, np.int32) as writer:
        for row in rows:
            writer.add(row)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r" if num_rows else None)
    assert mapped.dtype == np.int32
    np.testing.assert_array_equal(mapped, rows)

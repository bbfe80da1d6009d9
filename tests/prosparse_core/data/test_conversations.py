"""Conversations: their forms, their text as templates write it, and labels on what the assistant says, nothing else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_corpora import data_of, files
from tiny_tokenizers import CHAT, tiny_tokenizer

from prosparse_core.data.documents import Document, Turn, conversation, from_row, to_row
from prosparse_core.data.packing import Encoder
from prosparse_core.data.sources import check_source, documents
from prosparse_core.errors import BadInput
from prosparse_core.mixing import Mixture, prepare
from prosparse_core.recipe import Source

LLAMA = (  # as LLaMA-2's: the system turn inside the first user turn, contents stripped, roles that must take turns
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<s>[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' </s>' }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (  # as Qwen's: a system turn of its own, unless there is one
    "{% if messages[0]['role'] != 'system' %}<|user|>\nBe an assistant.<|end|>\n{% endif %}" + CHAT
)
NO_END = (  # nothing ends a turn but the head of the next one, which is special
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{% else %}<|assistant|>{% endif %}"
    "{{ m['content'] }}\n{% endfor %}"
)
MERGING = (  # no special tokens at all: heads and ends merge with what stands beside them
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '.' }}{% endfor %}"
)
TEMPLATES = {"chatml": CHAT, "llama": LLAMA, "system": DEFAULT_SYSTEM, "no end": NO_END, "merging": MERGING}


def talk(*contents: str, system: str | None = None) -> Document:
    """Alternating turns, the user first."""
    turns = [Turn(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return conversation("t:1", "row:1", [*([Turn("system", system)] if system else []), *turns])


def twin(tokenizer: Any, document: Document) -> tuple[list[int], list[int]]:
    """Tokens and labels, by rendering every beginning of the conversation again: slow, and only for templates whose
    text of a beginning is a beginning of the text.
    """
    messages = [{"role": t.role, "content": t.content} for t in document.turns or ()]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids, labels, ended = found["input_ids"], [0] * len(found["input_ids"]), False
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        assert whole.startswith(text)
        marked = [*messages[:i], {"role": "assistant", "content": "@@@@"}]
        first = tokenizer.apply_chat_template(marked, tokenize=False).index("@@@@")
        last = first + len(message["content"])
        after = [k for k, (start, _) in enumerate(found["offset_mapping"]) if last <= start < len(text)]
        end = next((k for k in after if ids[k] in special), None)
        ended = end is not None
        for k, (start, stop) in enumerate(found["offset_mapping"]):
            if (start < last and stop > first) or (end is not None and k in after and k <= end):
                labels[k] = 1
    eos = [] if ended else [tokenizer.eos_token_id]
    return [*ids, *eos], [*labels, *[1] * len(eos)]


CONTENT = st.text(st.sampled_from("a \n.:→é<|s>[]"), min_size=1, max_size=12).map(lambda text: text.strip() or ".")


@pytest.mark.parametrize("template", TEMPLATES)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4), CONTENT | st.none())
@settings(max_examples=40, deadline=None)
def test_tokens_and_labels_are_those_of_the_twin(
    template: str, exchanges: list[tuple[str, str]], system: str | None
) -> None:
    tokenizer = tiny_tokenizer(chat=TEMPLATES[template])
    document = talk(*itertools.chain(*exchanges), system=system if template in ("chatml", "llama", "system") else None)
    encoded = Encoder(tokenizer).encode([document])[0]
    tokens, labels = twin(tokenizer, document)
    assert encoded.tokens.tolist() == tokens
    assert encoded.mask.tolist() == labels


@pytest.mark.parametrize(
    ("template", "end", "last"),
    [("chatml", "<|end|>", "<|end|>"), ("llama", " </s>", " </s>"), ("system", "<|end|>", "<|end|>"),
     ("no end", "", "</s>"), (None, "</s>", "</s>")],
)  # fmt: skip
def test_the_loss_is_on_every_assistant_turn_and_its_end(template: str | None, end: str, last: str) -> None:
    tokenizer = tiny_tokenizer(chat=TEMPLATES[template] if template else None)
    document = talk("What is it?", "It is a dog.", "And its name?", "Rex → é")
    encoded = Encoder(tokenizer).encode([document])[0]
    runs = np.split(encoded.tokens, np.flatnonzero(np.diff(encoded.mask)) + 1)
    labelled = [tokenizer.decode(run) for run in runs[int(encoded.mask[0] == 0) :: 2]]
    assert labelled[0].lstrip() == f"It is a dog.{end}"
    assert "".join(labelled[1:]).lstrip() == f"Rex → é{last}"
    if template != "system":
        assert "What is it?" in tokenizer.decode(runs[0])


def test_one_exchange_is_a_prompt_and_its_answer() -> None:
    for chat in (*TEMPLATES.values(), None):
        encoder = Encoder(tiny_tokenizer(chat=chat))
        as_turns, as_prompt = talk("Why?", "Because."), Document("p", "p", "Because.", "Why?")
        one, other = encoder.encode([as_turns, as_prompt])
        assert (one.tokens.tolist(), one.mask.tolist()) == (other.tokens.tolist(), other.mask.tolist())
        assert as_turns.key == as_prompt.key


def test_without_a_template_each_exchange_is_written_as_a_single_one() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    encoder = Encoder(tokenizer)
    both = encoder.encode([talk("Why?", "Because.", "How?", "So.")])[0]
    alone = [encoder.encode([talk(*pair)])[0] for pair in (("Why?", "Because."), ("How?", "So."))]
    assert both.tokens.tolist() == [*alone[0].tokens, *alone[1].tokens[1:]]
    assert both.mask.tolist() == [*alone[0].mask, *alone[1].mask[1:]]
    system = encoder.encode([talk("Why?", "So.", system="Be brief.")])[0]
    assert tokenizer.decode(system.tokens) == "<s>Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\nSo.</s>"
    bare = Encoder(tiny_tokenizer(eos=False)).encode([talk("a", "b", "c", "d")])[0]
    assert "b\n\n### Instruction:\nc" in tokenizer.decode(bare.tokens)


def test_an_assistant_that_speaks_first_has_its_labels() -> None:
    document = conversation("a", "a", [Turn("assistant", "Hello!"), Turn("user", "Hi."), Turn("assistant", "So?")])
    tokenizer = tiny_tokenizer(chat=CHAT)
    encoded = Encoder(tokenizer).encode([document])[0]
    assert tokenizer.decode(encoded.tokens[encoded.mask == 1]) == "Hello!<|end|>So?<|end|>"
    with pytest.raises(BadInput, match=r"refuses the conversation a \(that begins 'Hello!'\) .*must alternate"):
        Encoder(tiny_tokenizer(chat=LLAMA)).encode([document])


def test_a_template_that_reads_into_the_contents_is_refused_with_the_conversation() -> None:
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('#')[-1] }}<|end|>{% endfor %}"
    encoder = Encoder(tiny_tokenizer(chat=template))
    assert encoder.encode([talk("a", "b")])
    with pytest.raises(BadInput, match=r"does not write the turns of the conversation t:1 .* as they are"):
        encoder.encode([talk("a", "think # b")])
    with pytest.raises(BadInput, match="once each"):
        Encoder(tiny_tokenizer(chat="{{ messages[-1]['content'] }}")).encode([talk("a", "b", "c", "d")])


def test_a_conversation_is_cut_between_turns() -> None:
    encoder = Encoder(tiny_tokenizer(chat=CHAT))
    whole = talk("a " * 9, "b " * 9, "c " * 9, "d " * 9, "e " * 9, "f " * 9)
    sizes = [len(encoder.encode([talk(*[t.content for t in (whole.turns or ())[:n]])])[0].tokens) for n in (2, 4, 6)]
    for limit, kept in [(10_000, 6), (sizes[2], 6), (sizes[2] - 1, 4), (sizes[1] - 1, 2), (sizes[0], 2)]:
        cut = encoder.cut_chat(whole, limit)
        assert cut is not None
        assert cut.document.turns == (whole.turns or ())[:kept]
        assert len(cut.tokens) <= limit
    assert encoder.cut_chat(whole, sizes[0] - 1) is None
    assert encoder.cut_chat(Document("p", "p", "answer " * 50, "q"), 20) is None


# forms


SAID = [("user", "Why?"), ("assistant", "Because."), ("user", "How?"), ("assistant", "So.")]
FORMS: dict[str, Any] = {
    "role/content": [{"role": role, "content": text, "weight": 1} for role, text in SAID],
    "from/value": [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in SAID],
    "alternating": [text for _, text in SAID],
}


def read(path: Path, form: str = "role/content", **more: Any) -> list[Document]:
    return list(documents(files("talks", path, messages="data", turns=form, **more), seed=0))


def write(path: Path, *cells: Any) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": "x", "data": cell} for cell in cells]), path)
    else:
        path.write_text("".join(json.dumps({"id": 1, "data": cell}) + "\n" for cell in cells), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversation(tmp_path: Path, form: str, suffix: str) -> None:
    (found,) = read(write(tmp_path / f"talks{suffix}", FORMS[form]), form)
    assert found.turns == tuple(Turn(role, text) for role, text in SAID)
    assert (found.text, found.prompt) == ("Because.\nSo.", None)
    assert from_row(json.loads(json.dumps(to_row(found)))) == found
    (asked,) = documents(
        files("q", write(tmp_path / "q.jsonl", "Why?"), prompt="{data}", answer="{id}"), seed=0
    )  # the same question as a row of instructions
    assert asked.file == found.file


def test_a_sequence_of_records_as_the_datasets_library_gives_it(tmp_path: Path) -> None:
    columns = {"role": [role for role, _ in SAID], "content": [text for _, text in SAID]}
    (found,) = read(write(tmp_path / "talks.jsonl", columns))
    assert found.turns == tuple(Turn(role, text) for role, text in SAID)


def test_turns_that_say_nothing(tmp_path: Path) -> None:
    def cell(*turns: tuple[str, str | None]) -> list[dict[str, Any]]:
        return [{"role": role, "content": text} for role, text in turns]

    path = write(
        tmp_path / "talks.jsonl",
        cell(("system", " "), ("user", " a "), ("assistant", "b\n"), ("user", "unanswered")),
        cell(("user", "c"), ("assistant", " "), ("user", "d"), ("assistant", "e")),
        cell(("user", None), ("assistant", "f")),
        cell(("user", "g")),
        [],
        None,
    )
    (found,) = read(path)
    assert found.turns == (Turn("user", "a"), Turn("assistant", "b"))


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (
            [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
            "turn 2: role='tool' belongs to the use",
        ),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], "turn 1: role='assistant' belongs to the use"),
        ([{"role": "narrator", "content": "a"}], "turn 1: unknown role='narrator'"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "turn 2 is a system turn"),
        ([{"role": "user", "content": ["a"]}], "turn 1: its content is list, not text"),
        ([{"from": "human", "value": "a"}], "turn 1: needs 'role' and 'content', this has 'from', 'value'"),
        (["a", "b"], "turn 1: needs 'role' and 'content', this is str"),
        ("a", "this is str, not a list of turns"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_row(tmp_path: Path, cell: Any, said: str) -> None:
    path = write(tmp_path / "talks.jsonl", FORMS["role/content"], cell)
    with pytest.raises(BadInput, match=r"source 'talks': talks.jsonl:2: column 'data'") as error:
        read(path)
    assert said in str(error.value)


def test_a_list_column_is_read_by_no_format_string(tmp_path: Path) -> None:
    path = write(tmp_path / "talks.jsonl", FORMS["alternating"])
    for more, said in [({"prompt": "{data[0]}", "answer": "{data[1]}"}, "prompt="), ({"column": "data"}, "holds list")]:
        for act in (check_source, lambda source: list(documents(source, seed=0))):
            with pytest.raises(BadInput, match=said) as error:
                act(files("talks", path, **more))
            assert "messages: COLUMN" in str(error.value.hint)
    with pytest.raises(BadInput, match="no column 'turns'"):
        check_source(files("talks", path, messages="turns"))
    check_source(files("talks", path, messages="data", turns="alternating"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"messages": "data", "column": "body"}, "messages is the only column"),
        ({"messages": "data", "template": "{a}"}, "messages is the only column"),
        ({"messages": "data", "prompt": "{a}", "answer": "{b}"}, "messages is the only column"),
        ({"turns": "alternating"}, "says how to read messages"),
        ({"messages": "data", "turns": "pairs"}, "'alternating'"),
    ],
)
def test_sources_that_name_two_forms_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Source(name="s", kind="hub", weight=1, path="a/b", **more)


# the whole way


def talks_file(path: Path, num: int = 240) -> Path:
    rows = []
    for i in range(num):
        turns = [{"from": "human", "value": f"Question {i // 2}?"}]
        for k in range(i % 3 + 1):
            turns += [{"from": "gpt", "value": f"answer {i} {k} " * (k + 2)}, {"from": "human", "value": f"more {k}?"}]
        rows.append(turns)
    return write(path, *rows)


def test_a_corpus_of_conversations_keeps_its_labels_and_never_splits_a_question(tmp_path: Path) -> None:
    source = files("talks", talks_file(tmp_path / "talks.jsonl"), messages="data", turns="from/value")
    tokenizer = tiny_tokenizer(chat=CHAT)
    manifest = prepare(data_of(source), tokenizer, tmp_path / "out", seed=0)
    assert manifest["corpora"][0]["instruction"]
    mixture = Mixture(tmp_path / "out", 0)
    about = manifest["held_out"]
    assert 0 < sum(about["files"].values()) <= about["documents"] < 30, "and not what packing looked at ahead"
    held_out = {split: mixture.held_out(split, "talks") for split in ("calibration", "evaluation")}
    asked = [{(d.turns or ())[0].content for d in found} for found in held_out.values()]
    assert not asked[0] & asked[1]
    trained = tokenizer.decode(np.load(tmp_path / "out" / "train" / "talks.tokens.npy").ravel())
    assert "Question" in trained
    assert not [question for found in asked for question in found if question in trained]
    for found in held_out.values():
        for document in found:
            assert not [t.content for t in document.turns or () if t.role == "assistant" and t.content in trained]
    batch = mixture.batch(1, 8)
    labels = tokenizer.decode(batch.labels[batch.labels != -100])
    assert "answer" in labels
    assert "Question" not in labels
    assert "more" not in labels
    labels_of = mixture.calibration("talks").labels
    assert "answer" in tokenizer.decode(labels_of[labels_of != -100])
    assert "Question" not in tokenizer.decode(labels_of[labels_of != -100])

"""The part of a recipe that says what the model is trained and measured on: corpora, their form, held-out tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from prosparse_core.recipe_train import Section


class Source(Section):
    """One corpus of the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    kind: Literal["python-code", "package-docs", "code-instructions", "hub", "files"]
    weight: float = Field(ge=0)
    """0: the corpus is measured on, and trained on only by stages whose ``mixture`` names it."""
    max_tokens: int = Field(default=400_000, gt=0)
    """At most this many training tokens are prepared; a longer run goes over them again, which its stages say."""
    stream: bool = False
    """Kinds hub and files: prepare the text in shards while training goes on, and remove what was used; ``max_tokens``
    is then what lies on disk at a time. For text that does not fit there."""
    path: str | None = None
    """hub: the dataset id; files: a file, a folder or a glob of parquet, jsonl or text files."""
    config: str | None = None
    data_dir: str | list[str] | None = None
    """Kind hub: the folder of the dataset to read, or several, whose files come together in one order. For datasets
    whose folders have columns of their own."""
    split: str = "train"
    revision: str | None = None
    """Kind hub: the commit or tag. A mirror is read as it is: its content is its identity."""
    mirror: str | None = None
    """Kind hub: a folder laid out like the hub to read the dataset from; default: ``data.mirror``."""
    column: str = "text"
    """The column that holds the text, when no template is given."""
    template: str | None = None
    """Text from several columns: ``"{question}\\n{answer}"``."""
    prompt: str | None = None
    answer: str | None = None
    """Templates of an instruction corpus: chat format, loss on the answer only."""
    messages: str | None = None
    """The column that holds a conversation, a list of turns: chat format, loss on every turn of the assistant."""
    turns: Literal["role/content", "from/value", "alternating"] = "role/content"
    """What a turn of ``messages`` is: a record with these two keys, or a text, of which the user has the first."""

    @model_validator(mode="after")
    def _check(self) -> Source:
        if self.kind in ("hub", "files") and not self.path:
            raise ValueError(f"a source of kind {self.kind!r} needs a path")
        if self.stream and self.kind not in ("hub", "files"):
            raise ValueError(f"a source of kind {self.kind!r} is small: it cannot be streamed")
        for key in ("config", "data_dir", "revision", "mirror"):
            if getattr(self, key) is not None and self.kind != "hub":
                raise ValueError(f"{key} is of sources of kind 'hub', this one is {self.kind!r}")
        if self.data_dir == []:
            raise ValueError("data_dir names no folder: leave it out to read the whole dataset")
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("prompt and answer go together")
        if self.prompt is not None and self.template is not None:
            raise ValueError("give either a template or prompt and answer")
        if self.messages is None and self.turns != "role/content":
            raise ValueError(f"turns={self.turns} says how to read messages, the column with the conversation")
        if self.messages is not None and (self.template or self.prompt or self.column != "text"):
            raise ValueError("messages is the only column then: leave out column, template, prompt and answer")
        return self

    @property
    def data_dirs(self) -> list[str | None]:
        """What ``data_dir`` names; None is the whole dataset."""
        return list(self.data_dir) if isinstance(self.data_dir, list) else [self.data_dir]

    @property
    def is_chat(self) -> bool:
        """Whether its rows are chats, which stay whole in a window and have labels on what the assistant says only."""
        return self.prompt is not None or self.messages is not None


class Data(Section):
    """The mixture: corpora with weights, packed to a fixed length; held-out files per corpus."""

    seq_len: int = Field(gt=1)
    sources: list[Source] = Field(min_length=1)
    attend_across_documents: bool = False
    """Let a document attend to those before it in its packed window. False: the documents of a window do not see each
    other, in training (the teacher too), in calibration and in what predictors learn from."""
    mirror: str | None = None
    """A folder laid out like the hub (``MIRROR/owner/name/...``) that sources of kind hub are read from; None: the hub
    itself. Where it lies decides no result, what is in it does."""
    stream_shards: int = Field(default=4, ge=2)
    """Into how many shards the ``max_tokens`` of a streamed source are cut."""
    calibration_tokens: int = Field(default=8192, gt=0)
    """Held-out tokens per corpus on which thresholds are chosen."""
    evaluation_tokens: int = Field(default=8192, gt=0)
    """Held-out tokens per corpus on which everything is reported; other files than calibration's."""
    choice_questions: int = Field(default=60, ge=0)
    """Multiple-choice questions (docstring -> function body) made of held-out code."""

    @model_validator(mode="before")
    @classmethod
    def _mirrored(cls, raw: Any) -> Any:
        """A source goes its own ways, into processes and files: it knows its mirror itself."""
        if not isinstance(raw, dict) or raw.get("mirror") is None or not isinstance(raw.get("sources"), list):
            return raw
        mirror = {"mirror": raw["mirror"]}
        return {
            **raw,
            "sources": [mirror | s if isinstance(s, dict) and s.get("kind") == "hub" else s for s in raw["sources"]],
        }

    @field_validator("sources")
    @classmethod
    def _names(cls, sources: list[Source]) -> list[Source]:
        names = [s.name for s in sources]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two sources have the same name: {', '.join(twice)}")
        for reserved in {"mixed", "choices"} & set(names):
            raise ValueError(f"a source cannot be named {reserved!r}: that name is taken in files and tables")
        if sum(s.weight for s in sources) <= 0:
            raise ValueError("the weights of all sources are 0")
        return sources

    @model_validator(mode="after")
    def _one_window(self) -> Data:
        if self.calibration_tokens < self.seq_len:
            raise ValueError(
                f"data.calibration_tokens={self.calibration_tokens} is less than one window "
                f"(data.seq_len={self.seq_len}): thresholds are chosen on whole windows"
            )
        return self

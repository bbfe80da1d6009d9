"""llama.cpp beside our loop: the file it is given, how it is fed, and why it is n/a where it is."""

from __future__ import annotations

import ctypes
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import cpu
from prosparse_core.variants import Variant
from tasks.timing import llama_cpp_peer
from tasks.timing.decode import Way

PROMPT = torch.tensor([[5, 9, 40, 11]])


class Llama:
    """Speaks like llama-cpp-python's: logits of the last token, wherever ``llama_get_logits`` finds them."""

    made: list[dict[str, Any]]

    def __init__(self, path: str, **settings: Any) -> None:
        self.magic = Path(path).read_bytes()[:4]
        self.made.append({"magic": self.magic, **settings})
        self.seen: list[int] = []
        self.ctx = self

    def n_vocab(self) -> int:
        return 300

    def reset(self) -> None:
        self.seen = []

    def eval(self, tokens: list[int]) -> None:
        self.seen += tokens
        self.logits = (ctypes.c_float * 300)(*([0.0] * 300))
        self.logits[len(self.seen)] = 1.0


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[Llama]:
    module: Any = types.ModuleType("llama_cpp")
    module.Llama, Llama.made = Llama, []
    module.llama_get_logits = lambda llm: ctypes.cast(llm.logits, ctypes.POINTER(ctypes.c_float))
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(llama_cpp_peer, "version", lambda: "9.9")
    return Llama


def original(base: Any) -> Variant:
    return Variant("original", base.dense, "original")


def test_both_ways_decode_the_same_dense_weights(base: Any, installed: type[Llama], tmp_path: Path) -> None:
    if not cpu.available():
        pytest.skip(cpu.available().why)
    found, why = llama_cpp_peer.ways(original(base), tmp_path, 20, 1)
    assert why is None
    ours, theirs = found
    assert list(tmp_path.iterdir()) == [], "the file is gone once it is open"
    assert installed.made[0]["magic"] == b"GGUF"
    assert (installed.made[0]["n_threads"], installed.made[0]["n_gpu_layers"]) == (1, 0)
    assert [(w.provider, w.dtype, w.mask_source) for w in found] == [
        ("native_dense", "float16", None),
        ("llama_cpp", "float16", None),
    ]
    assert all("f16 of the dense original, fp32 random" in way.note for way in found)
    for way in found:
        assert isinstance(way, Way)
        assert way.begin is not None
        way.begin(PROMPT)
        way.begin(PROMPT)
        assert way.step(7).shape == (300,)
    assert int(theirs.step(8).argmax()) == 4 + 2, "the prompt once, and two tokens"
    assert ours.decoder is not None
    assert ours.decoder.length == 4 + 1


def test_it_is_said_why_it_is_not_there(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp_peer, "version", lambda: None)
    assert llama_cpp_peer.ways(original(base), tmp_path, 20, 1) == ([], "llama-cpp-python is not installed")
    monkeypatch.setattr(llama_cpp_peer, "version", lambda: "9.9")
    assert llama_cpp_peer.ways(None, tmp_path, 20, 1) == ([], "the dense original is not at hand")


def test_a_model_that_it_would_run_wrong_is_no_peer(base: Any, installed: type[Llama], tmp_path: Path) -> None:
    found, why = llama_cpp_peer.ways(original(base), tmp_path, 5000, 1)
    assert found == []
    assert "5000 positions" in str(why)
    assert list(tmp_path.iterdir()) == []

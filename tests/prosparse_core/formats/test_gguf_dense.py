"""The dense original as a GGUF file: what transformers' own reader makes of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny, tokens
from powerinfer_parts import tokenizer_json

from prosparse_core.errors import BadInput
from prosparse_core.formats.gguf_dense import write_dense_gguf
from prosparse_core.formats.powerinfer_file import read_gguf
from prosparse_core.store import write_json


def folder(path: Path, **changes: object) -> Path:
    """A tiny model of f16 numbers with a tokenizer of its own."""
    model = tiny(**{"vocab_size": 40, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    model.save_pretrained(path)
    write_json(path / "tokenizer.json", tokenizer_json(40))
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_another_reader_computes_the_same(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    source = folder(tmp_path / "model", tie_word_embeddings=tied)
    write_dense_gguf(source, tmp_path / "dense.gguf")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["dense.gguf"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="dense.gguf", dtype=torch.float32).eval()
    truth = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = tokens(2, 16, vocab=40)
    with torch.inference_mode():
        torch.testing.assert_close(found(input_ids=ids).logits, truth(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_nothing_of_powerinfer_s_is_in_it(tmp_path: Path) -> None:
    write_dense_gguf(folder(tmp_path / "model"), tmp_path / "dense.gguf")
    file = read_gguf(tmp_path / "dense.gguf")
    assert file.magic == b"GGUF"
    assert file.keys["llama.feed_forward_length"].data == 53
    assert "powerinfer.sparse_threshold" not in file.keys
    names = {name.rpartition("blk.0.")[2] for name in file.tensors if name.startswith("blk.0.")}
    assert names == {
        f"{name}.weight"
        for name in (
            "attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
        )
    }  # fmt: skip
    assert file.tensors["blk.0.ffn_down.weight"].shape == (32, 53)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "relu"}, "llama.cpp computes SiLU"),
        ({"attention_bias": True}, "projections with a bias"),
        ({"model_type": "qwen2"}, "architecture qwen2"),
    ],
)
def test_what_llama_cpp_would_run_wrong_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        write_dense_gguf(folder(tmp_path / "model", **changes), tmp_path / "dense.gguf")
    assert not (tmp_path / "dense.gguf").exists()

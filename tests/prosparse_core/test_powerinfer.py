"""The PowerInfer format: golden bytes, every rule broken once, and what the file computes against torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tokens
from powerinfer_parts import model_folder, random_predictors, rewrite

from prosparse_core import powerinfer
from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.formats.powerinfer_file import Value, read_gguf
from prosparse_core.formats.powerinfer_reader import PowerInferModel
from prosparse_core.formats.powerinfer_verify import require_valid, verify
from prosparse_core.powerinfer import interleave, one_threshold, scaled, write_powerinfer
from prosparse_core.prediction.mask import PredictedMask, logit
from prosparse_core.substitute import use_relu
from prosparse_core.variants import load_model

THRESHOLD = -0.2
GOLDEN = bytes.fromhex(
    "50575249"  # PWRI
    "03000000"  # version 3
    "2400000000000000"  # 36 tensors: 3 and 11 a layer
    "1400000000000000"  # 20 keys
    "1400000000000000" + b"general.architecture".hex() + "08000000" + "0500000000000000" + b"llama".hex()
    + "0c00000000000000" + b"general.name".hex() + "08000000" + "0400000000000000" + b"tiny".hex()
    + "1100000000000000" + b"general.file_type".hex() + "04000000" + "01000000"
    + "1400000000000000" + b"llama.context_length".hex() + "04000000" + "80000000"
    + "1600000000000000" + b"llama.embedding_length".hex() + "04000000" + "20000000"
    + "1100000000000000" + b"llama.block_count".hex() + "04000000" + "03000000"
    + "1900000000000000" + b"llama.feed_forward_length".hex() + "04000000" + "00040000"  # 1024, of 53
    + "1a00000000000000" + b"llama.rope.dimension_count".hex() + "04000000" + "08000000"
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("tiny") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    path = folder.parent / "whole.gguf"
    write_powerinfer(folder, random_predictors(), path, sparse_threshold=THRESHOLD, name="tiny")
    return path.read_bytes()


@pytest.fixture
def path(whole: bytes, tmp_path: Path) -> Path:
    (tmp_path / "m.gguf").write_bytes(whole)
    return tmp_path / "m.gguf"


def torch_logits(folder: Path, ids: torch.Tensor, found: Any, cutoff: float) -> torch.Tensor:
    model, _ = load_model_without_tokenizer(folder)
    with PredictedMask(model, found, [cutoff] * len(found), "pre_norm"), torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def load_model_without_tokenizer(folder: Path) -> tuple[Any, None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prosparse_core.variants.load_tokenizer", lambda folder: None)
        model, _ = load_model(folder)
    use_relu(model)
    return model, None


def test_golden_bytes(whole: bytes) -> None:
    assert whole[: len(GOLDEN)] == GOLDEN
    threshold = b"powerinfer.sparse_threshold" + (6).to_bytes(4, "little") + np.float32(THRESHOLD).tobytes()
    assert threshold in whole


def test_the_file_keeps_every_rule_and_every_weight(folder: Path, path: Path) -> None:
    assert verify(path) == []
    require_valid(path)
    file, (model, _) = read_gguf(path), load_model_without_tokenizer(folder)
    state = {k: v.half().float().numpy() for k, v in model.state_dict().items()}
    embedding = state["model.embed_tokens.weight"]
    assert np.array_equal(file.tensor("token_embd.weight"), embedding)
    assert np.array_equal(file.tensor("output.weight"), embedding), "tied embeddings are written twice"
    for layer in range(3):
        down = file.tensor(f"blk.{layer}.ffn_down_t.weight")
        assert np.array_equal(down[:53], state[f"model.layers.{layer}.mlp.down_proj.weight"].T)
        assert down.shape == (1024, 32)
        gate = file.tensor(f"blk.{layer}.ffn_gate.weight")
        assert np.array_equal(gate[:53], state[f"model.layers.{layer}.mlp.gate_proj.weight"])
        fc1, fc2 = (file.tensor(f"blk.{layer}.{name}.weight") for name in ("fc1", "fc2"))
        assert (fc1.shape, fc2.shape) == ((32, 32), (1024, 32)), "12 hidden numbers, filled up to 32"
        assert not any(a.any() for a in (down[53:], gate[53:], fc1[12:], fc2[53:], fc2[:, 12:]))


@pytest.mark.parametrize("cutoff", [1e-12, 0.3, 0.45, 0.5, 0.55])
@pytest.mark.parametrize("tied", [True, False])
def test_the_file_computes_what_torch_computes(tmp_path: Path, cutoff: float, tied: bool) -> None:
    folder = model_folder(tmp_path / "m", tie_word_embeddings=tied, rms_norm_eps=1e-3, rope_theta=700.0)
    found, path, ids = random_predictors(), tmp_path / "m.gguf", tokens(vocab=40, length=24)
    write_powerinfer(folder, found, path, sparse_threshold=logit(cutoff), name="m")
    assert verify(path) == []
    reader = PowerInferModel(path)
    expected, got = torch_logits(folder, ids, found, cutoff), reader.logits(ids)
    assert float((got - expected).norm() / expected.norm()) < 1e-4
    sparse = torch_logits(folder, ids, found, 1 - 1e-12)
    assert float((sparse - expected).norm() / expected.norm()) > 0.1, "the masks must matter in this test"
    log_likelihood = torch.log_softmax(expected[:, :-1].double(), -1).gather(-1, ids[:, 1:, None])
    assert reader.perplexity([ids[:1], ids[1:]]) == pytest.approx(math.exp(-log_likelihood.mean()), rel=1e-4)
    assert 0 <= reader.predicted_sparsity[0] <= 1


def test_an_all_seeing_threshold_computes_all_and_the_other_none(folder: Path, tmp_path: Path) -> None:
    ids = tokens(vocab=40)
    for threshold, share in ((-1e30, 0.0), (1e30, 1.0)):
        path = tmp_path / f"{share}.gguf"
        write_powerinfer(folder, random_predictors(), path, sparse_threshold=threshold, name="m")
        reader = PowerInferModel(path)
        reader.logits(ids)
        assert reader.predicted_sparsity == [share] * 3


def test_q4_0_is_near_and_keeps_the_rules(folder: Path, tmp_path: Path) -> None:
    path, ids = tmp_path / "q.gguf", tokens(vocab=40, length=24)
    write_powerinfer(folder, random_predictors(), path, sparse_threshold=-1e30, name="m", dtype="q4_0")
    assert verify(path) == []
    file = read_gguf(path)
    kinds = {name.split(".")[-2]: info.kind for name, info in file.tensors.items()}
    assert kinds["ffn_gate"] == kinds["fc2"] == kinds["attn_q"] == 2
    assert kinds["token_embd"] == kinds["output"] == 1
    assert kinds["ffn_norm"] == 0
    expected = torch_logits(folder, ids, random_predictors(), 1e-300)
    error = float((PowerInferModel(path).logits(ids) - expected).norm() / expected.norm())
    assert 0.01 < error < 0.5, "four bits"


U32, F32, STRING, ARRAY = 4, 6, 8, 9
TOKENS = "tokenizer.ggml.tokens"


def matrix(*shape: int, kind: int = 1) -> tuple[np.ndarray, int]:
    return np.zeros(shape, {0: np.float32, 1: np.float16}.get(kind, np.uint8)), kind


def bad_number() -> tuple[np.ndarray, int]:
    array, kind = matrix(1024, 32)
    array[1023, 31] = np.inf
    return array, kind


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"magic": b"GGUF"}, "dense, with SiLU"),
    ({"version": 2}, "GGUF version 2, not 3"),
    ({"keys": {"general.alignment": Value(U32, 64)}}, "alignment 64, not 32"),
    ({"keys": {"general.architecture": Value(STRING, "minicpm")}}, "general.architecture is 'minicpm'"),
    ({"keys": {"general.architecture": None}}, "general.architecture is missing"),
    ({"keys": {"llama.context_length": None}}, "llama.context_length is missing"),
    ({"keys": {"llama.embedding_length": Value(10, 32)}}, "llama.embedding_length is 32, not a positive 32-bit"),
    ({"keys": {"llama.block_count": None}}, "llama.block_count is missing"),
    ({"keys": {"llama.feed_forward_length": None}}, "llama.feed_forward_length is missing"),
    ({"keys": {"llama.attention.head_count": Value(U32, 0)}}, "llama.attention.head_count is 0"),
    ({"keys": {"llama.attention.head_count_kv": None}}, "llama.attention.head_count_kv is missing"),
    ({"keys": {"llama.attention.layer_norm_rms_epsilon": None}}, "layer_norm_rms_epsilon is missing"),
    ({"keys": {"llama.rope.freq_base": Value(U32, 7)}}, "llama.rope.freq_base is 7, not"),
    ({"keys": {"llama.rope.dimension_count": Value(U32, 16)}}, "rope.dimension_count is 16, not d_model / heads = 8"),
    ({"keys": {"llama.rope.scaling.type": Value(STRING, "yarn")}}, "llama.rope.scaling.type: rope scaling"),
    ({"keys": {"general.file_type": Value(U32, 7)}}, r"general.file_type is 7, not 1 \(f16\) or 2"),
    ({"keys": {"powerinfer.sparse_threshold": Value(F32, math.nan)}}, "sparse_threshold is nan"),
    ({"keys": {"powerinfer.sparse_threshold": Value(U32, 0)}}, "sparse_threshold is 0, not a 32-bit float"),
    ({"keys": {"llama.feed_forward_length": Value(U32, 1000)}}, "1000 neurons a layer: up to 1000"),
    ({"keys": {"llama.attention.head_count": Value(U32, 3)}}, "do not divide"),
    ({"keys": {"llama.embedding_length": Value(U32, 36)}}, "d_model 36 is no multiple of 8"),
    ({"keys": {"tokenizer.ggml.model": Value(STRING, "bert")}}, "tokenizer.ggml.model is 'bert'"),
    ({"keys": {"tokenizer.ggml.merges": None}}, "tokenizer.ggml.merges is missing"),
    ({"keys": {"tokenizer.ggml.scores": Value(ARRAY, [0.0] * 39, F32)}}, "scores has 39 entries for 40 tokens"),
    ({"keys": {"tokenizer.ggml.token_type": Value(ARRAY, [1] * 40, U32)}}, "token_type is of another type"),
    ({"keys": {TOKENS: Value(ARRAY, [*"x" * 39, ""], STRING)}}, "token 39 is empty"),
    ({"keys": {TOKENS: Value(ARRAY, [*"x" * 41], STRING)}}, "41 tokens, but token_embd has 40 rows: vocab size"),
    ({"keys": {"tokenizer.ggml.eos_token_id": Value(U32, 40)}}, "eos_token_id is 40, not one of 40 tokens"),
    ({"tensors": {"output.weight": None}}, "output.weight is missing"),
    ({"tensors": {"blk.1.fc2.weight": None}}, "blk.1.fc2.weight is missing"),
    ({"tensors": {"blk.0.ffn_down_t.weight": None}}, "blk.0.ffn_down_t.weight is missing"),
    ({"tensors": {"blk.0.ffn_down.weight": matrix(32, 1024)}}, "blk.0.ffn_down.weight is no tensor of this format"),
    ({"tensors": {"blk.0.attn_q.bias": matrix(32, kind=0)}}, "attn_q.bias is no tensor of this format"),
    (
        {"tensors": {"blk.2.ffn_down_t.weight": matrix(32, 1024)}},
        r"ffn_down_t.weight is \[32, 1024\], not \[1024, 32\]",
    ),
    ({"tensors": {"blk.2.fc1.weight": matrix(64, 32)}}, "layer 2: fc1 gives 64 numbers, fc2 takes 32"),
    ({"tensors": {"blk.2.fc2.weight": matrix(53, 32)}}, r"fc2.weight is \[53, 32\], not \[1024, 'any'\]"),
    ({"tensors": {"blk.0.ffn_up.weight": matrix(1024, 32, kind=0)}}, "ffn_up.weight is f32, not f16: NaN there"),
    ({"tensors": {"blk.0.ffn_norm.weight": matrix(32, kind=1)}}, "ffn_norm.weight is f16, not f32"),
    ({"tensors": {"blk.0.ffn_up.weight": matrix(1024, 18, kind=2)}}, "ffn_up.weight is q4_0, not f16"),
    ({"tensors": {"blk.0.ffn_up.weight": bad_number()}}, "ffn_up.weight holds numbers that are not finite"),
    ({"shift": 16}, "begins at 16, no multiple of 32"),
    ({"cut": 64}, "reaches beyond the end of the file"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[m[:40] for _, m in BROKEN])
def test_every_broken_rule_is_seen(path: Path, change: dict[str, Any], message: str) -> None:
    rewrite(path)
    assert verify(path) == [], "the file as it is, written again, keeps every rule"
    rewrite(path, **change)
    with pytest.raises(ProSparseError, match=message):
        require_valid(path)


def test_q4_0_needs_rows_of_whole_blocks(path: Path) -> None:
    rewrite(path, keys={"general.file_type": Value(U32, 2), "llama.embedding_length": Value(U32, 40)})
    assert any("d_model 40 is no multiple of 32" in line for line in verify(path))


@pytest.mark.parametrize("length", [0, 3, 30, 200, 3000])
def test_a_file_cut_off_in_its_header_is_refused(path: Path, whole: bytes, length: int) -> None:
    path.write_bytes(whole[:length])
    with pytest.raises(BadInput, match="has not the structure of a GGUF file"):
        verify(path)
    path.unlink()
    with pytest.raises(BadInput, match=r"cannot read .*m\.gguf: No such file"):
        verify(path)


def test_a_name_or_a_key_twice_is_refused(path: Path, whole: bytes) -> None:
    path.write_bytes(whole.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"))
    with pytest.raises(BadInput, match=r"tensor blk\.0\.ffn_up\.weight is there twice"):
        verify(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "projections with a bias"),
        ({"head_dim": 16}, "heads of 16 numbers where d_model / heads is 8"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}}, "rope scaling 'llama3'"),
        ({"model_type": "mistral", "sliding_window": 16}, "a sliding window of 16 tokens"),
        ({"model_type": "qwen3"}, "architecture qwen3"),
        ({"hidden_size": 36, "head_dim": 9}, "d_model 36, no multiple of 8"),
        ({"attention_bias": True, "head_dim": 16}, "with a bias; heads of 16"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    powerinfer.refuse(config)
    with pytest.raises(BadInput, match=message):
        powerinfer.refuse({**config, **changes})
    with pytest.raises(BadInput, match=r"d_model 40, no multiple of 32 \(q4_0\)"):
        powerinfer.refuse({**config, "hidden_size": 40, "head_dim": 10}, "q4_0")


def test_numbers_beyond_f16_are_refused_and_nothing_stays(folder: Path, tmp_path: Path) -> None:
    found = [scaled(p, factor=1e6) for p in random_predictors()]
    with pytest.raises(BadInput, match=r"blk\.0\.fc2\.weight holds .* beyond the range of f16"):
        write_powerinfer(folder, found, tmp_path / "m.gguf", sparse_threshold=0.0, name="m")
    with pytest.raises(BadInput, match="2 predictors for a model of 3 layers"):
        write_powerinfer(folder, found[:2], tmp_path / "m.gguf", sparse_threshold=0.0, name="m")
    with pytest.raises(BadInput, match=r"fc1\.weight would be"):
        write_powerinfer(folder, random_predictors(d_model=31), tmp_path / "m.gguf", sparse_threshold=0.0, name="m")
    assert list(tmp_path.iterdir()) == []


def test_interleaved_rows_by_hand() -> None:
    rows = torch.arange(8.0)[:, None]  # two heads of 4: pairs (0, 2), (1, 3)
    assert interleave(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@given(
    st.lists(st.floats(0.01, 0.49), min_size=1, max_size=5),
    st.booleans(),
    st.lists(st.floats(-9, 9), min_size=1, max_size=5),
)
def test_one_threshold_says_what_the_cutoffs_say(cutoffs: list[float], above: bool, scores: list[float]) -> None:
    cutoffs = [1 - c for c in cutoffs] if above else cutoffs
    threshold, factors = one_threshold(cutoffs)
    for cutoff, factor in zip(cutoffs, factors, strict=True):
        assert factor > 0
        for score in scores:
            if abs(score - logit(cutoff)) > 1e-9:
                assert (factor * score >= threshold) == (score >= logit(cutoff))


def test_cutoffs_on_both_sides_of_one_half_have_no_one_threshold() -> None:
    assert one_threshold([0.5, 0.5]) == (0.0, [1.0, 1.0])
    for cutoffs in ([0.4, 0.6], [0.5, 0.4]):
        with pytest.raises(BadInput, match="one threshold for all layers"):
            one_threshold(cutoffs)

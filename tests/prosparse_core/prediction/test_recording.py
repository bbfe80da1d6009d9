"""What is recorded against what the hooks of a test keep, and the bits against their twin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny, tokens
from tiny_tokenizers import tiny_tokenizer

from prosparse_core.data.sources import Document
from prosparse_core.document_masks import Packed, positions_of
from prosparse_core.errors import BadInput
from prosparse_core.families import find_ffns
from prosparse_core.prediction.input import norm_before
from prosparse_core.prediction.recording import (
    calibration_windows,
    held_out_windows,
    open_recording,
    pack_bits,
    record,
    unpack_bits,
)
from prosparse_core.sparsity import SparsityMeter
from prosparse_core.substitute import use_relu, use_thresholds


@given(st.lists(st.lists(st.booleans(), min_size=19, max_size=19), min_size=1, max_size=4), st.integers(1, 19))
def test_bits_come_back(rows: list[list[bool]], width: int) -> None:
    mask = torch.tensor(rows)[:, :width]
    packed = pack_bits(mask)
    assert packed.shape == (len(rows), -(-width // 8))
    assert torch.equal(unpack_bits(packed, width), mask)


def test_bit_i_of_byte_j_is_entry_8j_plus_i() -> None:
    mask = torch.zeros(11, dtype=torch.bool)
    mask[[0, 2, 9]] = True
    assert pack_bits(mask).tolist() == [0b00000101, 0b00000010]


def kept(model: Any, batches: list[torch.Tensor]) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """x and x1 of every layer over all positions, by hooks of our own."""
    x: dict[int, list[torch.Tensor]] = {}
    x1: dict[int, list[torch.Tensor]] = {}
    handles = []
    for f in find_ffns(model):
        handles.append(f.first.register_forward_pre_hook(lambda m, a, i=f.layer: x.setdefault(i, []).append(a[0])))
        handles.append(f.down.register_forward_pre_hook(lambda m, a, i=f.layer: x1.setdefault(i, []).append(a[0])))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    flat = [{i: torch.cat([t.flatten(0, 1) for t in ts]) for i, ts in found.items()} for found in (x, x1)]
    return flat[0], flat[1]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_every_position_is_recorded_as_the_ffn_saw_it(model_type: str) -> None:
    model = tiny(model_type)
    use_relu(model)
    batches = [tokens(seed=1), tokens(seed=2, batch=3), tokens(seed=3, length=5)]
    found = record(model, batches, num_tokens=1000, precision="fp32", dtype=torch.float32)
    x, x1 = kept(model, batches)
    assert found.num_tokens == 16 * 2 + 16 * 3 + 5 * 2
    assert [r.layer for r in found.layers] == [0, 1, 2]
    for r in found.layers:
        assert torch.equal(r.inputs, x[r.layer])
        assert torch.equal(r.active(), x1[r.layer] != 0)
        assert torch.equal(r.active(torch.tensor([7, 3])), (x1[r.layer] != 0)[[7, 3]])
        assert r.sparsity == pytest.approx(float((x1[r.layer] == 0).double().mean()), abs=1e-12)
    assert not any(f.first._forward_pre_hooks or f.down._forward_pre_hooks for f in find_ffns(model))


def test_the_mean_over_layers_is_what_the_meter_counts() -> None:
    model = tiny()
    use_thresholds(model, [0.0, 0.01, 0.03])
    with SparsityMeter(model) as meter:
        found = record(model, [tokens()], num_tokens=32, precision="fp32")
        assert sum(r.sparsity for r in found.layers) / 3 == pytest.approx(meter.mean(), abs=1e-12)


def test_no_more_than_asked_and_nothing_is_forwarded_in_vain() -> None:
    model = tiny()
    use_relu(model)
    taken = []

    def batches() -> Any:
        for seed in range(10):
            taken.append(seed)
            yield tokens(seed=seed)

    found = record(model, batches(), num_tokens=40, precision="fp32", layers=[2, 0], dtype=torch.float32)
    assert taken == [0, 1]
    x, x1 = kept(model, [tokens(seed=0), tokens(seed=1)])
    assert [r.layer for r in found.layers] == [0, 2]
    for r in found.layers:
        assert torch.equal(r.inputs, x[r.layer][:40])
        assert torch.equal(r.active(), (x1[r.layer] != 0)[:40])


def test_a_stride_keeps_positions_from_the_whole_window() -> None:
    model = tiny()
    use_relu(model)
    found = record(model, [tokens(), tokens(seed=5)], num_tokens=9, precision="fp32", dtype=torch.float32, stride=5)
    x, x1 = kept(model, [tokens(), tokens(seed=5)])
    places = [4, 9, 14, 19, 24, 29, 32 + 4, 32 + 9, 32 + 14]
    for r in found.layers:
        assert torch.equal(r.inputs, x[r.layer][places])
        assert torch.equal(r.active(), (x1[r.layer] != 0)[places])


def test_memory_is_two_bytes_a_number_and_one_bit_a_neuron() -> None:
    model = tiny()
    use_relu(model)
    found = record(model, [tokens()], num_tokens=32, precision="fp32")
    assert found.layers[0].inputs.dtype == torch.bfloat16
    assert found.num_bytes == 3 * 32 * (2 * 32 + 7)
    assert 30 * 8192 * (2 * 576 + 1536 // 8) < 500e6, "SmolLM2-135M over 8192 tokens"


def test_under_autocast_the_mask_is_the_one_of_that_precision() -> None:
    model = tiny()
    use_relu(model)
    found = record(model, [tokens()], num_tokens=32, precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        _, x1 = kept(model, [tokens()])
    for r in found.layers:
        assert torch.equal(r.active(), x1[r.layer] != 0)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_residual_stream_before_the_norm(model_type: str) -> None:
    model = tiny(model_type)
    use_relu(model)
    seen: list[torch.Tensor] = []
    handle = norm_before(model, find_ffns(model)[1]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = record(model, [tokens()], num_tokens=32, precision="fp32", dtype=torch.float32, source="pre_norm")
    handle.remove()
    assert torch.equal(found.layers[1].inputs, seen[0].flatten(0, 1))
    post = record(model, [tokens()], num_tokens=32, precision="fp32", dtype=torch.float32)
    assert not torch.equal(found.layers[1].inputs, post.layers[1].inputs)
    assert torch.equal(found.layers[1].active(), post.layers[1].active())


@pytest.mark.parametrize("share", [0.001, 0.15, 0.5, 1.0])
def test_top_p_labels_are_the_largest_of_the_active_ones(share: float) -> None:
    model = tiny()
    use_relu(model)
    found = record(model, [tokens()], num_tokens=32, precision="fp32", top_share=share)
    _, x1 = kept(model, [tokens()])
    for r in found.layers:
        for token, labels in enumerate(r.active(rule="top_p").tolist()):
            sizes = x1[r.layer][token].abs().tolist()
            largest = sorted(range(53), key=lambda n: -sizes[n])[: max(1, int(share * 53))]
            assert [n for n in range(53) if labels[n]] == sorted(n for n in largest if sizes[n] > 0)
        assert r.inactive_share("top_p") == pytest.approx(1 - float(r.active(rule="top_p").double().mean()), abs=1e-12)
    assert found.num_bytes == 3 * 32 * (2 * 32 + 7 + 7)


def test_files_hold_what_memory_would(tmp_path: Path) -> None:
    model = tiny()
    use_relu(model)
    options: dict[str, Any] = {"num_tokens": 40, "precision": "fp32", "top_share": 0.2}
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "layer_0.inputs").write_bytes(b"of an attempt that died")
    written = record(model, [tokens(seed=4)], folder=tmp_path / "r", **options)
    assert written.num_tokens == 32, "less text than was asked"
    plain = record(model, [tokens(seed=4)], **options)
    again = record(model, [], folder=tmp_path / "r", **options)
    for found in (written, again, open_recording(tmp_path / "r")):
        for r, expected in zip(found.layers, plain.layers, strict=True):
            assert (r.layer, r.d_ff) == (expected.layer, expected.d_ff)
            assert torch.equal(r.inputs, expected.inputs)
            assert torch.equal(r.active(), expected.active())
            assert torch.equal(r.active(rule="top_p"), expected.active(rule="top_p"))
    assert (tmp_path / "r" / "layer_2.inputs").stat().st_size == 40 * 32 * 2


def test_a_recording_that_died_is_made_anew(tmp_path: Path) -> None:
    model = tiny()
    use_relu(model)

    def failing() -> Any:
        yield tokens()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        record(model, failing(), num_tokens=100, precision="fp32", folder=tmp_path / "r")
    assert not (tmp_path / "r" / "recording.json").exists()
    found = record(model, [tokens(seed=8)], num_tokens=100, precision="fp32", folder=tmp_path / "r")
    plain = record(model, [tokens(seed=8)], num_tokens=100, precision="fp32")
    assert torch.equal(found.layers[0].inputs, plain.layers[0].inputs)


def test_a_full_disk_is_said_before_a_page_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing to a mapped file that has no room would kill the process instead."""

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        record(tiny(), [tokens()], num_tokens=32, precision="fp32", folder=tmp_path / "r")


TRAIN_FROM_FILES = """
import sys
from pathlib import Path
import torch
from prosparse_core.predictor import train
from prosparse_core.prediction.recording import LayerRecording, _map

def anonymous_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024

num_tokens, d_model, d_ff, folder = 16_384, 2048, 64, Path(sys.argv[1])
settings = {"hidden": 4, "epochs": 1, "batch_size": 256, "lr": 1e-3, "seed": 0}
few = LayerRecording(0, d_ff, torch.zeros(512, d_model).bfloat16(), torch.zeros(512, d_ff // 8, dtype=torch.uint8))
train(few, **settings)  # what training itself needs is taken now
before = anonymous_mib()
inputs = _map(folder, 0, "inputs", (num_tokens, d_model), torch.bfloat16)
active = _map(folder, 0, "active", (num_tokens, d_ff // 8), torch.uint8)
for start in range(0, num_tokens, 512):
    inputs[start : start + 512] = torch.randn(512, d_model)
train(LayerRecording(0, d_ff, inputs, active), **settings)
print(anonymous_mib() - before)
"""


def test_training_from_files_takes_the_memory_of_a_batch(tmp_path: Path) -> None:
    """64 MB of inputs: anonymous memory, what no file stands for, grows by far less; in a process of its own."""
    command = [sys.executable, "-c", TRAIN_FROM_FILES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / "layer_0.inputs").stat().st_size == 64 * 2**20
    assert float(done.stdout) < 32


def test_calibration_windows_take_turns() -> None:
    windows = {"a": torch.arange(6).view(3, 2), "b": torch.arange(10, 12).view(1, 2)}
    mixture: Any = SimpleNamespace(
        corpora=["a", "b"],
        calibration=lambda corpus: SimpleNamespace(tokens=windows[corpus], positions=-windows[corpus]),
    )
    found = [(corpus, t.tolist()) for corpus, (t, _) in calibration_windows(mixture)]
    assert found == [("a", [[0, 1]]), ("b", [[10, 11]]), ("a", [[2, 3]]), ("a", [[4, 5]])]
    assert all(torch.equal(positions, -t) for _, (t, positions) in calibration_windows(mixture))


def test_the_model_is_left_as_it_was_even_after_a_failure() -> None:
    model = tiny()
    use_relu(model)
    model.train()

    def failing() -> Any:
        yield tokens()
        raise RuntimeError("the data ended badly")

    with pytest.raises(RuntimeError, match="ended badly"):
        record(model, failing(), num_tokens=100, precision="fp32")
    assert model.training
    assert not any(f.first._forward_pre_hooks or f.down._forward_pre_hooks for f in find_ffns(model))


def test_unknown_layers_and_no_tokens_are_refused() -> None:
    model = tiny()
    with pytest.raises(BadInput, match=r"layers \[-1, 3\]: the model has layers 0 to 2"):
        record(model, [tokens()], num_tokens=4, precision="fp32", layers=[3, 1, -1])
    with pytest.raises(BadInput, match="no tokens"):
        record(model, [], num_tokens=4, precision="fp32")


def test_held_out_windows_take_turns_and_are_full() -> None:
    tokenizer = tiny_tokenizer()
    texts = {"long": ["def f(x):\n    return x\n" * 9, "import os\n" * 9], "short": ["one"], "chat": ["x + 1\n" * 20]}

    def held_out(split: str, corpus: str) -> list[Document]:
        assert split == "evaluation"
        return [Document(str(i), "f", t, "Add one." if corpus == "chat" else None) for i, t in enumerate(texts[corpus])]

    mixture: Any = SimpleNamespace(corpora=list(texts), seq_len=32, held_out=held_out, attend_across=False)
    packed = list(held_out_windows(mixture, tokenizer))
    found = [(corpus, tokens) for corpus, (tokens, _) in packed]
    assert [corpus for corpus, _ in found][:5] == ["long", "short", "chat", "long", "chat"]
    assert all(t.dtype == torch.int64 and t.shape[0] == 1 for _, t in found)
    assert {t.shape[1] for corpus, t in found if corpus != "short"} == {32}
    eos = tokenizer.eos_token_id
    assert next(t for corpus, t in found if corpus == "short")[0].tolist() == [eos, *tokenizer("one").input_ids, eos]
    together = torch.cat([t[0] for corpus, t in found if corpus == "long"]).tolist()
    expected = [eos, *(i for text in texts["long"] for i in [*tokenizer(text).input_ids, eos])]
    assert together == expected[: len(together)]
    assert len(expected) - len(together) < 32
    # The separator is the first token of the document behind it: there, and at the head of a window, positions are 0.
    flat = torch.cat([p[0] for corpus, (_, p) in packed if corpus == "long" and p is not None]).tolist()
    border = 1 + len(tokenizer(texts["long"][0]).input_ids)
    assert together[border] == eos
    assert [i for i, position in enumerate(flat) if position == 0] == sorted({*range(0, len(flat), 32), border})
    mixture.attend_across = True
    assert all(window.positions is None for _, window in held_out_windows(mixture, tokenizer))


def test_documents_that_are_kept_apart_are_recorded_as_they_are_alone() -> None:
    model = tiny()
    use_relu(model)
    x, begins = tokens(2, 16), torch.zeros(2, 16, dtype=torch.bool)
    begins[:, 9] = True
    packed = record(model, [Packed(x, positions_of(begins))], num_tokens=32, precision="fp32", dtype=torch.float32)
    mixed = record(model, [x], num_tokens=32, precision="fp32", dtype=torch.float32)
    parts = [
        record(model, [part], num_tokens=32, precision="fp32", dtype=torch.float32) for part in (x[:, :9], x[:, 9:])
    ]
    for layer in range(3):
        alone = torch.cat([part.layers[layer].inputs.view(2, -1, 32) for part in parts], 1)
        torch.testing.assert_close(packed.layers[layer].inputs.view(2, 16, 32), alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed.layers[2].inputs, packed.layers[2].inputs, atol=1e-3)

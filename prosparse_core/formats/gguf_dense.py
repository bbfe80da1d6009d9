"""A dense LLaMA-like model as the f16 GGUF file that llama.cpp loads, to be timed beside ours."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from prosparse_core.errors import BadInput
from prosparse_core.formats.powerinfer_tokenizer import read_vocabulary
from prosparse_core.powerinfer import (
    ARCHITECTURE,
    MODEL_TYPES,
    add_model_keys,
    dense_items,
    encode,
    refuse,
    tensor_kind,
)
from prosparse_core.store import require_space
from prosparse_core.variants import check_folder


def write_dense_gguf(model_folder: Path, target: Path) -> None:
    """Write a SiLU model of :data:`MODEL_TYPES`; the file appears whole or not at all.

    llama.cpp's ``llama`` runs SiLU whatever the file says, so any other activation is refused.

    Raises:
        BadInput: another activation, what the format cannot hold, weights beyond the range of f16.
        EnvironmentProblem: the disk is too small.
    """
    import gguf

    config = check_folder(model_folder)
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise BadInput(f"{model_folder} runs {activation}: llama.cpp computes SiLU for {' and '.join(MODEL_TYPES)}")
    refuse(config, format_="our GGUF writer")
    vocabulary = read_vocabulary(model_folder, int(config["vocab_size"]), config)
    items = list(dense_items(config, model_folder))
    require_space(target.parent, sum(2 * int(np.prod(i.shape)) for i in items), f"the GGUF file {target}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
    try:
        add_model_keys(
            writer, config, vocabulary, name=model_folder.name, dtype="f16", d_ff=config["intermediate_size"]
        )
        for item in items:
            values = encode(item, tensor_kind(item, "f16"))
            writer.add_tensor(item.name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, target)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)

"""Loads an exported folder the way a stranger would, in an interpreter that knows torch and transformers only.

Usage: python -P selfcheck.py FOLDER OUT NUM_THREADS < TEXT
Writes the token ids of TEXT and their fp32 logits to OUT (safetensors); the exporter compares them with its own.
"""

from __future__ import annotations

import sys


def main(folder: str, out: str, num_threads: int, text: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(num_threads)
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ValueError:
        pass
    else:
        raise SystemExit(f"{folder} loads without its remote code: it would run without FATReLU")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, local_files_only=True
    ).eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    ours = sorted(m for m in sys.modules if m.split(".")[0] in ("prosparse_core", "kernels", "tasks"))
    assert not ours, f"the exported folder needs {ours}"
    save_file({"ids": ids, "logits": logits.contiguous()}, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.stdin.read())

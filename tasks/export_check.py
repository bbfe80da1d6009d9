"""Perplexity of an exported folder, loaded by its own code in a process that has seen nothing of the model before.

Usage: python -m tasks.export_check FOLDER < REQUEST; the last line of the output is the answer, both are JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prosparse_core.export import PREFIX, run_fresh

ROOT = Path(__file__).resolve().parent.parent


def token_perplexities(model: Any, tokenizer: Any, request: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The score of each corpus (the fields of ``tasks.evaluation.held_out.Score``) on the documents of the request.

    Args:
        request: held_out (folder of the mixture), precision, batch_size, limit (documents per corpus), max_length.
    """
    from tasks.evaluation.measure_held_out import measure_loaded

    found = measure_loaded(
        model,
        tokenizer,
        Path(request["held_out"]),
        choice=False,
        precision=request["precision"],
        batch_size=request["batch_size"],
        limit=request["limit"],
        max_length=request["max_length"],
    )
    return {s.corpus: asdict(s) for s in found.scores if s.corpus and s.metric == "token_perplexity"}


def in_fresh_process(folder: Path, request: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What ``token_perplexities`` finds after ``from_pretrained(folder, trust_remote_code=True)`` in a new process.

    Args:
        request: as above, with device and num_threads.

    Raises:
        ProSparseError: the process failed.
    """
    arguments = ["-m", "tasks.export_check", str(folder.resolve())]
    out = run_fresh(arguments, stdin=json.dumps(request), cwd=ROOT, what=f"measuring the exported folder {folder}")
    return json.loads(out.strip().splitlines()[-1])


def main(folder: str, request: Mapping[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(request["num_threads"])
    options = {"trust_remote_code": True, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).to(request["device"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    # The sparsity meter and the harness's rules go by the name of the dense architecture.
    model.config.model_type = model.config.model_type.removeprefix(PREFIX)
    print(json.dumps(token_perplexities(model, tokenizer, request)))


if __name__ == "__main__":
    main(sys.argv[1], json.load(sys.stdin))

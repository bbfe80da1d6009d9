"""What keeping documents apart costs a training step: with masks and without, in turns, on windows of random text.

    python tests/prosparse_core/document_mask_cost.py
    python tests/prosparse_core/document_mask_cost.py --seq-len 2048 --sequences 1 --pairs 10 --threads 2

The model has SmolLM2-135M's sizes and random weights: what a step costs does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from models import tiny, tokens

from prosparse_core.distributed.parallel import Forward
from prosparse_core.distributed.ranks import ALONE
from prosparse_core.document_masks import positions_of
from prosparse_core.loss import next_token_loss
from prosparse_core.precision import autocast, resolve
from prosparse_core.substitute import use_relu

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def measure(seq_len: int, sequences: int, document: int, pairs: int, sizes: dict[str, object]) -> dict[str, object]:
    """Medians over pairs of (masked / plain), whose order alternates, after one pair that does not count."""
    model = tiny(**sizes).train()
    use_relu(model)
    forward, precision = Forward(model, ALONE), resolve("auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    x = tokens(batch=sequences, length=seq_len, vocab=model.config.vocab_size)
    begins = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 1 / document
    positions = positions_of(begins)

    def timed(is_masked: bool) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        with autocast(precision):
            logits = forward(x, positions if is_masked else None)
        (next_token_loss(logits, x) / x.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.process_time() - cpu, time.perf_counter() - wall

    found: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for turn in range(pairs + 1):
        order = (True, False) if turn % 2 else (False, True)
        both = {is_masked: timed(is_masked) for is_masked in order}
        found.append((both[True], both[False]))
    found = found[1:]
    said: dict[str, object] = {
        "seq_len": seq_len, "sequences": sequences, "documents": int((positions == 0).sum()), "precision": precision,
        "threads": torch.get_num_threads(), "pairs": pairs, "torch": torch.__version__,
    }  # fmt: skip
    for i, clock in enumerate(("cpu", "wall")):
        ratios = sorted(masked[i] / plain[i] for masked, plain in found)
        said |= {
            f"{clock}_ratio": statistics.median(ratios),
            f"{clock}_ratio_20": ratios[len(ratios) // 5],
            f"{clock}_ratio_80": ratios[-1 - len(ratios) // 5],
            f"{clock}_plain_s": statistics.median(plain[i] for _, plain in found),
            f"{clock}_masked_s": statistics.median(masked[i] for masked, _ in found),
        }
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--document", type=int, default=300, help="tokens of a document, on average")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    said = measure(options.seq_len, options.sequences, options.document, options.pairs, dict(SMOLLM2_135M))
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()

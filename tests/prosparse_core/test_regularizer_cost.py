"""What the regularizer adds to a training step, in CPU time of this process."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from models import tokens
from regularized import relu_model

from prosparse_core.loss import next_token_loss
from prosparse_core.precision import autocast, resolve
from prosparse_core.recipe_train import L1Reduction
from prosparse_core.regularizer import L1Regularizer

ROUNDS = 9
MOST = 1.10
"""The aim is 1.03 on a real model; a busy machine and a smaller model leave this much room."""
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}


@pytest.mark.slow
def test_a_regularized_step_costs_little_more_than_a_plain_one(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratio, plain_s = _measure()
    finally:
        torch.set_num_threads(threads)
    with capsys.disabled():
        print(f" [a regularized step costs {ratio:.3f} of a plain one of {plain_s:.2f} s] ", end="")
    assert ratio <= MOST


def _measure() -> tuple[float, float]:
    """Median over rounds of regularized / plain, taken one right after the other in alternating order."""
    model = relu_model(**SIZES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    x = tokens(batch=2, length=256, vocab=4096)
    precision = resolve("auto")

    def step() -> None:
        with autocast(precision):
            logits = model(input_ids=x, use_cache=False).logits
        (next_token_loss(logits, x) / x.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def timed(is_regularized: bool) -> float:
        if not is_regularized:
            began = time.process_time()
            step()
            return time.process_time() - began
        with L1Regularizer(model, L1Reduction()) as regularizer:
            regularizer.l1_lambda = 0.1
            began = time.process_time()
            step()
            regularizer.collect()
            return time.process_time() - began

    step()
    rounds = []
    for i in range(ROUNDS):
        found = {kind: timed(kind) for kind in ((False, True) if i % 2 else (True, False))}
        rounds.append((found[True] / found[False], found[False]))
    return statistics.median(r for r, _ in rounds), statistics.median(s for _, s in rounds)

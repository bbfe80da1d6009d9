"""A small, slow PowerInfer of our own: it computes what the file says, in fp32, and nothing of how it was written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prosparse_core.formats.powerinfer_file import GGUF, read_gguf
from prosparse_core.powerinfer import THRESHOLD_KEY


class PowerInferModel:
    """The function a file describes. Weights are read layer by layer, each time: memory is one layer and the head."""

    def __init__(self, path: Path) -> None:
        self._file: GGUF = read_gguf(path)
        self._heads = int(self._key("llama.attention.head_count"))
        self._kv_heads = int(self._key("llama.attention.head_count_kv"))
        self.num_layers = int(self._key("llama.block_count"))
        self.threshold = float(self._key(THRESHOLD_KEY, 0.0))
        self.predicted_sparsity: list[float] = []
        """Share of neurons not computed, by layer, of the newest forward pass; neurons added as padding count."""

    def _key(self, key: str, default: Any = None) -> Any:
        found = self._file.keys.get(key)
        return default if found is None else found.data

    def _weight(self, name: str) -> Tensor:
        return torch.from_numpy(self._file.tensor(f"{name}.weight"))

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens int64 [windows, length] -> [windows, length, vocabulary], every window on its own."""
        hidden = self._weight("token_embd")[tokens]
        self.predicted_sparsity = []
        for layer in range(self.num_layers):
            block = f"blk.{layer}"
            hidden = hidden + self._attention(block, self._norm(hidden, f"{block}.attn_norm"))
            hidden = hidden + self._ffn(block, hidden)
        return self._norm(hidden, "output_norm") @ self._weight("output").T

    def perplexity(self, windows: Sequence[Tensor]) -> float:
        """exp of the mean negative log-likelihood of every token but the first of each window [1, length]."""
        total, count = 0.0, 0
        for tokens in windows:
            scores = torch.log_softmax(self.logits(tokens)[:, :-1].double(), -1)
            total -= float(scores.gather(-1, tokens[:, 1:, None]).sum())
            count += tokens[:, 1:].numel()
        return math.exp(min(total / count, 700.0))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        eps = self._key("llama.attention.layer_norm_rms_epsilon")
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self._weight(name)

    def _attention(self, block: str, x: Tensor) -> Tensor:
        windows, length, d_model = x.shape
        q, k, v = (x @ self._weight(f"{block}.attn_{name}").T for name in ("q", "k", "v"))
        q, k, v = (t.view(windows, length, -1, d_model // self._heads).transpose(1, 2) for t in (q, k, v))
        q, k = self._rotate(q), self._rotate(k)
        k, v = (t.repeat_interleave(self._heads // self._kv_heads, dim=1) for t in (k, v))
        weights = q @ k.transpose(-1, -2) / math.sqrt(d_model // self._heads)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = torch.softmax(weights.masked_fill(future, -math.inf), -1) @ v
        return mixed.transpose(1, 2).reshape(windows, length, d_model) @ self._weight(f"{block}.attn_output").T

    def _rotate(self, x: Tensor) -> Tensor:
        """Pairs of neighbours (2i, 2i + 1) turn by position * base ** (-2i / n): x [windows, heads, length, n]."""
        width = int(self._key("llama.rope.dimension_count"))
        base = float(self._key("llama.rope.freq_base", 10000.0))
        frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angle = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * frequency
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(turned, -1).flatten(-2)

    def _ffn(self, block: str, residual: Tensor) -> Tensor:
        """The predictor reads the residual as it is; gate and up read it behind the norm."""
        score = torch.relu(residual @ self._weight(f"{block}.fc1").T) @ self._weight(f"{block}.fc2").T
        computed = score >= self.threshold
        self.predicted_sparsity.append(1.0 - float(computed.float().mean()))
        x = self._norm(residual, f"{block}.ffn_norm")
        x1 = torch.relu(x @ self._weight(f"{block}.ffn_gate").T) * (x @ self._weight(f"{block}.ffn_up").T)
        return torch.where(computed, x1, 0.0) @ self._weight(f"{block}.ffn_down_t")

"""Room behind the keys and values of a cache: a token more is written there, instead of copying all that came before.

transformers grows a cache by concatenation, which for a batch of long prompts moves more bytes than a small model has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SPARE = 64
"""Tokens of room at a time: 1 / 64 of the copying is left."""


def give_room(cache: Any, dtype: torch.dtype | None = None) -> None:
    """Let the plain layers of a cache grow in place from now on; those with a window of their own stay as they are.

    Args:
        dtype: what attention casts keys and values to anyway; kept so, they are not cast again for every token.
    """
    from transformers.cache_utils import DynamicLayer

    for layer in getattr(cache, "layers", []):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layer.update = _Growing(layer, dtype)


class _Growing:
    """In place of a layer's ``update``: keys and values [batch, kv_heads, seq, head_dim] as views of longer buffers."""

    def __init__(self, layer: Any, dtype: torch.dtype | None) -> None:
        self.layer = layer
        self.buffers: dict[str, Tensor] = {}
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)

    def __call__(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.layer.keys = self._append("keys", self.layer.keys, key_states)
        self.layer.values = self._append("values", self.layer.values, value_states)
        return self.layer.keys, self.layer.values

    def _append(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        length, total = old.shape[2], old.shape[2] + new.shape[2]
        buffer = self.buffers.get(name)
        # Rows that were done have left: what is there is no longer the beginning of the buffer.
        is_its_beginning = buffer is not None and buffer.data_ptr() == old.data_ptr() and len(buffer) == len(old)
        if buffer is None or not is_its_beginning or buffer.shape[2] < total:
            buffer = self.buffers[name] = old.new_empty(*old.shape[:2], total + SPARE, old.shape[3])
            buffer[:, :, :length] = old
        buffer[:, :, length:total] = new
        return buffer[:, :, :total]

"""The sizes of a decoder as far as a recipe knows them, and how many weights they make."""

from __future__ import annotations

from dataclasses import dataclass

from prosparse_core.families import family_of
from prosparse_core.recipe import Model, Shape


def shape_of(model: Model) -> Shape | None:
    """The recipe's ``model.shape``, or what the config of a random model says; None when neither does."""
    if model.shape is not None:
        return model.shape
    c = model.config
    family = model.family or family_of({"model_type": model.source.removeprefix("random:")})
    try:
        return Shape(
            num_layers=c["num_hidden_layers"],
            d_model=c["hidden_size"],
            d_ff=c["intermediate_size"],
            vocab_size=c["vocab_size"],
            num_heads=c["num_attention_heads"],
            num_kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
            head_dim=c.get("head_dim"),
            tied=c.get("tie_word_embeddings", False),
            gated=family is None or family.is_gated,
        )
    except KeyError:
        return None


@dataclass(frozen=True)
class Weights:
    """Numbers of weights, biases ignored."""

    layer: int
    """Attention, FFN and two norms of one layer."""
    layer_matrices: int
    embedding: int
    head: int
    """The output head's own; 0 where it is the embedding."""
    all: int

    @classmethod
    def of(cls, s: Shape) -> Weights:
        matrices = 2 * s.d_model * (s.q_dim + s.kv_dim) + (3 if s.gated else 2) * s.d_model * s.d_ff
        layer = matrices + 2 * s.d_model
        embedding = s.vocab_size * s.d_model
        head = 0 if s.tied else embedding
        return cls(layer, matrices, embedding, head, s.num_layers * layer + embedding + head + s.d_model)

    @property
    def outside(self) -> int:
        """Embedding and output head."""
        return self.embedding + self.head

    def matrices(self, s: Shape) -> int:
        """Every weight that is multiplied with activations: the head's once, though it may be the embedding."""
        return s.num_layers * self.layer_matrices + self.embedding

    def trained(self, frozen_embeddings: bool) -> int:
        return self.all - (self.outside if frozen_embeddings else 0)

"""What the process of one rank holds in memory at its fullest, by term: derived from what torch keeps, not fitted.

A step has a few moments at which a process may be fullest; between them memory falls or rises steadily, so one of them
is the peak. n is the tokens of a forward pass, a matrix product's element has b bytes (2 under bf16 autocast, else 4),
d, q, k and f are d_model, the widths of queries and of keys, and d_ff.

Autograd keeps of a layer, a token, outside checkpointing:
  the stream and the normed stream of both norms                    16 d         always fp32, also under autocast
  the norms' outputs, which five matrices read                       8 d         under autocast instead 2 d for each
  queries, keys, values after rotation; attention's result       b (2 q + 2 k)   of grouped heads once, not repeated
  act(gate), up, x1                                                 3 b f        the regularizer keeps down's own x1
of an ungated layer act(up) alone, and four matrices' inputs. Under autocast every weight that is multiplied is kept
once more in bf16 until its backward is over. Of n x vocab logits: the logits themselves (b), which a variable holds
until the next pass, and their gradient (b); the loss reads them a few rows at a time. A teacher's logits are gone by
then; the gradient of the divergence from them comes on top, and the sum of both gradients.

Under FSDP2 a rank holds its share of weights, gradients and moments, and whole: embedding and head in fp32 from the
first forward to the last backward, with their gradients and the buffer these are reduced from; of the layers, in b, the
one at work and the next, each with the buffer it is gathered into, and the gradient of one.

On a CPU glibc gives blocks above 32 MiB back at once, and keeps what smaller ones needed at most: the smaller blocks of
one moment are still resident in all others, and not all holes between those that stay can be filled again. (Told by
MALLOC_MMAP_THRESHOLD_ to give every block back, two trainings of 10 M weights took 1.2 and 1.4 % more than is planned
without that term.)
"""

from __future__ import annotations

from dataclasses import dataclass

from prosparse_core.memory import KEPT_BYTES
from prosparse_core.planning.hardware import GIB
from prosparse_core.planning.layout import Layout
from prosparse_core.planning.shapes import Weights
from prosparse_core.precision import Precision
from prosparse_core.recipe_machine import Shape

CPU_FRAMEWORK_BYTES = 470 * 2**20
"""A process that has loaded torch and transformers and trained 10 K weights (measured: Linux, torch 2.13)."""
GPU_FRAMEWORK_BYTES = 1 * GIB
"""CUDA context, cuBLAS and NCCL buffers: an assumption."""
USABLE = 0.95
"""Of a device's memory: the rest is lost to the allocator's fragments."""
HOLES = 0.4
"""Of what the smaller blocks need at most: lost between them, as moments and gradients settle where activations were.
Measured in eight trainings of 10 to 135 M weights: 0.2 to 0.65."""


@dataclass(frozen=True)
class Training:
    """What of a recipe decides memory."""

    shape: Shape
    seq_len: int
    precision: Precision
    frozen_embeddings: bool
    teacher: bool
    """A stage distils from the dense original."""


@dataclass(frozen=True)
class Memory:
    """The fullest moment of a rank."""

    moment: str
    terms: dict[str, int]
    """Bytes by term; terms of 0 are left out."""
    host_bytes: int
    """On GPUs: what the first node needs besides, in its own memory, to write checkpoints and what a stage leaves."""

    @property
    def total(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class _Blocks:
    """``count`` allocations of one size."""

    term: str
    size: float
    count: float = 1

    @property
    def total(self) -> float:
        return self.size * self.count


def memory(training: Training, layout: Layout) -> Memory:
    """The moment at which a rank's process (on GPUs: its device) is fullest; see the module."""
    weights, on_gpu = Weights.of(training.shape), layout.device.is_gpu
    moments = _moments(training, layout)
    shards = layout.world if layout.parallel == "fsdp" else 1
    always = {
        "framework": float(GPU_FRAMEWORK_BYTES if on_gpu else CPU_FRAMEWORK_BYTES),
        "weights": 4 * weights.all / shards,
        "optimizer": 8 * weights.trained(training.frozen_embeddings) / shards,
        "teacher": 4.0 * weights.all if training.teacher else 0.0,
        "checkpoint copy": 0.0 if on_gpu else _checkpoint(training) / layout.world,
    }

    def small(blocks: list[_Blocks]) -> float:
        return 0.0 if on_gpu else sum(b.total for b in blocks if b.size <= KEPT_BYTES)

    most_small = max(small(blocks) for blocks in moments.values())
    found = []
    for moment, blocks in moments.items():
        terms = dict(always)
        for block in blocks:
            terms[block.term] = terms.get(block.term, 0.0) + block.total
        terms["kept by the allocator"] = (1 + HOLES) * most_small - small(blocks)
        whole = {term: round(size) for term, size in terms.items() if round(size)}
        found.append(Memory(moment, whole, _host(training, layout)))
    return max(found, key=lambda m: m.total)


def _moments(training: Training, layout: Layout) -> dict[str, list[_Blocks]]:
    """What is there besides weights and optimizer at every moment that may be the fullest."""
    s, weights = training.shape, Weights.of(training.shape)
    fsdp = layout.parallel == "fsdp"
    bf16 = training.precision == "bf16"
    b, n = (2 if bf16 else 4), layout.sequences * training.seq_len
    logits, matrix = n * s.vocab_size, s.d_model * s.d_ff
    trains_embedding = not training.frozen_embeddings

    embeddings = [4 * weights.embedding] * (1 + bool(weights.head)) if trains_embedding else []
    shards = layout.world if fsdp else 1
    per_matrix = s.num_layers * weights.layer / matrix
    gradients = [
        _Blocks("gradients", 4 * matrix / shards, per_matrix),
        *(_Blocks("gradients", e / shards) for e in embeddings),
    ]
    # DDP's buckets are there from the first step on; else gradients are there before a pass only when they accumulate.
    before = gradients if layout.passes > 1 or layout.parallel == "ddp" else []
    layer = _layer(s, n, b)
    stream = 4 * n * s.d_model
    kept = [_Blocks("activations", stream, 2), _Blocks("activations", b * n * s.d_model)]
    if layout.gradient_checkpointing:
        kept.append(_Blocks("activations", stream, s.num_layers))
    else:
        kept += [_Blocks("activations", k.size, k.count * s.num_layers) for k in layer]
    casts = []
    if bf16 and not fsdp:
        casts = [_Blocks("bf16 copies", 2 * matrix, s.num_layers * weights.layer_matrices / matrix)]
    head_cast = [_Blocks("bf16 copies", 2 * weights.embedding)] if bf16 else []
    kept_casts = head_cast if layout.gradient_checkpointing else casts + head_cast
    again = [_Blocks("workspace", k.size, k.count) for k in layer] if layout.gradient_checkpointing else []
    backward = [
        _Blocks("workspace", b * n * s.d_ff, 4),
        _Blocks("workspace", 4 * n * s.d_model, 2),
        _Blocks("workspace", 4 * matrix),
        *([_Blocks("workspace", 2 * matrix)] if bf16 else []),
    ]
    gathered = _gathered(weights, b) if fsdp else []
    held = _Blocks("logits", b * logits)
    loss = [held, held]
    if training.teacher:
        loss += [held, held]
    head_gradient = [_Blocks("gradients", 4 * weights.embedding)] if trains_embedding else []
    # The embedding's gradient is dense, and made beside the one it is added to: the head's, or an earlier pass's.
    beside = [_Blocks("workspace", 4 * weights.embedding)] if trains_embedding and (s.tied or before) else []
    if fsdp and trains_embedding:
        beside.append(_Blocks("gathered weights", 4 * weights.outside, 2))
    # safetensors copies every tensor before it writes the first.
    copied = [
        ("checkpoint buffers", 4 * matrix, per_matrix),
        ("checkpoint buffers", 4 * weights.embedding, 1 + bool(weights.head)),
    ]
    written = [] if layout.device.is_gpu else [_Blocks(*c) for c in copied]
    if fsdp and not layout.device.is_gpu:
        written.append(_Blocks("checkpoint buffers", _checkpoint(training)))
    return {
        "the forward pass ends": [*before, *kept, held, *casts, *head_cast, *gathered],
        "the loss goes backward": [*before, *kept, *loss, *kept_casts, *gathered],
        "the output head goes backward": [
            *before, *kept, held, held, *head_gradient, *kept_casts, *again, *backward, *gathered
        ],
        "the first layer goes backward": [*gradients, *layer, held, *backward, *gathered],
        "the embedding goes backward": [*gradients, held, *beside, *gathered],
        "the weights are written": written,
    }  # fmt: skip


def _layer(s: Shape, n: int, b: int) -> list[_Blocks]:
    """What autograd keeps of one layer after a forward pass of ``n`` tokens."""
    readers, hidden, normed = (5, 3, 4) if s.gated else (4, 1, 2)  # LayerNorm keeps its input and two numbers a token
    copies = readers if b == 2 else 2
    return [
        _Blocks("activations", 4 * n * s.d_model, normed),
        _Blocks("activations", b * n * s.d_model, copies),
        _Blocks("activations", b * n * s.q_dim, 2),
        _Blocks("activations", b * n * s.kv_dim, 2),
        _Blocks("activations", b * n * s.d_ff, hidden),
    ]


def layer_bytes(s: Shape, n: int, precision: Precision) -> float:
    """What autograd keeps of one layer after a forward pass of ``n`` tokens."""
    return sum(blocks.total for blocks in _layer(s, n, 2 if precision == "bf16" else 4))


def _gathered(weights: Weights, b: int) -> list[_Blocks]:
    """What FSDP2 holds whole, beside gradients of embedding and head; see the module."""
    return [
        _Blocks("gathered weights", 4 * weights.outside),
        _Blocks("gathered weights", b * weights.layer, 5),
        _Blocks("gathered weights", 4 * weights.layer),
    ]


def _checkpoint(training: Training) -> float:
    """Weights and moments: while a checkpoint is written in the background, each process holds a copy of its share."""
    weights = Weights.of(training.shape)
    return 4 * weights.all + 8 * weights.trained(training.frozen_embeddings)


def _host(training: Training, layout: Layout) -> int:
    """What a stage leaves, or a checkpoint, whichever is more: of these a node holds a copy of its processes' shares.

    One GPU's weights are copied to be written; of several, the first rank also collects weights and moments.
    """
    if not layout.device.is_gpu:
        return 0
    weights = Weights.of(training.shape)
    collected = round(_checkpoint(training)) if layout.world > 1 else 0
    return max(4 * weights.all + collected, round(_checkpoint(training) / layout.nodes))

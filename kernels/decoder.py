"""A generation loop in native code: one call a token, for LLaMA-like models at batch 1 (``decode.h``).

    model = DecoderModel(weights, torch.float16)
    decoder = Decoder(model, ffn="certified", capacity=512)
    for token in decoder.generate(prompt, max_new_tokens=100, stop={eos}): ...

The FFN is "dense" (every row is read), "exact" (dead rows are skipped), "certified" (gate rows that are provably dead
are skipped as well) or "predicted" (only the neurons that a low-rank predictor names are computed, which loses some).
The first three give the same bits, whatever the number of threads, and however many tokens share a call.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from kernels import cpu
from kernels.decoder_weights import DecoderModel, DecoderWeights, LayerWeights, PackedLayer
from kernels.reference import check_threshold
from kernels.sampling import Sampling

__all__ = ["FFNS", "Decoder", "DecoderModel", "DecoderWeights", "LayerWeights", "Sampling"]

FFNS = ("dense", "exact", "certified", "predicted")
_LINE_FLOATS = 16


class _Predictor(ctypes.Structure):
    """``struct Predictor`` of cpu_predict.h."""

    _fields_ = [
        ("fc1", ctypes.c_void_p),
        ("fc2", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("hidden", ctypes.c_int64),
        ("pre_norm", ctypes.c_int64),
        ("cutoff", ctypes.c_double),
    ]


class _Layer(ctypes.Structure):
    """``struct Layer`` of decode.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm", "qkv", "out", "qkv_bias", "out_bias")),
        *((name, ctypes.c_void_p) for name in ("query_norm", "key_norm", "keys", "values")),
        ("window", ctypes.c_int64),
        ("threshold", ctypes.c_double),
        ("predictor", ctypes.POINTER(_Predictor)),
        ("ffn", cpu.Plan),
    ]


class _Decoder(ctypes.Structure):
    """``struct Decoder`` of decode.h."""

    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_int64) for name in ("num_layers", "d_model", "heads", "kv_heads", "head_dim", "vocab")),
        *((name, ctypes.c_int64) for name in ("capacity", "num_threads", "dtype", "silu")),
        *((name, ctypes.c_void_p) for name in ("embedding", "lm_head", "final_norm", "cos", "sin")),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
        *((name, ctypes.c_void_p) for name in ("x", "normed", "y", "qkv", "mixed", "scores", "logits")),
    ]


class Decoder:
    """One sequence over shared weights, with a key-value cache of ``capacity`` positions.

    ``length`` positions are in use. ``num_live`` neurons lived in the last call and ``num_gates`` gates were computed
    for it, summed over layers and tokens. ValueError on a wrong argument, on tokens the model does not have, on more
    than the cache holds, and where numbers overflow; RuntimeError where the kernels cannot be built.
    """

    def __init__(
        self,
        model: DecoderModel,
        *,
        ffn: str = "exact",
        capacity: int | None = None,
        num_threads: int = 1,
        thresholds: Sequence[float] | None = None,
        cutoffs: Sequence[float] | None = None,
        cache_of: Decoder | None = None,
    ) -> None:
        """``thresholds``: others than the model's own, one a layer. ``cutoffs``: of the predictors, the probability
        from which on a neuron is computed, one a layer; for "predicted" alone, 0.5 by default. ``cache_of``: another
        decoder of the same model and capacity whose memory for keys and values is this one's too; both may take turns
        at one position, each of them writing it before it is read."""
        if ffn not in FFNS:
            raise ValueError(f"ffn is {ffn!r}: one of {', '.join(FFNS)}")
        if model.activation == "silu" and ffn != "dense":
            raise ValueError(f"ffn is {ffn!r}: SiLU has no zeros to skip; only dense is possible")
        if ffn == "predicted" and not model.has_predictors:
            raise ValueError("ffn is 'predicted', but the model has no predictors")
        if cutoffs is not None and ffn != "predicted":
            raise ValueError(f"cutoffs belong to ffn='predicted', not to {ffn!r}")
        self.model, self.ffn, self.num_threads = model, ffn, num_threads
        self.capacity = model.max_positions if capacity is None else capacity
        if not 1 <= self.capacity <= model.max_positions:
            raise ValueError(f"capacity is {capacity}: 1 to {model.max_positions}, the positions the model was given")
        self.thresholds = [check_threshold(t) for t in _per_layer("thresholds", thresholds, model.thresholds)]
        self.cutoffs = _per_layer("cutoffs", cutoffs, [0.5] * model.num_layers)
        self._library = cpu.load()
        self._library.check_threads(num_threads)
        self.length, self.num_live, self.num_gates = 0, 0, 0
        self._batch = self._library.batch
        if cache_of is not None and (cache_of.model is not model or cache_of.capacity != self.capacity):
            raise ValueError("a cache is shared by decoders of one model and one capacity")
        shape = (2, model.num_layers, model.num_kv_heads, self.capacity, model.head_dim)
        self._cache: Tensor = torch.zeros(shape) if cache_of is None else cache_of._cache
        self._fill()

    def _fill(self) -> None:
        """The C side of it: room for everything, and the addresses."""
        model, batch = self.model, self._batch
        d, heads, kv_heads = model.head_dim, model.num_heads, model.num_kv_heads
        room = {
            "x": batch * model.d_model,
            "normed": batch * model.d_model,
            "y": batch * model.d_model,
            "qkv": batch * (heads + 2 * kv_heads) * d,
            "mixed": batch * heads * d,
            "scores": self.num_threads * self.capacity,
            "logits": batch * model.vocab,
        }
        self._room = {name: torch.zeros(size) for name, size in room.items()}
        self._logits = self._room["logits"].view(batch, model.vocab)
        self._plans = _FFNPlans(self)
        layers = (_Layer * model.num_layers)()
        for i, (target, packed) in enumerate(zip(layers, model.layers, strict=True)):
            for name in ("attention_norm", "ffn_norm", "qkv", "out", "qkv_bias", "out_bias", "query_norm", "key_norm"):
                tensor = getattr(packed, name)
                setattr(target, name, None if tensor is None else tensor.data_ptr())
            target.keys, target.values = self._cache[0, i].data_ptr(), self._cache[1, i].data_ptr()
            target.window = model.windows[i] or 0
            target.threshold = self.thresholds[i]
            target.ffn = self._plans.of_layer(i)
            if self.ffn == "predicted":
                target.predictor = ctypes.pointer(self._plans.predictor(i))
        self._layers = layers
        self._decoder = _Decoder(
            layers=layers,
            num_layers=model.num_layers,
            d_model=model.d_model,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=d,
            vocab=model.vocab,
            capacity=self.capacity,
            num_threads=self.num_threads,
            dtype=cpu.WEIGHT_DTYPES.index(model.dtype),
            silu=model.activation == "silu",
            eps=model.eps,
            scale=model.scale,
            **{name: getattr(model, name).data_ptr() for name in ("embedding", "lm_head", "final_norm", "cos", "sin")},
            **{name: tensor.data_ptr() for name, tensor in self._room.items()},
        )
        self._address = ctypes.addressof(self._decoder)
        self._tokens = torch.zeros(batch, dtype=torch.int64)
        self._counts = torch.zeros(2, dtype=torch.int64)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Decoder holds addresses of this process: make another one of the same DecoderModel")

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens; the logits ``[V]`` of what follows the last one, float32."""
        return self._append(tokens, every=False)[0]

    def score(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens; the logits ``[len(tokens), V]`` of what follows each of them, float32."""
        return self._append(tokens, every=True)

    def _append(self, tokens: Sequence[int], *, every: bool) -> Tensor:
        self._check_tokens(tokens)
        if self.length + len(tokens) > self.capacity:
            raise ValueError(
                f"{len(tokens)} tokens after {self.length} do not fit into a cache of {self.capacity} positions; make "
                "the decoder with a larger capacity"
            )
        self.num_live = self.num_gates = 0
        found = []
        for start in range(0, len(tokens), self._batch):
            block = tokens[start : start + self._batch]
            is_last = start + len(block) == len(tokens)
            num_logits = len(block) if every else int(is_last)
            for i, token in enumerate(block):
                self._tokens[i] = token
            self._counts.zero_()
            stuck = self._library.decode(
                self._address, self._tokens.data_ptr(), len(block), self.length, num_logits, self._counts.data_ptr()
            )
            if stuck >= 0:
                raise ValueError(f"layer {stuck} gives a number that is not finite: its weights are too large")
            self.length += len(block)
            live, gates = self._counts.tolist()
            self.num_live += live
            self.num_gates += gates
            if num_logits:
                found.append(self._logits[:num_logits].clone())
        return found[0] if len(found) == 1 else torch.cat(found)

    @property
    def live_share(self) -> float:
        """Of the neurons, how many lived in the last call if it was of one token."""
        return self.num_live / sum(map(_width, self.model.layers))

    @property
    def bytes_read(self) -> int:
        """What the last call had to read if it was of one token: weights of the neurons it computed, cache, screens."""
        model, item = self.model, self.model.dtype.itemsize
        layers = model.layers
        read = sum(layer.qkv.nbytes + layer.out.nbytes for layer in layers) + model.lm_head.nbytes
        read += self.num_gates * model.d_model * item
        read += 2 * model.d_model * item * (sum(map(_width, layers)) if self.ffn == "dense" else self.num_live)
        if self.ffn == "certified":
            read += sum(gate.rows.nbytes + bounds.nbytes for gate, bounds in model.screens())
        if self.ffn == "predicted":
            read += sum(m.nbytes for layer in layers for m in (layer.fc1, layer.fc2) if m is not None)
        seen = sum(min(self.length, window or self.length) for window in model.windows)
        return read + 2 * seen * model.num_kv_heads * model.head_dim * self._cache.itemsize

    def rewind(self, length: int = 0) -> None:
        """Forget all positions from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} positions")
        self.length = length

    def copy_cache(self, other: Decoder) -> None:
        """Go on from where another decoder of the same model stands."""
        if other._cache.shape[1:3] != self._cache.shape[1:3] or other._cache.shape[4] != self._cache.shape[4]:
            raise ValueError("the other decoder is of another model")
        if other.length > self.capacity:
            raise ValueError(f"{other.length} positions do not fit into a cache of {self.capacity}")
        if self._cache is not other._cache:
            self._cache[:, :, :, : other.length] = other._cache[:, :, :, : other.length]
        self.length = other.length

    def fill_cache(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Go on from a prompt that something else has read: its keys, turned by their positions, and its values, one
        ``[kv_heads, n, head_dim]`` a layer."""
        model, length = self.model, keys[0].shape[1]
        shape = (model.num_kv_heads, length, model.head_dim)
        if any(part.shape != shape for part in (*keys, *values)) or not len(keys) == len(values) == model.num_layers:
            raise ValueError(f"keys and values must be {model.num_layers} of {list(shape)} each: one a layer")
        if length > self.capacity:
            raise ValueError(f"{length} positions do not fit into a cache of {self.capacity}")
        for i, parts in enumerate(zip(keys, values, strict=True)):
            for place, part in zip(self._cache[:, i], parts, strict=True):
                place[:, :length] = part
        self.length = length

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
    ) -> Iterator[int]:
        """Tokens after the prompt as they come: the likeliest ones, or drawn; a token of ``stop`` is the last one.

        The prompt is appended to what the cache holds. What cannot end well is refused at once, not at the first token.
        """
        self._check_tokens(prompt)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1")
        needed = self.length + len(prompt) + max_new_tokens - 1
        if needed > self.capacity:
            raise ValueError(
                f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones after {self.length} need {needed} "
                f"positions, the cache has {self.capacity}; make the decoder with a larger capacity"
            )
        return self._generate(prompt, max_new_tokens, sampling, frozenset(stop))

    def _generate(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling | None, stop: frozenset[int]
    ) -> Iterator[int]:
        generator = sampling.generator() if sampling else None
        tokens = prompt
        for _ in range(max_new_tokens):
            logits = self.feed(tokens)
            token = int(logits.argmax()) if sampling is None else sampling.choose(logits, generator)  # type: ignore[arg-type]
            yield token
            if token in stop:
                return
            tokens = (token,)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if len(tokens) == 0:
            raise ValueError("no tokens: a prompt needs at least one (a beginning-of-sequence token will do)")
        for place, token in enumerate(tokens):
            if not 0 <= token < self.model.vocab:
                raise ValueError(
                    f"token {int(token)} at place {place}: the model has tokens 0 to {self.model.vocab - 1}"
                )


class _FFNPlans:
    """The FFN's plan of every layer over scratch memory that all layers share; owns what the addresses point to."""

    def __init__(self, decoder: Decoder) -> None:
        model, threads = decoder.model, decoder.num_threads
        self._decoder = decoder
        widest = max(map(_width, model.layers))
        batch, parts = decoder._batch, decoder._library.parts if threads > 1 else 1
        self._stride = -(-model.d_model // _LINE_FLOATS) * _LINE_FLOATS
        self._memory = {
            "live_row": torch.zeros(widest, dtype=torch.int32),
            "live_value": torch.zeros(widest),
            "live_count": torch.zeros(2 * threads, dtype=torch.int64),
            "dense": torch.zeros(batch * widest),
            "partial": torch.zeros(parts * batch * self._stride),
        }
        self._screens = model.screens() if decoder.ffn == "certified" else None
        width = self._screens[0][0].rows.shape[1] if self._screens else 0
        self._screen_x = torch.zeros(2 * width, dtype=torch.uint8)
        hidden = [layer.fc1.shape[0] for layer in model.layers if layer.fc1 is not None]
        self._inner = torch.zeros(max(hidden, default=0))
        self._predictors: list[_Predictor] = []

    def of_layer(self, i: int) -> cpu.Plan:
        model, packed = self._decoder.model, self._decoder.model.layers[i]
        plan = cpu.Plan(
            w_gate=packed.w_gate.data_ptr(),
            w_up=packed.w_up.data_ptr(),
            w_down_t=packed.w_down_t.data_ptr(),
            d_ff=packed.w_gate.shape[0],
            d_model=model.d_model,
            num_threads=self._decoder.num_threads,
            dtype=cpu.WEIGHT_DTYPES.index(model.dtype),
            skip_dead=self._decoder.ffn != "dense",
            stride=self._stride,
            **{name: tensor.data_ptr() for name, tensor in self._memory.items()},
        )
        if self._screens:
            gate, bounds = self._screens[i]
            plan.screen, plan.screen_width = gate.rows.data_ptr(), gate.rows.shape[1]
            plan.bounds, plan.screen_x = bounds.data_ptr(), self._screen_x.data_ptr()
            plan.screen_floor = gate.floor(model.d_model)
        return plan

    def predictor(self, i: int) -> _Predictor:
        packed = self._decoder.model.layers[i]
        assert packed.fc1 is not None
        assert packed.fc2 is not None
        made = _Predictor(
            fc1=packed.fc1.data_ptr(),
            fc2=packed.fc2.data_ptr(),
            inner=self._inner.data_ptr(),
            hidden=packed.fc1.shape[0],
            pre_norm=self._decoder.model.pre_norm,
            cutoff=_logit(self._decoder.cutoffs[i]),
        )
        self._predictors.append(made)
        return made


def _width(layer: PackedLayer) -> int:
    return layer.w_gate.shape[0]


def _logit(probability: float) -> float:
    """The score whose sigmoid is ``probability``: infinite at 0 and 1."""
    if probability <= 0.0 or probability >= 1.0:
        return -math.inf if probability <= 0.0 else math.inf
    return math.log(probability / (1.0 - probability))


def _per_layer(name: str, given: Sequence[float] | None, default: Sequence[float]) -> list[float]:
    values = [float(v) for v in (default if given is None else given)]
    if len(values) != len(default):
        raise ValueError(f"{len(values)} {name} for {len(default)} layers")
    if any(math.isnan(v) for v in values):
        raise ValueError(f"{name} are {values}: one is not a number")
    return values

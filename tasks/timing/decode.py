"""Decoding timed token by token, every way of it in turn: transformers, and the native loop with each kind of FFN.

All are fed the tokens that transformers chooses. Within a mask source and dtype the native ways must give equal bits,
and the dense one the logits of transformers; what fails that is not timed any further, and gets no speed-up.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tasks.timing.native_decode import native_model
from tasks.timing.thresholds import SwitchedThresholds

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from kernels.decoder import Decoder, DecoderModel
    from prosparse_core.prediction.input import Input
    from prosparse_core.predictor import LayerPredictor

MIN_ROUNDS = 8
EXACT_TOLERANCE = 1e-4
"""Relative error of the logits in float32 where nothing jumps: with ReLU, which is FATReLU at threshold 0, or SiLU."""
TYPICAL_TOLERANCE = {"float32": 1e-2, "float16": 5e-2, "bfloat16": 1e-1}
"""The same of the median token, with the model's thresholds and against float32 weights. Above a threshold of 0 the
activation jumps, and rounding flips a neuron now and then, in transformers too: a few per cent of a token's logits."""
ANY_TOLERANCE = 0.25
"""Of every single token."""
BETWEEN_ROUNDS = 4
CHECK_TOKENS = 4
"""Tokens of a prompt on which a way is compared with its reference before it is timed."""
RECORDED, RAISED = "recorded", "raised"
LOSSLESS = ("exact", "certified")
Report = Callable[[float, float], None]


@dataclass(eq=False)
class Way:
    """One way to decode, and what was measured of it; the times are seconds per token."""

    provider: str
    dtype: str
    mask_source: str | None
    """None: no neuron is dead by design."""
    step: Callable[[int], Tensor]
    """Takes a token, gives the logits [vocab] of what follows."""
    begin: Callable[[Tensor], None] | None = None
    """Reads a prompt [1, n]; None for the ways of the model itself, which begin together."""
    decoder: Decoder | None = None
    cutoff: float | None = None
    every: int = 1
    """It takes its turn every so many rounds."""
    seconds: list[float] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    """Share of neurons that lived, by token; empty for what is not native."""
    bytes_read: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    """Relative error of the logits against transformers, by token."""
    rel_err: float | None = None
    problem: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Peers:
    """What is timed beside the model's own float32 weights at its own thresholds."""

    raised: Sequence[float] | None = None
    """Thresholds raised for timing only."""
    sixteen: torch.dtype | None = None
    """The type of a 16-bit copy of the weights."""
    predictors: Sequence[LayerPredictor] = ()
    source: Input = "post_norm"
    cutoffs: Sequence[float] = ()
    others: Sequence[Way] = ()
    """Ways of other weights or programs; their logits are their own. They are copied: those given measure nothing."""


def time_ways(
    model: nn.Module,
    thresholds: Sequence[float],
    prompts: Sequence[Tensor],
    peers: Peers,
    *,
    num_new: int,
    threads: int,
    budget_s: float,
    progress: Report | None = None,
    packed: Sequence[DecoderModel] | None = None,
    once: bool = False,
    between: Callable[[], None] | None = None,
) -> list[Way]:
    """Decode prompts [1, n], all ways in turns, until the budget is used and ``MIN_ROUNDS`` are made.

    One thread is timed by the CPU time of the process, several by the wall clock. The model runs ``thresholds`` (zeros
    for ReLU, or for SiLU, which has the dense ways only).

    Args:
        packed: the weights as :func:`pack_models` makes them, for several calls.
        once: the prompts are long: each is read once, by transformers, whose keys and values all others go on from, and
            decoded from once. Reading it is not in the budget.
        between: called between rounds, every ``BETWEEN_ROUNDS``.

    Raises:
        BadInput, EnvironmentProblem: the native decoder cannot take the model; see :mod:`tasks.timing.native_decode`.
    """
    began, rounds = time.monotonic(), 0
    capacity = max(p.shape[1] for p in prompts) + num_new
    packed = pack_models(model, peers, capacity) if packed is None else packed
    with _Field(model, thresholds, peers, packed, capacity, threads, once) as found:
        for prompt in prompts if once else itertools.cycle(prompts):
            found.start(prompt)
            began = time.monotonic() if once and not rounds else began
            for _ in range(num_new):
                if rounds >= MIN_ROUNDS and time.monotonic() - began > budget_s:
                    return found.finish()
                found.round(rounds)
                rounds += 1
                if progress:
                    progress(min(time.monotonic() - began, budget_s), budget_s)
                if between and rounds % BETWEEN_ROUNDS == 0:
                    between()
        return found.finish()


def pack_models(model: nn.Module, peers: Peers, capacity: int) -> list[DecoderModel]:
    """The weights for native decoders of up to ``capacity`` positions: in float32, and in 16 bits where asked for.

    Raises:
        BadInput, EnvironmentProblem: see :func:`tasks.timing.native_decode.native_model`.
    """
    import torch

    settings: dict[str, Any] = {"capacity": capacity, "source": peers.source}
    packed = [native_model(model, dtype=torch.float32, predictors=peers.predictors, **settings)]
    return packed + ([] if peers.sixteen is None else [native_model(model, dtype=peers.sixteen, **settings)])


class _Field:
    """Everything that decodes, in step. A context manager: leaving it gives the model its activations back."""

    def __init__(
        self,
        model: nn.Module,
        thresholds: Sequence[float],
        peers: Peers,
        packed: Sequence[DecoderModel],
        capacity: int,
        threads: int,
        once: bool,
    ) -> None:
        self._capacity, self._once = capacity, once
        self._caches: dict[tuple[str, str | None, bool], Decoder] = {}
        self._model, self._thresholds, self._peers, self._threads = model, thresholds, peers, threads
        self._timer: Any = "process_cpu" if threads == 1 else "wall"
        self._clock = time.process_time if threads == 1 else time.perf_counter
        self._switch = None if packed[0].activation == "silu" else SwitchedThresholds(model)
        self._reference = Way("transformers_dense", "float32", RECORDED, self._step_reference)
        self.ways = [self._reference]
        if peers.raised is not None:
            self.ways.append(Way("transformers_dense", "float32", RAISED, self._step_raised, every=2))
        for one in packed:
            self.ways += self._native(one, RECORDED, None)
            if peers.raised is not None:
                self.ways += self._native(one, RAISED, peers.raised)
        self.ways += self._predicted(packed[0])
        self.ways += [
            Way(w.provider, w.dtype, w.mask_source, w.step, w.begin, w.decoder, note=w.note) for w in peers.others
        ]

    def __enter__(self) -> _Field:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._switch is not None:
            self._switch.undo()

    def _native(self, packed: DecoderModel, mask_source: str, thresholds: Sequence[float] | None) -> list[Way]:
        kinds = ("dense",) if packed.activation == "silu" else ("dense", *LOSSLESS)
        return [self._way(f"native_{kind}", packed, mask_source, ffn=kind, thresholds=thresholds) for kind in kinds]

    def _predicted(self, packed: DecoderModel) -> list[Way]:
        ways = []
        for cutoff in self._peers.cutoffs:
            way = self._way("native_predicted", packed, RECORDED, ffn="predicted", cutoffs=[cutoff] * packed.num_layers)
            way.cutoff = cutoff
            ways.append(way)
        return ways

    def _way(self, provider: str, packed: DecoderModel, mask_source: str, **settings: Any) -> Way:
        from kernels.decoder import Decoder

        dtype = str(packed.dtype).removeprefix("torch.")
        # Long caches are dear: ways that compute the same bits, and predictors, whose logits nothing is held against
        # by then, write one in turns.
        key = (dtype, mask_source, "cutoffs" in settings)
        shared = self._caches.get(key) if self._once else None
        decoder = Decoder(packed, num_threads=self._threads, capacity=self._capacity, cache_of=shared, **settings)
        self._caches.setdefault(key, decoder)
        return Way(provider, dtype, mask_source, lambda token: decoder.feed((token,)), decoder=decoder)

    def start(self, prompt: Tensor) -> None:
        """Everything at the end of a prompt: one native decoder of each dtype reads it, the others copy its cache."""
        from prosparse_core.decode import GreedyDecoder

        self._use(self._thresholds)
        self._chosen = GreedyDecoder(self._model, prompt, self._timer)
        if self._peers.raised is not None:
            self._use(self._peers.raised)
            self._other = self._chosen.fork() if self._once else GreedyDecoder(self._model, prompt, self._timer)
        handed = self._chosen.keys_and_values() if self._once else None
        read: dict[str, Decoder] = {}
        for way in self.ways:
            if way.begin is not None:
                way.begin(prompt)
            if way.begin is not None or way.decoder is None:
                continue
            if not way.seconds and not way.problem:  # the first prompt
                first = prompt[:, :CHECK_TOKENS]
                if way.cutoff is not None:
                    self._check_mask(way, first)
                elif (way.provider, way.dtype, way.mask_source) == ("native_dense", "float32", RECORDED):
                    self._check_without_jumps(way, first)
            way.decoder.rewind()
            if handed is not None:
                way.decoder.fill_cache(*handed)
            elif way.dtype in read:
                way.decoder.copy_cache(read[way.dtype])
            else:
                way.decoder.feed(prompt[0].tolist())
                read[way.dtype] = way.decoder

    def round(self, number: int) -> None:
        """One token through every way; who begins changes from round to round."""
        token = self._chosen.tokens[-1]
        found: dict[tuple[str, str, str | None], Tensor] = {}
        elsewhere: list[tuple[Way, Tensor]] = []
        turns = [way for way in self.ways if not way.problem and number % way.every == 0]
        first = number % len(turns)
        for way in turns[first:] + turns[:first]:
            if way.provider == "transformers_dense":
                self._use(self._peers.raised if way.mask_source == RAISED else self._thresholds)
            began = self._clock()
            logits = way.step(token)
            int(logits.argmax())
            way.seconds.append(self._clock() - began)
            if way.decoder is not None:
                way.live.append(way.decoder.live_share)
                way.bytes_read.append(way.decoder.bytes_read)
            if way.begin is not None:
                elsewhere.append((way, logits))
            elif way.cutoff is None:
                found[way.provider, way.dtype, way.mask_source] = logits
        for way in turns:
            if way.begin is None and way.decoder is not None and way.cutoff is None:
                self._judge(way, found)
        own = next((logits for way, logits in elsewhere if way.decoder is not None), None)
        for way, logits in elsewhere:
            if own is not None and way.decoder is None:
                way.errors.append(relative_error(logits, own))

    def _judge(self, way: Way, found: dict[tuple[str, str, str | None], Tensor]) -> None:
        import torch

        logits = found[way.provider, way.dtype, way.mask_source]
        dense = found.get(("native_dense", way.dtype, way.mask_source))
        if way.provider != "native_dense" and (dense is None or not torch.equal(logits, dense)):
            way.problem = "its logits are not, to the bit, those of the dense loop"
            return
        if way.mask_source != RECORDED:  # transformers stands at another token there: every other round is its own
            way.rel_err, way.note = 0.0, "error against our own dense loop"
            return
        error = relative_error(logits, found["transformers_dense", "float32", RECORDED])
        way.errors.append(error)
        if not error <= ANY_TOLERANCE:
            way.problem = f"its logits differ from transformers' by {error:.2g} relative"

    def finish(self) -> list[Way]:
        """The ways, those judged by what is typical of them."""
        for way in self.ways:
            if not way.errors or way.problem:
                continue
            way.rel_err = statistics.median(way.errors)
            if way.rel_err > TYPICAL_TOLERANCE[way.dtype]:
                other = "transformers'" if way.begin is None else "those of our loop on the same weights"
                way.problem = f"its logits differ from {other} by {way.rel_err:.2g} relative in the median token"
        return self.ways

    def _check_without_jumps(self, way: Way, tokens: Tensor) -> None:
        """The dense float32 loop against transformers, both with ReLU; SiLU has no thresholds to leave out."""
        import torch

        from kernels.decoder import Decoder

        assert way.decoder is not None
        zeros = [0.0] * len(self._thresholds)
        self._use(zeros)
        with torch.inference_mode():
            truth: Tensor = self._model(input_ids=tokens, logits_to_keep=1).logits[0, -1]
        plain = Decoder(
            way.decoder.model, ffn="dense", capacity=tokens.shape[1], num_threads=self._threads, thresholds=zeros
        )
        error = relative_error(plain.feed(tokens[0].tolist()), truth)
        if not error <= EXACT_TOLERANCE:
            way.problem = f"without thresholds its logits differ from transformers' by {error:.2g} relative"
        self._use(self._thresholds)

    def _check_mask(self, way: Way, tokens: Tensor) -> None:
        """A predictor's way against the model with its x1 masked."""
        import torch

        from prosparse_core.prediction.mask import PredictedMask

        assert way.decoder is not None
        assert way.cutoff is not None
        self._use(self._thresholds)
        cutoffs = [way.cutoff] * len(self._peers.predictors)
        with PredictedMask(self._model, self._peers.predictors, cutoffs, self._peers.source), torch.inference_mode():
            truth: Tensor = self._model(input_ids=tokens, logits_to_keep=1).logits[0, -1]
        way.decoder.rewind()
        way.rel_err = relative_error(way.decoder.feed(tokens[0].tolist()), truth)
        way.note = "the predicted neurons alone are computed; error against the masked model"
        if not way.rel_err <= ANY_TOLERANCE:
            way.problem = f"its logits differ from those of the masked model by {way.rel_err:.2g} relative"

    def _step_reference(self, token: int) -> Tensor:
        self._chosen.step()
        return self._chosen.logits

    def _step_raised(self, token: int) -> Tensor:
        self._other.step(token)
        return self._other.logits

    def _use(self, thresholds: Sequence[float] | None) -> None:
        if self._switch is not None:
            assert thresholds is not None
            self._switch(thresholds)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over norm of the truth."""
    scale = float(truth.double().norm())
    return float((found.double() - truth.double()).norm()) / (scale or 1.0)

"""What a FATReLU threshold takes away of each FFN's output: CETT, and the thresholds that all take the same share.

CETT (arXiv 2411.02335, eq. 3) of the neurons D that a threshold t on the gate removes: the mean over tokens of
||W_down (x1 on D)|| / ||W_down x1|| with D = {i : s_i < t} and s = ReLU(gate(x)) (arXiv 2402.13516, eq. 3). The
original acts on |x1| times the norm of a column of W_down, which needs gate and up; a threshold on the gate alone lets
both up and down be skipped. Without a gate, s is what the activation sees, up(x), and only down is skipped.

An equal share of an FFN's output does not cost equally. Measured on SmolLM2-135M after ProSparse training: the first
and the last FFN make nearly all of the residual stream behind them, the others 7 to 19 % of it, so the same CETT hurts
most there. As shares of the residual stream, equal losses ask for almost the same t in every layer (0.05 to 0.18 around
0.11): one lambda for all layers has already made a unit of activation worth about as much in each. One threshold for
all layers is then hard to beat, so calibration measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prosparse_core.document_masks import forward_arguments
from prosparse_core.errors import BadInput
from prosparse_core.families import FFN, find_ffns
from prosparse_core.forward import last_logits_only
from prosparse_core.precision import Precision, autocast

NUM_CANDIDATES = 1024
"""Thresholds measured of each layer: quantiles of its live gates, so that neighbours are 0.1 % of them apart."""
MAX_WINDOWS = 64
Windows = tuple[Tensor, Tensor, Tensor | None]
"""Tokens, labels and positions (:mod:`prosparse_core.document_masks`) of a corpus."""


@dataclass(frozen=True)
class LayerCurve:
    """CETT of one layer at rising thresholds, as its running maximum: vectors can cancel, so CETT itself may dip."""

    thresholds: Tensor
    """float64 [candidates], rising strictly from 0."""
    cett: Tensor
    """float64 [candidates], from 0, never falling; all 0 where no token's FFN has an output."""
    num_tokens: int
    """Tokens whose FFN has an output: a share of nothing is not counted."""

    def largest_threshold(self, cett: float) -> float:
        """The largest candidate up to which no threshold takes away more than ``cett``; at least 0."""
        return float(self.thresholds[max(0, int(torch.searchsorted(self.cett, cett, right=True)) - 1)])


def thresholds_at(curves: Sequence[LayerCurve], cett: float) -> list[float]:
    """One threshold per layer, each the largest at which its layer loses at most ``cett``; 0 is ReLU everywhere."""
    return [curve.largest_threshold(cett) if cett > 0 else 0.0 for curve in curves]


@torch.inference_mode()
def measure_cett(
    model: nn.Module,
    windows: Sequence[Windows],
    *,
    precision: Precision,
    num_tokens: int = 512,
    batch_size: int = 4,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[LayerCurve]:
    """The CETT curve of every layer, on a sample of the calibration tokens.

    Beside the forward passes this takes, per token and layer, one product with the columns of W_down that are live;
    its memory is that of two matrices of W_down's size.

    Args:
        model: runs ReLU (thresholds of 0).
        windows: (tokens, labels, positions or None) of each corpus, all int64 [windows, seq_len]; see
            :mod:`prosparse_core.document_masks` for positions.
        num_tokens: positions to sample, evenly over windows of all corpora (``MAX_WINDOWS`` of them at most). Filler
            behind a window's last label is left out.

    Raises:
        BadInput: there is no window.
    """
    tokens, chosen, places = sample_positions(windows, num_tokens)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # Every batch takes windows from all over the list, so that the first one, which sets the candidates, is typical.
    num_batches = -(-len(tokens) // batch_size)
    with _Meter(model) as meter:
        for batch in range(num_batches):
            meter.mask = chosen[batch::num_batches].to(device)
            more = forward_arguments(model, None if places is None else places[batch::num_batches])
            with autocast(precision, device.type):
                x = tokens[batch::num_batches].to(device)
                model(input_ids=x, use_cache=False, **more, **last_logits_only(model))
            if on_batch:
                on_batch(batch + 1, num_batches)
        curves = meter.curves()
    model.train(was_training)
    return curves


def sample_positions(windows: Sequence[Windows], num_tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(tokens int64 [windows, seq_len], mask bool of the same shape with at most ``num_tokens`` places, evenly spread;
    the positions in their documents).

    Raises:
        BadInput: there is no window.
    """
    assert num_tokens > 0
    if not sum(len(tokens) for tokens, _, _ in windows):
        raise BadInput(
            "the calibration split has not one whole window",
            hint="raise data.calibration_tokens to at least data.seq_len, or add held-out text",
        )
    tokens, labels = torch.cat([part for part, _, _ in windows]), torch.cat([part for _, part, _ in windows])
    places = [part for _, _, part in windows if part is not None]
    assert len(places) in (0, len(windows))
    some = _spread(len(tokens), min(MAX_WINDOWS, num_tokens))
    positions = torch.cat(places)[some] if places else None
    tokens, labels = tokens[some], labels[some]
    # A position counts up to the last label of its window.
    counts = (labels != -100).flip(1).cumsum(1).flip(1) > 0
    counted = counts.flatten().nonzero().flatten()
    mask = torch.zeros(counts.numel(), dtype=torch.bool)
    mask[counted[_spread(len(counted), num_tokens)]] = True
    return tokens, mask.view_as(counts), positions


def _spread(length: int, most: int) -> Tensor:
    """At most ``most`` of ``range(length)``, evenly spaced."""
    return torch.arange(min(length, most)) * length // min(length, most) if length else torch.arange(0)


class _Meter:
    """Adds up CETT at each layer's candidates in every forward pass while open; changes nothing in the model."""

    def __init__(self, model: nn.Module) -> None:
        ffns = find_ffns(model)
        self.mask: Tensor | None = None
        """Bool [batch, seq_len]: the positions that count."""
        self._gates: dict[int, Tensor] = {}
        self._candidates: list[Tensor | None] = [None] * len(ffns)
        self._sums: list[Tensor] = [torch.zeros(0, dtype=torch.float64)] * len(ffns)
        self._tokens = [0] * len(ffns)
        self._handles = [f.activation.register_forward_pre_hook(self._on_gate(f)) for f in ffns]
        self._handles += [f.down.register_forward_pre_hook(self._on_down(f)) for f in ffns]

    def _on_gate(self, ffn: FFN) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._gates[ffn.layer] = self._chosen(args[0])

        return keep

    def _on_down(self, ffn: FFN) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(ffn, self._gates.pop(ffn.layer), self._chosen(args[0]))

        return add

    def _chosen(self, values: Tensor) -> Tensor:
        """The rows of the positions that count; some families hand their tokens on as [batch * seq, d_ff]."""
        assert self.mask is not None
        return values.view(*self.mask.shape, -1)[self.mask].float()

    def _add(self, ffn: FFN, gate_TF: Tensor, x1_TF: Tensor) -> None:
        candidates = self._candidates[ffn.layer]
        if candidates is None:
            candidates = self._candidates[ffn.layer] = candidates_of(gate_TF)
            self._sums[ffn.layer] = torch.zeros(len(candidates), dtype=torch.float64)
        columns_FD = ffn.down_weight.float().t().contiguous()
        for gate_F, x1_F in zip(gate_TF, x1_TF, strict=True):
            shares = removed_shares(gate_F, x1_F, columns_FD, candidates)
            if shares is not None:
                self._sums[ffn.layer] += shares.cpu()
                self._tokens[ffn.layer] += 1

    def curves(self) -> list[LayerCurve]:
        found = []
        for candidates, sums, tokens in zip(self._candidates, self._sums, self._tokens, strict=True):
            assert candidates is not None, "no forward pass was counted"
            found.append(LayerCurve(candidates.double().cpu(), (sums / max(1, tokens)).cummax(0).values, tokens))
        return found

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


def candidates_of(gate: Tensor, most: int = NUM_CANDIDATES) -> Tensor:
    """0 and at most ``most`` quantiles of the live (positive) values of ``gate``, rising strictly; float32 [n].

    Each is a value the gate took, so that comparing with it in the gate's own dtype needs no rounding.
    """
    live = gate[gate > 0]
    live = live[:: max(1, len(live) >> 20)].sort().values
    quantiles = live[len(live) - 1 - _spread(len(live), most).to(live.device)].unique()
    return torch.cat([quantiles.new_zeros(1), quantiles])


def removed_shares(gate_F: Tensor, x1_F: Tensor, columns_FD: Tensor, thresholds: Tensor) -> Tensor | None:
    """||W_down (x1 on D)|| / ||W_down x1|| of one token at every threshold, D = {i : gate_i < t}; float64 [thresholds].

    None where the output is zero. ``columns_FD`` [d_ff, d_model] is W_down transposed, all tensors are float32.
    """
    live = x1_F.nonzero().flatten()
    gates, order = gate_F[live].sort()
    live = live[order]
    # Row j: what the j + 1 neurons with the smallest gates add to the output.
    sums = (columns_FD[live] * x1_F[live, None]).cumsum(0)
    norms = torch.cat([sums.new_zeros(1), sums.norm(dim=1)]).double()
    if not bool(norms[-1] > 0):
        return None
    return norms[torch.searchsorted(gates, thresholds)] / norms[-1]

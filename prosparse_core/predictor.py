"""The activation predictor of a layer: d_model -> hidden -> d_ff, no bias, ReLU between (paper, App. C and F).

It sees x, the input of gate and up (or the residual stream before the norm), and says for every neuron how likely it is
active. Without biases a positive factor on x never changes the sign of a logit: at cutoff 0.5 the predictor decides the
same on x before its RMS normalisation, once the norm's weight is multiplied into the columns of ``fc1``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from prosparse_core.errors import BadInput
from prosparse_core.prediction.recording import LabelRule, LayerRecording

WEIGHT_DECAY = 0.01
DENSITY_OFFSET = 0.005
EVALUATE_BATCH = 1024
START_LOGITS = 2.0


class LayerPredictor(nn.Module):
    """``fc2(relu(fc1(x)))``: logits of a neuron being active. fc1 is [hidden, d_model], fc2 is [d_ff, hidden].

    ``generator`` decides the first weights, uniform in +-1/sqrt(inputs); the global random state is left alone.
    """

    def __init__(self, d_model: int, d_ff: int, hidden: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        generator = generator or torch.Generator()
        self.fc1 = nn.utils.skip_init(nn.Linear, d_model, hidden, bias=False)
        self.fc2 = nn.utils.skip_init(nn.Linear, hidden, d_ff, bias=False)
        for linear in (self.fc1, self.fc2):
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)

    @property
    def hidden(self) -> int:
        return self.fc1.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> logits [..., d_ff]."""
        return self.fc2(torch.relu(self.fc1(x)))


@dataclass(frozen=True)
class CutoffMetrics:
    """A predictor on ``num_tokens`` tokens, when ``probability >= cutoff`` means predicted active (paper, App. C)."""

    cutoff: float
    recall: float | None
    """Active neurons that were predicted active, of all active ones, summed over tokens; None if there were none."""
    predicted_sparsity: float
    """Share of all neurons, over tokens, that were predicted inactive."""
    true_sparsity: float
    num_tokens: int
    top_recall: float | None = None
    """Recall of the active neurons that rule top_p keeps, the largest of each token; None where none was recorded."""
    top_sparsity: float | None = None
    """Share of neurons that rule top_p does not count as active."""


def weighted_bce(logits: Tensor, active: Tensor, negative_weight: float) -> Tensor:
    """Mean binary cross entropy; an active neuron weighs 1, an inactive one ``negative_weight``.

    ``logits`` [tokens, d_ff], ``active`` the same shape, float 0 or 1.
    """
    weight = active + (1 - active) * negative_weight
    return nn.functional.binary_cross_entropy_with_logits(logits, active, weight=weight)


def train(
    recording: LayerRecording,
    *,
    hidden: int,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: str = "cpu",
    labels: LabelRule = "nonzero",
    negative_weight: float | None = None,
    start: LayerPredictor | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> LayerPredictor:
    """A predictor trained on one layer's recording; the same arguments give the same weights.

    AdamW with ``lr`` falling linearly to 0, on :func:`weighted_bce`. The recorded x is scaled to mean square 1 for
    training, and the scale goes into ``fc1`` at the end: the size of x differs between layers by a factor of five, and
    one ``lr`` must serve them all. Of the recording, one batch at a time is read.

    Args:
        labels: what counts as active.
        negative_weight: of an inactive neuron in the loss; None for the share of active neurons of the layer + 0.005,
            so that both classes weigh about the same in total and recall is preferred to precision.
        start: weights to begin with (of ``hidden`` numbers), up to one positive factor on the scores; None for random.
        on_epoch: called with the number of finished epochs and the mean loss of the last one.
    """
    generator = torch.Generator().manual_seed(layer_seed(seed, recording.layer))
    predictor = LayerPredictor(recording.inputs.shape[1], recording.d_ff, hidden, generator).to(device)
    if negative_weight is None:
        negative_weight = 1.0 - recording.inactive_share(labels) + DENSITY_OFFSET
    rms = _rms(recording.inputs)
    if start is not None:
        predictor.load_state_dict(start.state_dict())
        _scale_logits(predictor, recording.inputs[:EVALUATE_BATCH].to(device, torch.float32) / rms)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    num_steps = epochs * -(-recording.num_tokens // batch_size)
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(recording.num_tokens, generator=generator)
        losses = []
        for rows in order.split(batch_size):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / num_steps)
            logits = predictor(recording.inputs[rows].to(device, torch.float32) / rms)
            loss = weighted_bce(logits, recording.active(rows, labels).to(device, torch.float32), negative_weight)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            step += 1
        if on_epoch:
            on_epoch(epoch + 1, float(torch.stack(losses).mean()))
    with torch.no_grad():
        predictor.fc1.weight /= rms
    return predictor.cpu().eval()


@torch.no_grad()
def _scale_logits(predictor: LayerPredictor, x: Tensor) -> None:
    """Give the scores of x [tokens, d_model] the root mean square ``START_LOGITS``: sure of some, no further."""
    size = float(predictor(x).square().mean().sqrt())
    if size > 0:
        predictor.fc2.weight *= START_LOGITS / size


def _rms(inputs: Tensor) -> float:
    """The root of the mean square over all entries; 1 for a layer that only ever sees zeros."""
    total = sum(float(part.double().square().sum()) for part in inputs.split(EVALUATE_BATCH))
    return (total / inputs.numel()) ** 0.5 or 1.0


def layer_seed(seed: int, layer: int) -> int:
    """Every layer has random numbers of its own."""
    return seed * 100_003 + layer


@torch.inference_mode()
def evaluate(
    predictor: LayerPredictor, recording: LayerRecording, cutoffs: Sequence[float], device: str = "cpu"
) -> list[CutoffMetrics]:
    """The metrics at every cutoff, on tokens the predictor was not trained on; against both rules where recorded."""
    predictor.to(device)
    rules: list[LabelRule] = ["nonzero"] if recording.packed_top is None else ["nonzero", "top_p"]
    num_active = dict.fromkeys(rules, 0)
    hits = {rule: [0] * len(cutoffs) for rule in rules}
    predicted = [0] * len(cutoffs)
    for rows in torch.arange(recording.num_tokens).split(EVALUATE_BATCH):
        probability = torch.sigmoid(predictor(recording.inputs[rows].to(device, torch.float32)))
        chosen_at = [probability >= cutoff for cutoff in cutoffs]
        predicted = [n + int(chosen.sum()) for n, chosen in zip(predicted, chosen_at, strict=True)]
        for rule in rules:
            active = recording.active(rows, rule).to(device)
            num_active[rule] += int(active.sum())
            hits[rule] = [n + int((c & active).sum()) for n, c in zip(hits[rule], chosen_at, strict=True)]
    predictor.cpu()
    total = recording.num_tokens * recording.d_ff

    def recall(rule: LabelRule, i: int) -> float | None:
        return hits[rule][i] / num_active[rule] if num_active.get(rule) else None

    return [
        CutoffMetrics(
            cutoff=cutoff,
            recall=recall("nonzero", i),
            predicted_sparsity=1.0 - predicted[i] / total,
            true_sparsity=1.0 - num_active["nonzero"] / total,
            num_tokens=recording.num_tokens,
            top_recall=recall("top_p", i),
            top_sparsity=1.0 - num_active["top_p"] / total if "top_p" in rules else None,
        )
        for i, cutoff in enumerate(cutoffs)
    ]


def layer_file(folder: Path, layer: int) -> Path:
    """Where the predictor of a layer lies: safetensors with ``fc1.weight`` and ``fc2.weight``, fp32."""
    return folder / f"layer_{layer}.safetensors"


def save(predictor: LayerPredictor, folder: Path, layer: int) -> None:
    """Write a layer's predictor; the file appears whole or not at all."""
    from safetensors.torch import save_file

    path = layer_file(folder, layer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({k: v.contiguous() for k, v in predictor.state_dict().items()}, temporary)
    os.replace(temporary, path)


def load(folder: Path, layer: int) -> LayerPredictor:
    """The predictor of one layer of a predictor artifact.

    Raises:
        BadInput: no such file, or not the two matrices of a predictor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = layer_file(folder, layer)
    try:
        weights = load_file(path)
        (hidden, d_model), (d_ff, width) = weights["fc1.weight"].shape, weights["fc2.weight"].shape
        if width != hidden:
            raise ValueError(f"fc2 takes {width} values, fc1 gives {hidden}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadInput(f"{path} is no activation predictor: {error}") from error
    predictor = LayerPredictor(d_model, d_ff, hidden)
    predictor.load_state_dict(weights)
    return predictor.eval()

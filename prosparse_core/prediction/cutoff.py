"""The cutoff at which predictors find a wanted share of the active neurons: the largest one that still does.

Scores are counted in bins, so a recording of any length takes the memory of one histogram a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prosparse_core.prediction.recording import LabelRule, LayerRecording
from prosparse_core.predictor import EVALUATE_BATCH, LayerPredictor

LOWEST, HIGHEST, WIDTH = -16.0, 16.0, 0.01
NUM_BINS = round((HIGHEST - LOWEST) / WIDTH)
"""Bin i holds logits from LOWEST + i * WIDTH on; the last also those above."""


@torch.inference_mode()
def active_scores(
    predictor: LayerPredictor, recording: LayerRecording, labels: LabelRule, device: str = "cpu"
) -> Tensor:
    """How many active neurons have their logit in each bin, int64 [NUM_BINS + 1]; the first entry is of those below."""
    predictor.to(device)
    counts = torch.zeros(NUM_BINS + 1, dtype=torch.int64)
    for rows in torch.arange(recording.num_tokens).split(EVALUATE_BATCH):
        logits = predictor(recording.inputs[rows].to(device, torch.float32)).cpu()
        found = logits[recording.active(rows, labels)].double()
        place = ((found - LOWEST) / WIDTH).floor().clamp(-1, NUM_BINS - 1).long() + 1
        counts += torch.bincount(place, minlength=NUM_BINS + 1)
    predictor.cpu()
    return counts


def cutoff_per_layer(counts: Sequence[Tensor], target_recall: float) -> list[float]:
    """For each layer the largest cutoff with at least ``target_recall``; see :func:`global_cutoff`.

    A layer without active neurons has nothing to find: 0.5. Where even the lowest logit does not reach the target, it
    is the cutoff all the same.
    """
    return [0.5 if not int(c.sum()) else _largest([c], target_recall) for c in counts]


def global_cutoff(counts: Sequence[Tensor], target_recall: float) -> float:
    """The largest cutoff for all layers with at least ``target_recall`` as the mean over layers (paper, App. C)."""
    with_active = [c for c in counts if int(c.sum())]
    return _largest(with_active, target_recall) if with_active else 0.5


def _largest(counts: Sequence[Tensor], target_recall: float) -> float:
    # Entry i: the recall when everything from the lower end of bin i on is predicted active.
    recalls = [c.flip(0).cumsum(0).flip(0)[1:].double() / int(c.sum()) for c in counts]
    enough = (torch.stack(recalls).mean(0) >= target_recall).nonzero().flatten()
    best = int(enough[-1]) if len(enough) else 0
    return 1.0 / (1.0 + math.exp(-(LOWEST + best * WIDTH)))

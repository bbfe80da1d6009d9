"""From a model and its predictors to a PowerInfer file that was checked: its rules, and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prosparse_core import predictor as predictors_of
from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.formats.plain import range_text
from prosparse_core.formats.powerinfer_reader import PowerInferModel
from prosparse_core.formats.powerinfer_verify import require_valid
from prosparse_core.powerinfer import Dtype, one_threshold, padded_neurons, refuse, scaled, write_powerinfer
from prosparse_core.prediction.input import Input, norm_before, norm_scale
from prosparse_core.prediction.mask import PredictedMask, measure_windows
from prosparse_core.predictor import LayerPredictor
from prosparse_core.store import read_record
from prosparse_core.variants import MODEL, Variant, check_folder, load_model

MAX_RELATIVE_DIFFERENCE = 0.01
"""Of the file's perplexity from torch's with the same predictors; f16 flips a few neurons at the cutoff."""
DEFAULT_CUTOFF = 0.5


@dataclass(frozen=True)
class PowerInferExport:
    """What was written, and what it computes on ``num_tokens`` held-out tokens."""

    target: Path
    dtype: Dtype
    sparse_threshold: float
    perplexity: float
    """Of the file, by our own reader of it."""
    torch_perplexity: float
    """Of the model with the same predictors and cutoffs, t = 0, in torch."""
    exact_perplexity: float
    """Of the same model without predictors."""
    predicted_sparsity: float
    """Share of the model's neurons that the file skips in the last window; mean over layers, without padding."""
    num_tokens: int
    notes: tuple[str, ...]
    """Where the file is not the model it was made of (``strict`` refuses these); empty when it is."""
    remarks: tuple[str, ...]
    """What PowerInfer itself does differently with the very file."""


def export_powerinfer(
    variant: Variant,
    predictor_folder: Path,
    target: Path,
    *,
    windows: Sequence[Tensor],
    name: str,
    cutoff: float | None = None,
    dtype: Dtype = "f16",
    strict: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> PowerInferExport:
    """Write the file, check every rule of the format on it, and compare what it computes with torch.

    The format has ReLU only: a FATReLU variant is written with t = 0, which the notes say. Predictors that read the
    normed input are folded into ones before the norm, which is exact at cutoff 0.5 and refused at others.

    Args:
        predictor_folder: a predictor artifact of this variant.
        windows: held-out tokens, each [1, length], of both comparisons.
        cutoff: for all layers; None for the ones the artifact chose, else 0.5.
        strict: refuse where there would be notes.

    Raises:
        BadInput: what the format cannot hold; or any note, when ``strict``. Nothing is left at ``target``.
        ProSparseError: the written file breaks a rule, or computes something else. The file is removed.
    """
    folder = variant.checkpoint.path / MODEL
    config = check_folder(folder)
    refuse(config, dtype)
    if variant.activation not in ("relu", "fatrelu"):
        raise BadInput(
            f"{variant.setting} runs {variant.activation}: PowerInfer runs ReLU on the gate and nothing else",
            hint="use prosparse export --to hf instead",
        )
    if target.exists():
        raise BadInput(f"{target} is there already", hint="give another file with --out")
    meta = read_record(predictor_folder)["meta"]
    source: Input = meta.get("input", "post_norm")
    predictors = [predictors_of.load(predictor_folder, i) for i in range(int(config["num_hidden_layers"]))]
    cutoffs = _cutoffs(meta, cutoff, len(predictors))
    if source == "post_norm" and set(cutoffs) != {DEFAULT_CUTOFF}:
        raise BadInput(
            f"cutoffs from {min(cutoffs):g} to {max(cutoffs):g}, of predictors that read the normed input: without the "
            "norm a score is larger by another factor for every token, so only 0.5 means the same",
            hint="--cutoff 0.5, or train predictors with predictor.input=pre_norm",
        )
    threshold, factors = one_threshold(cutoffs)
    notes = _threshold_notes(variant)
    _refuse_notes(notes, strict)
    progress("measuring the model with its predictors in torch")
    torch_perplexity, exact_perplexity, num_tokens, channels = _in_torch(folder, predictors, cutoffs, source, windows)
    progress(f"writing {target.name}")
    foldable = [
        scaled(p, channels=channels[i] if source == "post_norm" else None, factor=factors[i])
        for i, p in enumerate(predictors)
    ]
    vocabulary = write_powerinfer(folder, foldable, target, sparse_threshold=threshold, name=name, dtype=dtype)
    try:
        progress("checking the file against the rules of the format")
        require_valid(target)
        progress("measuring the file")
        reader = PowerInferModel(target)
        perplexity = reader.perplexity(windows)
        if dtype == "f16" and not abs(perplexity / torch_perplexity - 1) <= MAX_RELATIVE_DIFFERENCE:
            raise ProSparseError(
                f"the file has perplexity {perplexity:g} on {num_tokens} tokens, but torch with the same predictors "
                f"has {torch_perplexity:g}",
                hint="the file was not kept; this is a defect of the export",
            )
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return PowerInferExport(
        target,
        dtype,
        threshold,
        perplexity,
        torch_perplexity,
        exact_perplexity,
        _without_padding(reader.predicted_sparsity, int(config["intermediate_size"]), threshold),
        num_tokens,
        notes,
        vocabulary.notes,
    )


def _without_padding(in_file: Sequence[float], d_ff: int, threshold: float) -> float:
    """From shares of the file's neurons to shares of the model's: those added score 0."""
    added = padded_neurons(d_ff) - d_ff
    computed = [(1 - share) * (d_ff + added) - (added if threshold <= 0 else 0) for share in in_file]
    return 1 - sum(computed) / len(computed) / d_ff


def _cutoffs(meta: dict[str, Any], cutoff: float | None, num_layers: int) -> list[float]:
    if cutoff is not None:
        if not 0 < cutoff < 1:
            raise BadInput(f"--cutoff {cutoff:g}: a probability strictly between 0 and 1")
        return [cutoff] * num_layers
    return (meta.get("chosen") or {}).get("cutoffs") or [DEFAULT_CUTOFF] * num_layers


def _threshold_notes(variant: Variant) -> tuple[str, ...]:
    thresholds = variant.layer_thresholds() or [0.0]
    if not any(thresholds):
        return ()
    return (
        f"FATReLU's threshold {range_text(thresholds)} is not expressible in this format: the file runs ReLU (t = 0)",
    )


def _refuse_notes(notes: Sequence[str], strict: bool) -> None:
    if strict and notes:
        raise BadInput("--strict: " + "; ".join(notes), hint="without --strict the file is written and says so")


def _in_torch(
    folder: Path,
    predictors: Sequence[LayerPredictor],
    cutoffs: Sequence[float],
    source: Input,
    windows: Sequence[Tensor],
) -> tuple[float, float, int, list[Tensor]]:
    """(perplexity with predictors, without, predicted tokens, the norms' factors by layer) of the ReLU model."""
    from prosparse_core.families import find_ffns
    from prosparse_core.substitute import use_relu

    model, _ = load_model(folder)
    use_relu(model)
    with PredictedMask(model, predictors, cutoffs, source):
        predicted = measure_windows(model, windows, "fp32")
    exact = measure_windows(model, windows, "fp32")
    return (
        predicted.perplexity,
        exact.perplexity,
        predicted.num_tokens,
        [norm_scale(norm_before(model, ffn), ffn.d_model) for ffn in find_ffns(model)],
    )

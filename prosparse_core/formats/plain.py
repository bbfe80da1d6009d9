"""Folders that need no code of ours: plain ReLU for transformers, and MiniCPM's form for vLLM.

``--to hf-relu`` is asked for by name, also where the thresholds are 0: ``hf`` keeps one layout whatever they are.

vLLM runs FATReLU for one architecture, MiniCPM, which is LLaMA with three more factors: embeddings times ``scale_emb``,
every block's output times ``scale_depth / sqrt(layers)``, the last hidden state divided by ``hidden / dim_model_base``.
With 1, sqrt(layers) and hidden all three are exactly 1, and a LLaMA is a MiniCPM. Its FATReLU keeps x > t where the
paper's keeps x >= t; the exported parameter is the next smaller 32-bit float, which makes the two the same.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.export import CARD, PROMPT, pin_tokenizer
from prosparse_core.families import require_family
from prosparse_core.store import require_space, write_json
from prosparse_core.variants import MODEL, Variant, check_folder, load_model

VLLM_MODEL_TYPES = ("llama", "mistral")
DROPPED = ("hidden_act_param", "hidden_act_params", "_name_or_path", "auto_map")


@dataclass(frozen=True)
class PlainExport:
    """What was written."""

    target: Path
    threshold: float
    """FATReLU's, of every layer; 0 is ReLU."""
    notes: tuple[str, ...]
    """Where the folder is not the variant it was made of (``strict`` refuses these); empty when it is."""


def export_hf_relu(variant: Variant, target: Path, *, strict: bool = False) -> PlainExport:
    """The dense architecture with ``hidden_act: relu``, which transformers and its like run without further code.

    A variant with thresholds is written without them: the setting before threshold shifting, which the notes say.

    Raises:
        BadInput: another activation, a target that exists, or a note when ``strict``.
        ProSparseError: transformers computes other logits from the folder. It is removed.
    """
    folder = _checked(variant, target)
    thresholds = variant.layer_thresholds() or [0.0]
    notes = (
        (
            f"thresholds ({range_text(thresholds)}) are left out: plain ReLU is the model before threshold shifting "
            "(prosparse_star)",
        )
        if any(thresholds)
        else ()
    )
    _refuse(notes, strict)
    config = check_folder(folder)
    family = require_family(config, where="export")
    if family.act_is_built_in or "auto_map" in config:
        raise BadInput(
            f"{config['model_type']} "
            + ("has its activation built in: no config can say ReLU" if family.act_is_built_in else "runs by own code"),
            hint="use prosparse export --to hf instead: its folder carries the code it needs",
        )
    changed = {**{k: v for k, v in config.items() if k not in DROPPED}, family.config_key: "relu"}
    _write(folder, target, changed, _readme("transformers", "", 0.0, notes), lambda: _same_logits(folder, target))
    return PlainExport(target, 0.0, notes)


def export_vllm(variant: Variant, target: Path, *, strict: bool = False) -> PlainExport:
    """A folder that vLLM serves as MiniCPM, computing what the LLaMA does; not run here, where there is no vLLM.

    The format has one threshold. Where layers differ, the best one for all layers is taken, which the notes say.

    Raises:
        BadInput: an architecture MiniCPM's form is not exact for, another activation, no threshold for all layers, a
            target that exists, or a note when ``strict``.
    """
    folder = _checked(variant, target)
    config = check_folder(folder)
    refuse_vllm(config)
    per_layer = variant.layer_thresholds() or [0.0]
    threshold, notes = per_layer[0], tuple[str, ...]()
    if len(set(per_layer)) > 1:
        best = variant.best_global_threshold()
        assert best is not None, "there are thresholds"
        threshold = best
        notes = (
            f"vLLM has one threshold for all layers: {threshold:g}, the best such, instead of "
            f"{range_text(per_layer)} by layer",
        )
    _refuse(notes, strict)
    command = f"    vllm serve {target.name} --dtype float32\n\n"
    readme = _readme("vLLM", command + (_IN_16_BITS if threshold else ""), threshold, notes)
    _write(folder, target, minicpm_config(config, threshold), readme, lambda: None)
    return PlainExport(target, threshold, notes)


def minicpm_config(config: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The config.json that makes MiniCPM's code compute a LLaMA with FATReLU at ``threshold`` (>= 0).

    ``model_type`` stays llama, so that no code comes with the folder; transformers itself refuses it, as it knows no
    activation named fatrelu. Both spellings of rope's base are there, for older readers.
    """
    num_layers, d_model = int(config["num_hidden_layers"]), int(config["hidden_size"])
    rope = dict(config.get("rope_parameters") or {})
    base = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    scaling = {k: v for k, v in {**rope, **(config.get("rope_scaling") or {})}.items() if k != "rope_theta"}
    is_scaled = scaling.get("rope_type", scaling.get("type", "default")) != "default"
    return {
        **{k: v for k, v in config.items() if k not in DROPPED},
        "model_type": "llama",
        "architectures": ["MiniCPMForCausalLM"],
        "hidden_act": "fatrelu",
        "hidden_act_param": strictly_above(threshold),
        "num_key_value_heads": int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        "rope_theta": base,
        "rope_scaling": scaling if is_scaled else None,
        "scale_emb": 1,
        "scale_depth": math.sqrt(num_layers),
        "dim_model_base": d_model,
        "num_experts": 0,
    }


_IN_16_BITS = (
    "In 16-bit floats, vLLM's choice unless told, gates that equal the threshold rounded to them are dropped where "
    "that is less than the threshold; the model keeps these. All other gates are as in 32 bits.\n"
)


def strictly_above(threshold: float) -> float:
    """The number u with x > u exactly where x >= threshold, for 32-bit floats x that ReLU lets pass; 0 for 0.

    vLLM compares x of 16 bits with u as it is, the model (see ``activations.FATReLU``) with the threshold rounded to
    them: the two differ at that one number, where it is less than the threshold.
    """
    return float(np.nextafter(np.float32(threshold), np.float32(0.0)))


def refuse_vllm(config: Mapping[str, Any]) -> None:
    """Say why MiniCPM's form would compute something else.

    Raises:
        BadInput: an architecture of another layout; else with every reason at once.
    """
    if config["model_type"] not in VLLM_MODEL_TYPES:
        raise BadInput(
            f"vLLM runs FATReLU in MiniCPM's form only, which has no architecture {config['model_type']}",
            hint="use prosparse export --to hf instead",
        )
    heads, d_model = int(config["num_attention_heads"]), int(config["hidden_size"])
    window = config.get("sliding_window")
    reasons = {
        "projections with a bias": bool(config.get("attention_bias") or config.get("mlp_bias")),
        f"a sliding window of {window} tokens": window is not None and window < config["max_position_embeddings"],
        f"heads of {config.get('head_dim')} numbers where d_model / heads is {d_model / heads:g}": (
            config.get("head_dim") or d_model // heads
        )
        * heads
        != d_model,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise BadInput(
            "vLLM runs FATReLU in MiniCPM's form only, which has no " + "; no ".join(found),
            hint="use prosparse export --to hf instead",
        )


def range_text(values: Sequence[float]) -> str:
    """``0.2``, or ``0 to 0.2`` where they differ."""
    return f"{min(values):g}" if len(set(values)) == 1 else f"{min(values):g} to {max(values):g}"


def _checked(variant: Variant, target: Path) -> Path:
    """The model folder of a variant that runs ReLU or FATReLU."""
    if variant.activation not in ("relu", "fatrelu"):
        raise BadInput(
            f"{variant.setting} runs {variant.activation}; only ReLU and FATReLU variants are exported",
            hint="use the checkpoint itself",
        )
    if target.exists():
        raise BadInput(f"{target} is there already", hint="give another folder with --out")
    return variant.checkpoint.path / MODEL


def _refuse(notes: tuple[str, ...], strict: bool) -> None:
    if strict and notes:
        raise BadInput("--strict: " + "; ".join(notes), hint="without --strict the folder is written and says so")


def _write(folder: Path, target: Path, config: Mapping[str, Any], readme: str, check: Callable[[], None]) -> None:
    """Copy weights and tokenizer byte for byte, with another config; nothing stays when the check fails."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BadInput(f"{folder} has no safetensors weights", hint="save the model with save_pretrained first")
    require_space(target.parent, sum(w.stat().st_size for w in weights), f"the export to {target}")
    try:
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns(CARD, "*.py", "*.bin", "*.pt"))
        write_json(target / "config.json", config)
        pin_tokenizer(folder, target)
        (target / CARD).write_text(readme, encoding="utf-8")
        check()
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _readme(reader: str, command: str, threshold: float, notes: tuple[str, ...]) -> str:
    lines = [f"# A sparse model for {reader}", "", f"FFN activation: ReLU with threshold {threshold:g}."]
    lines += [f"Note: {note}." for note in notes]
    return "\n".join(lines) + f"\n\n{command}"


def _same_logits(folder: Path, target: Path) -> None:
    """What transformers' own class computes from the folder is what our ReLU model computes, bit for bit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prosparse_core.substitute import use_relu

    found = []
    for load in (_ours(folder, use_relu), lambda: AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)):
        ids = AutoTokenizer.from_pretrained(target, local_files_only=True)(PROMPT, return_tensors="pt")["input_ids"]
        model = load()
        with torch.inference_mode():
            found.append(model.eval()(input_ids=ids, use_cache=False).logits)
        del model
    if not torch.equal(*found):
        raise ProSparseError(f"transformers computes other logits from {target} than the ReLU model does")


def _ours(folder: Path, use_relu: Callable[[Any], int]) -> Callable[[], Any]:
    def load() -> Any:
        model, _ = load_model(folder)
        use_relu(model)
        return model

    return load

"""A variant: a setting of the paper's tables made concrete, and how it is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prosparse_core.errors import BadInput
from prosparse_core.families import EXPORTED, FAMILY_KEY, Family, require_family
from prosparse_core.source_precision import of_config
from prosparse_core.store import Artifact, read_record
from prosparse_core.thresholds import THRESHOLDS as THRESHOLDS
from prosparse_core.thresholds import Thresholds, read_thresholds

MODEL = "model"
"""Folder of an artifact that holds weights, config and tokenizer, as Hugging Face writes them."""
OPTIMIZER = "optimizer.pt"
"""The state of the optimizer in a stage's artifact: only a stage that goes on from it reads it."""


@dataclass(frozen=True)
class Variant:
    """Checkpoint + activation + thresholds: whatever is measured is measured of one of these."""

    setting: str
    """original, substituted (ReLU, untrained), vanilla_relu, prosparse_star, prosparse, ..."""
    checkpoint: Artifact
    activation: str
    """original, relu, shifted_relu, drelu or fatrelu (ReLU with thresholds)."""
    thresholds: Artifact | None = None
    shift: float | None = None
    """b of shifted_relu."""

    @property
    def inputs(self) -> dict[str, Artifact]:
        found = {"checkpoint": self.checkpoint}
        if self.thresholds is not None:
            found["thresholds"] = self.thresholds
        return found

    @property
    def identity(self) -> dict[str, str]:
        shift = {} if self.shift is None else {"shift": repr(self.shift)}
        return {"setting": self.setting, "activation": self.activation, **shift}

    @property
    def id(self) -> str:
        """Names the variant in the ledger: setting@checkpoint(+thresholds)."""
        suffix = "" if self.thresholds is None else f"+{(self.thresholds.digest or '')[:8]}"
        return f"{self.setting}@{(self.checkpoint.digest or '')[:8]}{suffix}"

    def fact(self, model: str) -> dict[str, Any]:
        """The row of the ledger's ``variants``."""
        return {
            "variant": self.id,
            "model": model,
            "setting": self.setting,
            "activation": self.activation,
            "checkpoint": self.checkpoint.digest,
            "thresholds": None if self.thresholds is None else self.thresholds.digest,
            "source_precision": self.source_precision,
            **self.training,
        }

    @property
    def source_precision(self) -> str | None:
        """In which precision the weights came that training began with, as the checkpoint's config.json says."""
        try:
            config = json.loads((self.checkpoint.path / MODEL / "config.json").read_text(encoding="utf-8"))
        except OSError:
            return None
        return of_config(config)

    @property
    def training(self) -> dict[str, Any]:
        """tokens_seen, seed of the data order and l1 (the factor at its end) of the checkpoint, as its stage recorded
        them: what tells rows of one setting apart. 0 tokens and None for a model that no stage of ours trained."""
        if self.checkpoint.step != "stage":
            return {"tokens_seen": 0, "seed": None, "l1": None}
        record = read_record(self.checkpoint.path)
        meta = record["meta"]
        return {"tokens_seen": meta["tokens"], "seed": record["payload"]["seed"], "l1": meta["l1"]}

    def layer_thresholds(self) -> list[float] | None:
        """FATReLU's threshold per layer; None without thresholds.

        Raises:
            BadInput: they are not readable, or belong to another checkpoint or number of layers.
        """
        found = self._thresholds()
        return None if found is None else list(found.per_layer)

    def best_global_threshold(self) -> float | None:
        """The best threshold for all layers together, for formats that carry only one; None without thresholds.

        Raises:
            BadInput: as :meth:`layer_thresholds`, or they differ between layers and no global one was calibrated.
        """
        found = self._thresholds()
        if found is None or found.is_global:
            return None if found is None else found.per_layer[0]
        if found.best_global is None:
            raise BadInput(
                f"{found.path} has one threshold per layer and no global one",
                hint="calibrate again: rule cett measures the grid of global thresholds as well",
            )
        return found.best_global

    def _thresholds(self) -> Thresholds | None:
        if self.thresholds is None:
            return None
        found = read_thresholds(self.thresholds.path)
        config = check_folder(self.checkpoint.path / MODEL)
        num_layers = require_family(config, where=str(self.checkpoint.path)).num_layers(config)
        found.require(num_layers=num_layers, checkpoint=self.checkpoint.digest)
        return found


def load_variant(variant: Variant, device: str = "cpu") -> tuple[Any, Any]:
    """(model in fp32, eval mode, with the variant's activation; tokenizer).

    Raises:
        BadInput: see :func:`load_model` and :meth:`Variant.layer_thresholds`; said before any weight is read.
    """
    from prosparse_core.substitute import use_activation, use_thresholds

    thresholds = variant.layer_thresholds()
    model, tokenizer = load_model(variant.checkpoint.path / MODEL, device)
    use_activation(model, "relu" if variant.activation == "fatrelu" else variant.activation, variant.shift)
    if variant.activation == "fatrelu":
        assert thresholds is not None, "a fatrelu variant has thresholds"
        use_thresholds(model, thresholds)
    return model, tokenizer


def load_model(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Model (fp32, eval mode) and tokenizer of a Hugging Face folder of a known family.

    Code in the folder is run: only ``base_model`` with ``model.trust_remote_code`` leaves an auto_map in a config.

    Raises:
        BadInput: no config there, or an architecture of no known family (said before any weight is read).
    """
    config, options = _config(folder)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True, **options
    )
    return model.to(device).eval(), load_tokenizer(folder)


def empty_model(folder: Path) -> Any:
    """The model of a folder with its buffers but without weights (they are on the meta device), fp32, eval mode."""
    config, options = _config(folder)
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    model.tie_weights()
    return model.eval()


def _config(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The config of a folder, and whether its own code makes its model."""
    found = check_folder(folder)
    from transformers import AutoConfig

    from prosparse_core.substitute import UNKNOWN_TO_TRANSFORMERS

    options = {"trust_remote_code": "auto_map" in found}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    family = require_family(found, where=str(folder))
    if str(getattr(config, family.config_key, None)).startswith(UNKNOWN_TO_TRANSFORMERS):
        setattr(config, family.config_key, "relu")  # the caller puts the activation in: a variant names it
    return config, options


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    config = folder / "config.json"
    trusted = config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8"))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)


def check_folder(folder: Path, family: Family | None = None) -> dict[str, Any]:
    """The config of a model folder, checked without reading weights.

    Args:
        family: what a recipe says of it; None: an entry or the config itself says it.

    Raises:
        BadInput: no such folder, no config, unknown family, or an exported model.
    """
    if not folder.is_dir():
        raise BadInput(f"model folder {folder} does not exist")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{folder} is no model folder: it has no readable config.json") from error
    except ValueError as error:
        raise BadInput(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    if str(config.get("model_type")).startswith(EXPORTED):
        raise BadInput(
            f"{folder} is a model this pipeline exported: it runs FATReLU by code of its own, and is no dense model",
            hint=f"measure it with prosparse evaluate {folder}",
        )
    described = {} if family is None else {FAMILY_KEY: family.model_dump()}
    require_family({**config, **described}, where=str(folder))
    return config

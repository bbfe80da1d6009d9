"""Export as a Hugging Face folder that runs FATReLU or does not run at all.

The folder's architecture has a name of its own (``model_type: prosparse_llama``) and carries the code for it, so that
no program can take it for the dense model. Published keys (as in the released models): ``hidden_act: fatrelu`` and
``hidden_act_param: t``. Thresholds that differ between layers go to ``hidden_act_params: [t, ...]`` and
``hidden_act_param`` is absent: a reader that knows only one threshold fails instead of using a wrong one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prosparse_core.errors import BadInput, ProSparseError
from prosparse_core.families import EXPORTED as PREFIX
from prosparse_core.families import require_family
from prosparse_core.source_precision import named, of_config
from prosparse_core.store import require_space, write_json
from prosparse_core.variants import check_folder, load_model, load_tokenizer

REMOTE_CODE = Path(__file__).resolve().parent / "remote_code"
CODE_FILES = ("configuration_prosparse.py", "modeling_prosparse.py")
CARD = "README.md"
AUTO_MAP = {
    "AutoConfig": "configuration_prosparse.ProSparseConfig",
    "AutoModel": "modeling_prosparse.ProSparseModel",
    "AutoModelForCausalLM": "modeling_prosparse.ProSparseForCausalLM",
}
SOURCES = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
"""What an auto_map calls the classes that ours derive from."""
OURS = {
    "BaseConfig": "from transformers import LlamaConfig",
    "BaseForCausalLM": "from transformers import LlamaForCausalLM",
    "BaseModel": "from transformers import LlamaModel",
}
"""The imports of ours that name them, for Llama."""
PROMPT = (
    "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n\nThe 2nd café — naïve, 中文 — costs 10 €.\n"
)
"""What the self-check runs: code, prose, digits, and characters beyond ASCII."""


def export_hf(model_folder: Path, thresholds: Sequence[float], target: Path, *, card: str) -> None:
    """Write a model with its FATReLU thresholds as a self-contained Hugging Face folder, and prove that it loads.

    Weights and tokenizer files are copied byte for byte: a link would let an edit of the export reach the checkpoint.

    Args:
        model_folder: weights (safetensors), config and tokenizer of a dense architecture of a known family.
        thresholds: one per layer, or one for all; 0 is ReLU.
        target: a folder that does not exist yet; taken away again when the export fails.
        card: the text of README.md.

    Raises:
        BadInput: unusable folder, thresholds or target, or an architecture whose classes neither transformers has nor
            the folder; said before anything is written.
        EnvironmentProblem: the disk is too small.
        ProSparseError: a fresh process that loads the folder does not compute the same logits, bit for bit.
    """
    config_of_model = check_folder(model_folder)
    config, code_files = fatrelu_config(config_of_model, thresholds), remote_code(config_of_model)
    weights = sorted(model_folder.glob("*.safetensors"))
    if not weights:
        raise BadInput(f"{model_folder} has no safetensors weights", hint="save the model with save_pretrained first")
    if target.exists():
        raise BadInput(f"export target {target} exists already", hint="remove it, or export to another folder")
    require_space(target.parent, sum(w.stat().st_size for w in weights), f"the export to {target}")
    try:
        # Code beside the weights is the architecture's own, which ours then builds on.
        code = () if has_code(config_of_model) else ("*.py",)
        shutil.copytree(model_folder, target, ignore=shutil.ignore_patterns(CARD, *code, "*.bin", "*.pt"))
        write_json(target / "config.json", config)
        pin_tokenizer(model_folder, target)
        (target / CARD).write_text(card, encoding="utf-8")
        for name, text in code_files.items():
            (target / name).write_text(text, encoding="utf-8")
        check_export(model_folder, thresholds, target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def fatrelu_config(config: Mapping[str, Any], thresholds: Sequence[float]) -> dict[str, Any]:
    """The exported config.json of a dense model's config.

    Raises:
        BadInput: unknown family, wrong number of thresholds, or a threshold below 0.
    """
    family = require_family(config, where="export")
    num_layers = family.num_layers(config)
    if len(thresholds) not in (1, num_layers):
        raise BadInput(
            f"{len(thresholds)} thresholds for a model of {num_layers} layers", hint="give 1, or one per layer"
        )
    wrong = [t for t in thresholds if not 0 <= t < float("inf")]
    if wrong:
        raise BadInput(f"thresholds {wrong}: FATReLU needs finite thresholds of at least 0")
    first, same = float(thresholds[0]), len(set(thresholds)) == 1
    return {
        **{k: v for k, v in config.items() if k not in ("hidden_act_param", "hidden_act_params", "_name_or_path")},
        "model_type": PREFIX + str(config["model_type"]),
        "architectures": [AUTO_MAP["AutoModelForCausalLM"].partition(".")[2]],
        "auto_map": AUTO_MAP,
        **dict.fromkeys(family.activation_keys(config), "fatrelu"),
        **({"hidden_act_param": first} if same else {"hidden_act_params": [float(t) for t in thresholds]}),
    }


def remote_code(config: Mapping[str, Any]) -> dict[str, str]:
    """The code files of an exported folder by name: ours, with the classes of the architecture in Llama's place, and
    where its family has layers, activation and the keys that name it.

    Raises:
        BadInput: neither transformers nor the model's folder has its classes.
    """
    family = require_family(config, where="export")
    changes = {
        **_imports(config),
        "ACTIVATION_KEYS = ": repr(tuple(family.activation_keys(config))),
        "LAYERS = ": repr(family.layers),
        "ACTIVATION = ": repr(".".join(filter(None, (family.ffn, family.act)))),
    }
    files = {name: (REMOTE_CODE / name).read_text(encoding="utf-8") for name in CODE_FILES}
    for beginning, rest in changes.items():
        hits = 0
        for name, text in files.items():
            lines = text.splitlines(keepends=True)
            at = [i for i, line in enumerate(lines) if line.startswith(beginning)]
            for i in at:
                lines[i] = f"{beginning if beginning.endswith('= ') else ''}{rest}\n"
            files[name], hits = "".join(lines), hits + len(at)
        assert hits == 1, f"{hits} lines of our code begin with {beginning!r}"
    return files


def _imports(config: Mapping[str, Any]) -> dict[str, str]:
    """By the beginning of an import of ours: what stands there for this architecture."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    model_type = str(config["model_type"])
    classes: dict[str, str | None] = {
        "BaseConfig": CONFIG_MAPPING_NAMES.get(model_type),
        "BaseForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type),
        "BaseModel": MODEL_MAPPING_NAMES.get(model_type),
    }
    if has_code(config):
        classes = dict(zip(classes, (config["auto_map"].get(a) for a in SOURCES), strict=True))
    missing = [SOURCES[i] for i, name in enumerate(classes.values()) if not isinstance(name, str)]
    if missing:
        raise BadInput(
            f"cannot export {model_type}: neither transformers nor the auto_map of its config has its {missing[0]}",
            hint="a folder with the architecture's code in it (auto_map, *.py) can be exported",
        )
    found = {}
    for ours, name in classes.items():
        module, _, of = str(name).rpartition(".")
        found[OURS[ours]] = f"from {f'.{module}' if module else 'transformers'} import {of} as {ours}"
    return found


def has_code(config: Mapping[str, Any]) -> bool:
    """Whether a model folder carries the code of its architecture (with model.trust_remote_code it does)."""
    return "auto_map" in config


def pin_tokenizer(model_folder: Path, target: Path) -> None:
    """Name the tokenizer class that the dense folder is loaded with: transformers picks it by ``model_type`` for some
    architectures (qwen2), whatever the files say, and cannot do so for a name it does not know."""
    used = type(load_tokenizer(model_folder)).__name__
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if str(settings.get("tokenizer_class")).removesuffix("Fast") != used:
        write_json(path, {**settings, "tokenizer_class": used})


def check_export(model_folder: Path, thresholds: Sequence[float], target: Path) -> None:
    """Load the exported folder in a fresh interpreter and compare the logits of a fixed prompt with our own model's.

    Both run in fp32 with the same number of threads, one after the other, so that one model is in memory at a time.

    Raises:
        ProSparseError: it does not load, loads without its code, tokenizes differently, or any logit differs in a bit.
    """
    import torch
    from safetensors.torch import load_file

    from prosparse_core.substitute import use_thresholds

    model, tokenizer = load_model(model_folder)
    use_thresholds(model, thresholds)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
    del model
    with tempfile.TemporaryDirectory(prefix="prosparse-export-") as scratch:
        out = Path(scratch) / "logits.safetensors"
        arguments = [str(REMOTE_CODE / "selfcheck.py"), str(target), str(out), str(torch.get_num_threads())]
        run_fresh(["-P", *arguments], stdin=PROMPT, what=f"loading the exported folder {target}")
        found = load_file(out)
    if not torch.equal(found["ids"], ids):
        raise ProSparseError(f"the tokenizer of the exported folder {target} splits the check prompt differently")
    if not torch.equal(found["logits"], expected):
        worst = float((found["logits"] - expected).abs().max())
        raise ProSparseError(f"the exported folder {target} computes other logits than the model, by up to {worst:g}")


def run_fresh(arguments: Sequence[str], *, what: str, stdin: str = "", cwd: Path | None = None) -> str:
    """Run Python with ``arguments``, offline and with a module cache of its own; returns what it printed.

    Raises:
        ProSparseError: it failed; with the last lines it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="prosparse-modules-") as modules:
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": modules,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            [sys.executable, *arguments],
            input=stdin,
            cwd=cwd,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ProSparseError(f"{what} in a fresh process failed (exit code {done.returncode}):\n{last}")
    return done.stdout


@dataclass(frozen=True)
class Measurement:
    """What was measured of one setting, by corpus; a corpus that is missing or None shows as n/a."""

    setting: str
    perplexity: Mapping[str, float | None]
    sparsity: Mapping[str, float | None]


@dataclass(frozen=True)
class Card:
    """Everything the model card says; no number of it is typed anywhere else."""

    model: str
    base_model: str | None
    """The hub id of the dense model, if it has one."""
    setting: str
    config: Mapping[str, Any]
    """The config of the dense architecture."""
    thresholds: Sequence[float]
    tokens_seen: int
    recipe: str
    stages: Sequence[Mapping[str, Any]]
    results: Sequence[Measurement] = ()
    notes: Sequence[str] = ()
    """Conditions of the measurements."""
    lineage: Mapping[str, str | None] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)

    def render(self) -> str:
        """README.md: YAML metadata for the hub, then the text. The same data give the same bytes."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(REMOTE_CODE),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters["ppl"] = lambda v: "n/a" if v is None else f"{v:.3f}"
        environment.filters["pct"] = lambda v: "n/a" if v is None else f"{100 * v:.2f} %"
        thresholds = [float(t) for t in self.thresholds]
        family = require_family(self.config, where="model card")
        sizes = family.sizes(self.config)
        return environment.get_template("README.md.j2").render(
            {
                **vars(self),
                "title": f"{self.model.rpartition('/')[2]}-{self.setting}",
                "model": named(self.model, of_config(self.config)),
                "source_precision": of_config(self.config),
                "model_type": self.config["model_type"],
                **vars(sizes),
                "down": family.down,
                "thresholds": thresholds,
                "threshold": thresholds[0] if len(set(thresholds)) == 1 else None,
                "corpora": list(dict.fromkeys(c for r in self.results for c in (*r.perplexity, *r.sparsity))),
            }
        )

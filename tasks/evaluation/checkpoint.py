"""Any checkpoint as a variant: a folder, an exported model, a hub id, a variant of the ledger, an artifact.

Where a config names an activation that transformers lacks, the weights are taken as they are, under the plain
architecture (:mod:`tasks.evaluation.sparse_config`), and the activation goes into the variant.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prosparse_core import source_precision
from prosparse_core.errors import BadInput
from prosparse_core.export import CODE_FILES
from prosparse_core.families import EXPORTED, require_family
from prosparse_core.ledger import Ledger
from prosparse_core.recipe import Model
from prosparse_core.store import RECORD, Artifact, read_record, require_space, write_json
from prosparse_core.variants import MODEL, THRESHOLDS, Variant
from tasks.base_model import OWN_ACTIVATIONS, activation_name, base_model, hash_files, identity, sizes_of
from tasks.evaluation.sparse_config import GRANITE, Plain, plain_model
from tasks.step import Run, Work

VERSION = 2
SAFETENSORS = "*.safetensors"
PICKLED = "pytorch_model*.bin"
VARIANT_ID = re.compile(r"^[a-z][a-z0-9_]*@[0-9a-f]{8}(\+[0-9a-f]{8})?$")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
DIGEST = re.compile(r"^[0-9a-f]{8,64}$")
SETTING = re.compile(r"^[a-z][a-z0-9_]*$")


@dataclass(frozen=True)
class Target:
    """A checkpoint that was found, before anything of it is read."""

    model: Model
    """Its name in the ledger, and where a base_model step gets it."""
    setting: str
    activation: str
    exported: str | None = None
    """A folder or a hub id with an activation of ours written into its config."""
    shift: float | None = None
    """b of shifted_relu."""
    variant: Variant | None = None
    """Already in the store."""


def find_checkpoint(model: str, home: Path, *, trust_remote_code: bool = False) -> Target:
    """What ``model`` names, checked without reading weights.

    Args:
        model: a folder, a .gguf file, a hub id, ``package:NAME``, a variant id of the ledger (``prosparse@1a2b3c4d``),
            a setting of which it has one variant (``prosparse``), or the digest of an artifact (8 characters or more).
        trust_remote_code: run the code that comes with a folder or a hub id.

    Raises:
        BadInput: it is none of these, its code is needed and not trusted, its architecture is of no known family, or
            its activation is unknown.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return of_source(Model(id=folder.resolve().name, source=str(folder), trust_remote_code=trust_remote_code))
    if VARIANT_ID.match(model) or DIGEST.match(model) or SETTING.match(model):
        return _of_ledger(model, home)
    name = Path(model).stem if model.endswith(".gguf") else model
    return of_source(Model(id=name, source=model, trust_remote_code=trust_remote_code))


def of_source(model: Model) -> Target:
    """What a source holds, by its config; see :func:`find_checkpoint`."""
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        return _of_folder(model, folder)
    plain = plain_model(_hub_config(model), where=model.source) if HUB_ID.match(model.source) else None
    if plain is not None:
        return Target(model, plain.setting, plain.activation, exported=model.source, shift=plain.shift)
    identity(model)
    return Target(model, "original", "original")


def checkpoint(run: Run, target: Target) -> Variant:
    """The variant of a target, its checkpoint brought into the store."""
    if target.variant is not None:
        return target.variant
    if target.exported is None:
        artifact = base_model(run, target.model)
        return Variant(target.setting, artifact, target.activation)
    place = Path(target.exported).expanduser()
    folder = place if place.is_dir() else _download(target.model, is_planned=run.planning)
    files = [] if folder is None else sorted(p for p in folder.iterdir() if p.is_file())
    shift = {} if target.shift is None else {"shift": target.shift}
    artifact = run.step(
        "base_model",
        f"base model · {target.model.id}",
        lambda work: _import(work, files, target),
        version=VERSION,
        config={"exported": hash_files(files), **shift},
        # What is only planned may not be here yet: nobody knows its fingerprint.
        inputs={} if files else {"download": Artifact("base_model", target.exported, None, None, None)},
        needs_bytes=sum(p.stat().st_size for p in files if p.match(SAFETENSORS)),
    )
    thresholds = artifact if target.activation == "fatrelu" else None
    return Variant(target.setting, artifact, target.activation, thresholds, target.shift)


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, of whatever architecture.

    Raises:
        BadInput: there is none to read.
    """
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is no model folder: config.json is not readable ({error})") from error


def _of_folder(model: Model, folder: Path) -> Target:
    config = config_of(folder)
    plain = plain_model(config, where=str(folder), shift=_trained_shift(folder))
    if plain is not None:
        foreign = sorted(p.name for p in folder.glob("*.py") if p.name not in CODE_FILES)
        if foreign and _needs_code(config, plain):
            raise BadInput(
                f"{folder} is a model of an architecture with code of its own ({', '.join(foreign)}), which is not run "
                "from here",
                hint='measure the variant it was made of: prosparse query "SELECT variant FROM variants"',
            )
        if not [*folder.glob(SAFETENSORS), *folder.glob(PICKLED)]:
            raise BadInput(f"{folder} has no weights, neither safetensors nor pytorch_model.bin")
        return Target(model, plain.setting, plain.activation, exported=str(folder), shift=plain.shift)
    require_family(config, where=str(folder))
    identity(model)
    name = "relu" if activation_name(config) == "relu" else "original"
    return Target(model, name, name)


def _needs_code(config: Mapping[str, Any], plain: Plain) -> bool:
    """Whether the code that comes with a model is what computes it: an export brings only code that it was given."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if plain.config["model_type"] == GRANITE:
        return False
    is_exported = str(config.get("model_type")).startswith(EXPORTED)
    return is_exported or plain.config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _trained_shift(folder: Path) -> float | None:
    """b of the Shifted ReLU that a stage of ours trained the model of this folder with, as the stage recorded it."""
    if folder.name != MODEL or not (folder.parent / RECORD).is_file():
        return None
    return read_record(folder.parent)["payload"]["config"].get("train", {}).get("shift")


def _hub_config(model: Model) -> dict[str, Any]:
    """The config of a model on the hub; empty when it cannot be had: base_model then says why."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(model.source, "config.json", revision=model.revision)
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except Exception:  # the hub, the network and the cache have no common error
        return {}


def _download(model: Model, *, is_planned: bool) -> Path | None:
    """The files of a model on the hub; None where the run is only planned and they are not here yet."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", SAFETENSORS, "*.model", "*.txt", "*.jinja"]
    options: dict[str, Any] = {"revision": model.revision, "local_files_only": is_planned}
    try:
        folder = Path(snapshot_download(model.source, allow_patterns=patterns, **options))
        if not list(folder.glob(SAFETENSORS)):
            folder = Path(snapshot_download(model.source, allow_patterns=[*patterns, PICKLED], **options))
        return folder
    except Exception as error:
        if is_planned:
            return None
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"cannot get {model.source!r} from the hub: {said}", hint="check the network") from error


def _import(work: Work, files: Sequence[Path], target: Target) -> None:
    """The weights as they are, under the plain architecture; FATReLU's thresholds beside them."""
    folder = files[0].parent
    plain = plain_model(config_of(folder), where=str(folder), shift=target.shift)
    assert plain is not None, "a target with an activation of ours"
    model = work.folder / MODEL
    require_space(work.folder, sum(p.stat().st_size for p in files if p.match(SAFETENSORS)), f"importing {folder}")
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(
        folder, model, ignore=shutil.ignore_patterns("*.py", "*.bin", "*.bin.index.json", "*.pt", "*.md", ".*")
    )
    if not any(p.match(SAFETENSORS) for p in files):
        _unpickle(folder, model, plain.config)
    stored = source_precision.of_folders(folder, model)
    precision = source_precision.of_config(plain.config) or stored
    write_json(model / "config.json", {**plain.config, **({source_precision.KEY: precision} if precision else {})})
    if plain.thresholds is not None:
        write_json(work.folder / THRESHOLDS, {"per_layer": plain.thresholds, "rule": "imported"})
    work.meta.update(sizes_of(plain.config), source_precision=precision)


def _unpickle(folder: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Write weights in PyTorch's own format as safetensors, by way of the architecture's class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    readable = {k: "relu" if isinstance(v, str) and v in OWN_ACTIVATIONS else v for k, v in config.items()}
    loaded = AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.for_model(**readable), dtype="auto")
    loaded.save_pretrained(target)


def _of_ledger(name: str, home: Path) -> Target:
    """A variant by its id or setting, or by the digest of its checkpoint, of its thresholds, or of its export."""
    ledger = Ledger(home)
    if not ledger.exists():
        raise BadInput(
            f"{name!r} is no folder and no hub id (owner/name), and there is no ledger in {home} to find it in",
            hint="give an existing folder, a .gguf file, package:NAME, random:FAMILY or a hub id",
        )
    rows = ledger.query(
        "SELECT v.variant, any_value(v.model) AS model, any_value(v.setting) AS setting, any_value(v.activation) AS "
        "activation, any_value(v.checkpoint) AS checkpoint, any_value(v.thresholds) AS thresholds, "
        "max(a.payload->>'$.config.variant.shift') AS shift "
        "FROM variant_facts v JOIN artifacts a ON a.digest = v.artifact "
        f"WHERE '{name}' IN (v.variant, v.setting) OR v.checkpoint LIKE '{name}%' OR v.thresholds LIKE '{name}%' "
        "GROUP BY v.variant ORDER BY v.variant"
    ).records()
    if len(rows) > 1:
        raise BadInput(
            f"{name!r} was measured as {len(rows)} variants", hint="name one: " + ", ".join(r["variant"] for r in rows)
        )
    if rows:
        row: dict[str, Any] = dict(rows[0])
        shift = row["shift"]
        thresholds = row["thresholds"] and artifact_of(ledger, home, row["thresholds"])
        variant = Variant(
            row["setting"],
            artifact_of(ledger, home, row["checkpoint"]),
            row["activation"],
            thresholds or None,
            shift=None if shift is None else float(shift),
        )
        return Target(Model(id=row["model"], source=name), row["setting"], row["activation"], variant=variant)
    if not DIGEST.match(name):
        said = f"no variant {name!r} in the ledger"
        if not VARIANT_ID.match(name):
            said = f"{name!r} is no folder, no hub id (owner/name) and no setting measured here"
        raise BadInput(said, hint='prosparse query "SELECT variant, setting FROM variants"')
    artifact = artifact_of(ledger, home, name)
    if artifact.step == "export":
        return of_source(Model(id="hf", source=str(artifact.path / "hf")))
    if artifact.step != "base_model":
        raise BadInput(f"artifact {name} of step {artifact.step} is no model", hint='prosparse query "FROM variants"')
    model = Model(id=artifact.label.rpartition(" · ")[2], source=name)
    variant = _of_imported(artifact)
    return Target(model, variant.setting, variant.activation, shift=variant.shift, variant=variant)


def _of_imported(artifact: Artifact) -> Variant:
    """The variant that :func:`checkpoint` makes of a base_model artifact."""
    if (artifact.path / THRESHOLDS).is_file():
        return Variant("prosparse", artifact, "fatrelu", artifact)
    plain = plain_model(config_of(artifact.path / MODEL), where=str(artifact.path))
    if plain is None:
        return Variant("original", artifact, "original")
    return Variant(plain.setting, artifact, plain.activation, shift=plain.shift)


def artifact_of(ledger: Ledger, home: Path, digest: str) -> Artifact:
    """The artifact of a digest or of its beginning.

    Raises:
        BadInput: there is none, there are several, or the store no longer has it.
    """
    rows = ledger.query(
        f"SELECT DISTINCT digest, step, label, path FROM artifacts WHERE digest LIKE '{digest}%'"
    ).records()
    if len({r["digest"] for r in rows}) != 1:
        what = "is the beginning of several digests" if rows else "is in no artifact of the ledger"
        raise BadInput(f"{digest!r} {what}", hint='prosparse query "SELECT digest, step, label FROM artifacts"')
    row = rows[0]
    folder = Path(row["path"]) if Path(row["path"]).is_absolute() else home / row["path"]
    if not folder.is_dir():
        raise BadInput(f"artifact {digest} is no longer in the store: {folder} is gone", hint="run its recipe again")
    record = read_record(folder)
    return Artifact(row["step"], row["label"], record["fingerprint"], row["digest"], folder)

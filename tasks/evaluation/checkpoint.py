"""Any checkpoint as a variant: a folder, an exported model of ours, a hub id, a variant of the ledger, an artifact."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prosparse_core.errors import BadInput
from prosparse_core.export import CODE_FILES
from prosparse_core.families import EXPORTED, require_family
from prosparse_core.ledger import Ledger
from prosparse_core.recipe import Model
from prosparse_core.store import Artifact, read_record, require_space, write_json
from prosparse_core.variants import MODEL, THRESHOLDS, Variant
from tasks.base_model import base_model, hash_files, identity, sizes_of
from tasks.step import Run, Work

VERSION = 1
FATRELU_TYPES = {"sparsellama": "llama"}
"""model_type of FATReLU models others released (ProSparse-LLaMA-2) -> the architecture they are."""
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
    """A folder or a hub id with FATReLU written into its config."""
    variant: Variant | None = None
    """Already in the store."""


def find_checkpoint(model: str, home: Path, *, trust_remote_code: bool = False) -> Target:
    """What ``model`` names, checked without reading weights.

    Args:
        model: a folder, a .gguf file, a hub id, ``package:NAME``, a variant id of the ledger (``prosparse@1a2b3c4d``),
            a setting of which it has one variant (``prosparse``), or the digest of an artifact (8 characters or more).
        trust_remote_code: run the code that comes with a folder or a hub id.

    Raises:
        BadInput: it is none of these, its code is needed and not trusted, or its architecture is of no known family.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _of_folder(model, folder, trust_remote_code)
    if VARIANT_ID.match(model) or DIGEST.match(model) or SETTING.match(model):
        return _of_ledger(model, home)
    name = Path(model).stem if model.endswith(".gguf") else model
    found = Model(id=name, source=model, trust_remote_code=trust_remote_code)
    if HUB_ID.match(model) and is_fatrelu(_hub_config(model)):
        return Target(found, "prosparse", "fatrelu", exported=model)
    identity(found)
    return Target(found, "original", "original")


def checkpoint(run: Run, target: Target) -> Variant:
    """The variant of a target, its checkpoint brought into the store."""
    if target.variant is not None:
        return target.variant
    if target.exported is None:
        artifact = base_model(run, target.model)
        return Variant(target.setting, artifact, target.activation)
    folder = Path(target.exported).expanduser()
    if not folder.is_dir():
        folder = _download(target.exported)
    artifact = run.step(
        "base_model",
        f"base model · {target.model.id}",
        lambda work: _import_fatrelu(work, folder),
        version=VERSION,
        config={"exported": hash_files(sorted(p for p in folder.iterdir() if p.is_file()))},
        inputs={},
        needs_bytes=sum(p.stat().st_size for p in folder.glob("*.safetensors")),
    )
    return Variant(target.setting, artifact, "fatrelu", thresholds=artifact)


def _of_folder(model: str, folder: Path, trust_remote_code: bool) -> Target:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is no model folder: config.json is not readable ({error})") from error
    name = folder.resolve().name
    found = Model(id=name, source=str(folder), trust_remote_code=trust_remote_code)
    if is_fatrelu(config):
        dense_config(config, where=str(folder))
        if foreign := sorted(p.name for p in folder.glob("*.py") if p.name not in CODE_FILES):
            raise BadInput(
                f"{folder} is an exported model of an architecture with code of its own ({', '.join(foreign)}), which "
                "is not run from here",
                hint='measure the variant it was made of: prosparse query "SELECT variant FROM variants"',
            )
        if not list(folder.glob("*.safetensors")):
            raise BadInput(f"{folder} has no safetensors weights")
        return Target(found, "prosparse", "fatrelu", exported=str(folder))
    family = require_family(config, where=str(folder))
    identity(found)
    is_relu = str(config.get(family.config_key)) == "relu"
    return Target(found, "relu" if is_relu else "original", "relu" if is_relu else "original")


def _hub_config(model: str) -> dict[str, Any]:
    """The config of a model on the hub; empty when it cannot be had: base_model then says why."""
    from huggingface_hub import hf_hub_download

    try:
        return json.loads(Path(hf_hub_download(model, "config.json")).read_text(encoding="utf-8"))
    except Exception:  # the hub, the network and the cache have no common error
        return {}


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"cannot get {model!r} from the hub: {said}", hint="check the network") from error


def is_fatrelu(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a FATReLU model, ours or a released one."""
    model_type = str(config.get("model_type"))
    return model_type.startswith(EXPORTED) or model_type in FATRELU_TYPES


def dense_config(config: Mapping[str, Any], *, where: str) -> tuple[dict[str, Any], list[float]]:
    """(config of the plain architecture with ReLU, threshold per layer) of a FATReLU model's config.

    Raises:
        BadInput: unknown architecture, another activation, or not exactly one sound threshold per layer.
    """
    model_type = str(config["model_type"])
    plain = FATRELU_TYPES.get(model_type) or model_type.removeprefix(EXPORTED)
    family = require_family({**config, "model_type": plain}, where=where)
    activation = config.get(family.config_key, config.get("hidden_act"))
    one, each = config.get("hidden_act_param"), config.get("hidden_act_params")
    num_layers = family.num_layers(config)
    thresholds: Any = each if each is not None else [one] * num_layers
    sound = isinstance(thresholds, list) and all(
        isinstance(t, int | float) and not isinstance(t, bool) and 0 <= t < float("inf") for t in thresholds
    )
    if activation != "fatrelu" or not sound or len(thresholds) != num_layers or (one is None) == (each is None):
        raise BadInput(
            f"{where}: config.json must say hidden_act: fatrelu with hidden_act_param (all layers) or "
            f"hidden_act_params (one per layer), it says {activation!r}, {one!r} and {str(each)[:60]}",
            hint="these weights are wrong under any other activation: export the model again",
        )
    dropped = ("hidden_act_param", "hidden_act_params", "auto_map", "architectures", "_name_or_path")
    kept = {k: v for k, v in config.items() if k not in dropped}
    kept |= {"model_type": plain, **dict.fromkeys(family.activation_keys(config), "relu")}
    return kept, [float(t) for t in thresholds]


def _import_fatrelu(work: Work, folder: Path) -> None:
    """The weights as they are, under the plain architecture; the thresholds beside them."""
    config, thresholds = dense_config(
        json.loads((folder / "config.json").read_text(encoding="utf-8")), where=str(folder)
    )
    target = work.folder / MODEL
    require_space(target.parent, sum(p.stat().st_size for p in folder.glob("*.safetensors")), f"importing {folder}")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.py", "*.bin", "*.pt", "*.md", ".*"))
    write_json(target / "config.json", config)
    write_json(work.folder / THRESHOLDS, {"per_layer": thresholds, "rule": "imported"})
    work.meta.update(sizes_of(config))


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
        return _of_folder(name, artifact.path / "hf", trust_remote_code=False)
    if artifact.step != "base_model":
        raise BadInput(f"artifact {name} of step {artifact.step} is no model", hint='prosparse query "FROM variants"')
    label = artifact.label.rpartition(" · ")[2]
    variant = Variant("original", artifact, "original")
    return Target(Model(id=label, source=name), "original", "original", variant=variant)


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

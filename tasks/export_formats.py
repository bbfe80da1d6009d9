"""Other formats of what a finished run exported: found in the store by the run's own records, and written on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse_core.errors import BadInput
from prosparse_core.ledger import Ledger
from prosparse_core.source_precision import named
from prosparse_core.store import Artifact, Store, read_record
from prosparse_core.variants import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from prosparse_core.formats.powerinfer_export import PowerInferExport

CHECK_TOKENS = 1024
"""Held-out tokens on which a written file is compared with torch."""
SHORTEST_WINDOW = 2
"""Tokens: one is predicted from the other."""


@dataclass(frozen=True)
class Made:
    """One artifact of a run, with the variant and the corpora it was made of."""

    artifact: Artifact
    variant: Variant
    corpora: Artifact
    recipe: str
    model: str


def made_by(run_id: str, step: str, ledger: Ledger, home: Path) -> Made:
    """What a step of a run made last.

    Raises:
        BadInput: the run did not get there, or the store no longer has it.
    """
    rows = ledger.query(
        "SELECT a.digest, a.path, a.fingerprint, a.label, r.recipe, r.model FROM steps s JOIN runs r USING (run_id) "
        f"JOIN artifacts a ON a.digest = s.artifact WHERE s.run_id = '{run_id}' AND s.step = '{step}' "
        "ORDER BY s.ended_at DESC LIMIT 1"
    ).records()
    if not rows:
        raise BadInput(f"run {run_id} made no {step}", hint="let it run to its end: prosparse run RECIPE")
    row = rows[0]
    folder = home / row["path"]
    if not folder.is_dir():
        raise BadInput(f"the {step} of run {run_id} is no longer at {folder}", hint="run the recipe again")
    record = read_record(folder)
    store = Store(home)

    def input_(role: str) -> Artifact:
        found = record["inputs"][role]
        artifact = store.find(found["step"], role, found["fingerprint"])
        if artifact is None:
            raise BadInput(f"the {role} of run {run_id} is no longer in the store", hint="run the recipe again")
        return artifact

    config: dict[str, Any] = record["payload"]["config"]["variant"]
    variant = Variant(
        config["setting"],
        input_("checkpoint"),
        config["activation"],
        input_("thresholds") if "thresholds" in record["inputs"] else None,
        shift=float(config["shift"]) if "shift" in config else None,
    )
    artifact = Artifact(step, row["label"], row["fingerprint"], row["digest"], folder)
    return Made(artifact, variant, input_("corpora"), row["recipe"], row["model"])


def to_powerinfer(
    made: Made,
    target: Path,
    *,
    cutoff: float | None = None,
    dtype: Any = "f16",
    strict: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> PowerInferExport:
    """The model and the predictors of a run's predictor step as one PowerInfer file; see ``export_powerinfer``."""
    from prosparse_core.formats.powerinfer_export import export_powerinfer

    return export_powerinfer(
        made.variant,
        made.artifact.path,
        target,
        windows=check_windows(made),
        name=named(made.model, made.variant.source_precision),
        cutoff=cutoff,
        dtype=dtype,
        strict=strict,
        progress=progress,
    )


def check_windows(made: Made, max_tokens: int = CHECK_TOKENS) -> list[Tensor]:
    """The first held-out windows of the run's corpora, each [1, length], ``max_tokens`` in all at most."""
    from prosparse_core.variants import MODEL, load_tokenizer
    from tasks.predictor_quality import held_out_tokens

    tokenizer = load_tokenizer(made.variant.checkpoint.path / MODEL)
    found = [window.tokens for window in held_out_tokens(made.corpora.path, tokenizer, max_tokens, attend_across=True)]
    beyond = sum(tokens.numel() for tokens in found) - max_tokens
    if beyond > 0:
        found[-1] = found[-1][:, :-beyond]
    return [tokens for tokens in found if tokens.shape[1] >= SHORTEST_WINDOW]

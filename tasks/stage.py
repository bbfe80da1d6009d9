"""stage: one regularization stage, resumable, with the optimizer's state carried from the stage before."""

from __future__ import annotations

import shutil

from prosparse_core.precision import Precision, resolve, resolve_device
from prosparse_core.schedule import first_step
from prosparse_core.store import Artifact
from prosparse_core.variants import MODEL
from tasks.step import Run, Work

VERSION = 1


def train_stage(run: Run, index: int, before: Artifact, corpora: Artifact) -> Artifact:
    """The artifact with the weights after stage ``index`` in ``model/``, the optimizer's state and the log.

    Args:
        index: 0 is ReLU substitution (lambda 0), 1 the warm-up, 2.. the incremental stages (Algorithm 1).
        before: the dense model for stage 0, the stage before for all others.
    """
    train = run.recipe.train
    device = resolve_device(run.recipe.runtime.device)
    precision = resolve(run.recipe.model.precision, device)
    return run.step(
        "stage",
        label(run, index),
        lambda work: _build(work, run, index, before, corpora, precision, device),
        version=VERSION,
        config={
            "stage": index,
            "stages": [s.model_dump(mode="json") for s in train.stages[: index + 1]],
            "train": train.model_dump(mode="json", exclude={"stages"}),
            "total_steps": train.total_steps,
            "precision": precision,
        },
        inputs={"before": before, "corpora": corpora},
        stage=index,
        needs_bytes=3 * _weight_bytes(before),
    )


def label(run: Run, index: int) -> str:
    """``stage 2 · lambda 0.005→0.05 · steps 80-140``."""
    stages = run.recipe.train.stages
    stage = stages[index]
    rising = stage.ramp == "sine" and stages[index - 1].l1 != stage.l1
    factor = f"{stages[index - 1].l1:g}→{stage.l1:g}" if rising else f"{stage.l1:g}"
    phase = "" if stage.phase == "prosparse" else f" · {stage.phase}"
    return f"stage {index} · lambda {factor} · steps {first_step(stages, index)}-{stage.until_step}{phase}"


def _weight_bytes(before: Artifact) -> int:
    """fp32 bytes of the weights an artifact holds, 0 while it is only planned."""
    if before.folder is None:
        return 0
    return sum(p.stat().st_size for p in (before.path / MODEL).glob("*.safetensors"))


def _build(
    work: Work, run: Run, index: int, before: Artifact, corpora: Artifact, precision: Precision, device: str
) -> None:
    import torch

    from prosparse_core.mixing import Mixture
    from prosparse_core.substitute import use_relu
    from prosparse_core.training import CHECKPOINTS, OPTIMIZER, make_optimizer, train_stage
    from prosparse_core.variants import load_model

    train, runtime = run.recipe.train, run.recipe.runtime
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    model, tokenizer = load_model(before.path / MODEL, device)
    use_relu(model)
    optimizer = make_optimizer(model, train)
    if index > 0:
        optimizer.load_state_dict(torch.load(before.path / OPTIMIZER, map_location=device, weights_only=True))
    train_stage(
        model,
        optimizer,
        Mixture(corpora.path, run.recipe.seed),
        train,
        index,
        work.folder,
        precision=precision,
        runtime=runtime,
        progress=work.progress,
    )
    work.progress.note("writing the stage's weights and optimizer state")
    model.save_pretrained(work.folder / MODEL)
    tokenizer.save_pretrained(work.folder / MODEL)
    torch.save(optimizer.state_dict(), work.folder / OPTIMIZER)
    shutil.rmtree(work.folder / CHECKPOINTS, ignore_errors=True)
    work.meta.update(
        stage=index, l1=train.stages[index].l1, tokens=train.stages[index].until_step * train.tokens_per_step
    )

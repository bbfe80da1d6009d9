"""stage: one regularization stage, resumable, with the optimizer's state carried from the stage before."""

from __future__ import annotations

from collections.abc import Sequence

from prosparse_core.errors import ProSparseError
from prosparse_core.precision import Precision, resolve, resolve_device
from prosparse_core.recipe_train import Train
from prosparse_core.schedule import first_step
from prosparse_core.store import Artifact, read_record
from prosparse_core.variants import MODEL, OPTIMIZER
from tasks.step import Run, Work

VERSION = 4
DISTILLATION_VERSION = 2
STEERING_VERSION = 4
"""Of what a teacher adds to the loss, and of how lambda is steered: raised alone, they leave the other stages alone."""


def train_stage(
    run: Run,
    train: Train,
    index: int,
    before: Artifact,
    corpora: Artifact,
    *,
    dense: Artifact,
    seed: int | None = None,
    note: str = "",
    holding: Sequence[str] = (),
) -> Artifact:
    """The artifact with the weights after stage ``index`` in ``model/``, the optimizer's state and the log.

    Args:
        train: the recipe's, or a setting's variation of it.
        index: 0 is ReLU substitution (lambda 0), 1 the warm-up, 2.. the incremental stages (Algorithm 1).
        before: the dense model for stage 0, the stage before for all others.
        dense: the dense original, from which a stage may distil.
        seed: of the data order; None is the recipe's.
        note: what people read besides the stage, such as the setting.
        holding: files of it that are needed, though the rule ``runtime.keep: last`` may have taken them away.
    """
    device = resolve_device(run.recipe.runtime.device)
    precision = resolve(run.recipe.model.precision, device)
    seed = run.recipe.seed if seed is None else seed
    stage = train.stages[index]
    inputs = {"before": before, "corpora": corpora}
    if stage.distill is not None:
        inputs["teacher"] = dense
    config = {
        "stage": index,
        "stages": [s.model_dump(mode="json") for s in train.stages[: index + 1]],
        "train": train.model_dump(mode="json", exclude={"stages"}),
        **({"total_steps": train.total_steps} if train.schedule == "cosine" else {}),
        "precision": precision,
        "attend_across_documents": run.recipe.data.attend_across_documents,
        **({} if stage.distill is None else {"distillation": DISTILLATION_VERSION}),
        **({} if stage.target_sparsity is None else {"steering": STEERING_VERSION}),
    }
    if index and run.would_run("stage", version=VERSION, config=config, inputs=inputs, seed=seed, holding=holding):
        inputs["before"] = _with_optimizer(run, train, index - 1, before, corpora, dense, note)
    return run.step(
        "stage",
        label(train, index) + (f" · {note}" if note else ""),
        lambda work: _build(work, run, train, index, inputs, precision, device, seed),
        version=VERSION,
        config=config,
        inputs=inputs,
        seed=seed,
        stage=index,
        needs_bytes=3 * _weight_bytes(before),
        holding=holding,
    )


def _with_optimizer(
    run: Run, train: Train, index: int, stage: Artifact, corpora: Artifact, dense: Artifact, note: str
) -> Artifact:
    """A finished stage with its optimizer's state; trained again where ``runtime.keep: last`` took it away."""
    if stage.folder is None or (stage.path / OPTIMIZER).exists():
        return stage
    record = read_record(stage.path)
    found = record["inputs"]["before"]
    before = run.store.find(found["step"], label(train, index - 1) if index else "base model", found["fingerprint"])
    if before is None:
        raise ProSparseError(
            f"{stage.label}: its optimizer's state was dropped, and what it was trained from is no longer in the store",
            hint=f"delete the folder {stage.path}; the next run makes it again",
        )
    seed = record["payload"]["seed"]
    again = train_stage(run, train, index, before, corpora, dense=dense, seed=seed, note=note, holding=[OPTIMIZER])
    if again.digest not in (stage.digest, None):
        raise ProSparseError(
            f"{stage.label} was trained again, for its optimizer's state, and came out otherwise than before (another "
            "machine, or another number of threads?): what was measured of it no longer belongs to it",
            hint="run the same command again: it goes on from the stage as it is now",
        )
    return again


def label(train: Train, index: int) -> str:
    """``stage 2 · lambda 0.005→0.05 · steps 80-140``."""
    stages = train.stages
    stage = stages[index]
    rising = stage.ramp != "constant" and stages[index - 1].l1 != stage.l1
    factor = f"lambda {stages[index - 1].l1:g}→{stage.l1:g}" if rising else f"lambda {stage.l1:g}"
    if stage.target_sparsity is not None:
        factor = f"lambda for {stage.target_sparsity:.0%} sparsity"
    phase = "" if stage.phase == "prosparse" else f" · {stage.phase}"
    return f"stage {index} · {factor} · steps {first_step(stages, index)}-{stage.until_step}{phase}"


def _weight_bytes(before: Artifact) -> int:
    """fp32 bytes of the weights an artifact holds, 0 while it is only planned."""
    if before.folder is None:
        return 0
    return sum(p.stat().st_size for p in (before.path / MODEL).glob("*.safetensors"))


def _build(
    work: Work,
    run: Run,
    train: Train,
    index: int,
    inputs: dict[str, Artifact],
    precision: Precision,
    device: str,
    seed: int,
) -> None:
    from prosparse_core.mixing import Mixture
    from prosparse_core.stage_job import StageJob, run_stage
    from prosparse_core.training_log import last_lambda

    runtime = run.recipe.runtime
    job = StageJob(
        label=label(train, index),
        folder=work.folder,
        before=inputs["before"].path,
        corpora=inputs["corpora"].path,
        teacher=inputs["teacher"].path if "teacher" in inputs else None,
        train=train,
        index=index,
        seed=seed,
        precision=precision,
        device=device,
        runtime=runtime,
        attend_across=run.recipe.data.attend_across_documents,
        tracking=run.home / "tensorboard" / run.recipe.name / work.folder.name if runtime.tracking else None,
    )
    if runtime.is_launched:
        from prosparse_core.distributed.launch import launch

        work.meta.update(processes=runtime.world_size, parallel=runtime.parallel)
        launch(job, work.progress, run.leader)
    else:
        run_stage(job, work.progress)
    last = train.stages[index].until_step
    mixture = Mixture(inputs["corpora"].path, seed, stages=train.stages[: index + 1])
    epochs = mixture.epochs(last, train.tokens_per_step // mixture.seq_len)
    for corpus, times in epochs.items():
        if times > 1:
            work.progress.note(f"{corpus}: by step {last} training has gone {times:.1f} times over its text")
    work.meta.update(stage=index, l1=last_lambda(work.folder), tokens=last * train.tokens_per_step, epochs=epochs)

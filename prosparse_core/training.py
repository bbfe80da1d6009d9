"""The loop of one stage: next-token loss + lambda * L1(x1) (paper, eq. 2), resumable to the bit."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prosparse_core import checkpoint
from prosparse_core.distillation import distillation_loss
from prosparse_core.distributed.parallel import Forward
from prosparse_core.distributed.ranks import ALONE, Ranks
from prosparse_core.document_masks import forward_arguments
from prosparse_core.errors import ProSparseError
from prosparse_core.loss import next_token_loss
from prosparse_core.mixing import Batch, Mixture
from prosparse_core.precision import Precision, autocast
from prosparse_core.progress import Progress
from prosparse_core.recipe import Runtime
from prosparse_core.recipe_train import Train
from prosparse_core.regularizer import L1Regularizer
from prosparse_core.schedule import first_step, l1_lambda, learning_rate
from prosparse_core.steering import Steering

LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
RANK_SEEDS = 1_000_003
"""Apart: seeds of two processes, whose dropout must differ."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of the training log."""

    stage: int
    step: int
    tokens: int
    l1_lambda: float
    lr: float
    lm_loss: float
    l1: float
    """The reduced |x1| (see ``l1_reduction``), without lambda."""
    l1_term: float
    """lambda * l1: what is added to the loss."""
    mean_abs_x1: float
    sparsity: float
    grad_norm: float
    distill: float | None
    """KL from the dense original (times temperature^2) per token, without its weight; None without distillation."""
    tokens_per_s: float
    wall_s: float


def freeze(model: nn.Module, train: Train) -> None:
    """Leave out of training what ``train.freeze`` names; before the model is sharded."""
    if "embeddings" in train.freeze:
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
            layer.requires_grad_(False)


def make_optimizer(model: nn.Module, train: Train) -> torch.optim.AdamW:
    """AdamW over the weights that are trained (see ``train.freeze``); decay only on matrices."""
    freeze(model, train)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=True)


def train_stage(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mixture: Mixture,
    train: Train,
    index: int,
    folder: Path,
    *,
    precision: Precision,
    runtime: Runtime,
    progress: Progress,
    teacher: nn.Module | None = None,
    lambda_before: float = 0.0,
    ranks: Ranks = ALONE,
    identity: Mapping[str, str] | None = None,
) -> None:
    """Train ``model`` in place through stage ``index``, from wherever its newest checkpoint stands.

    Args:
        model: already substituted, on its device, fp32 weights; sharded or not, but not wrapped.
        optimizer: carries its state from the stage before.
        folder: work folder of the stage; receives ``log.jsonl`` and, while running, ``checkpoints/``.
        teacher: the dense original, for a stage that distils from it.
        lambda_before: the factor at the end of the stage before: where a steered stage begins.
        ranks: the processes that train together; each takes its share of every step's batch.
        identity: what the checkpoints belong to, by digest.

    Raises:
        ProSparseError: the loss is no longer finite.
        BadInput: the newest checkpoint belongs to another model, other data or another recipe.
        EnvironmentProblem: the disk is full.
    """
    device = next(model.parameters()).device.type
    first, last = first_step(train.stages, index), train.stages[index].until_step
    torch.manual_seed(first + RANK_SEEDS * ranks.rank)
    stage = train.stages[index]
    assert (teacher is None) == (stage.distill is None)
    checkpoints = folder / CHECKPOINTS
    done, extra = checkpoint.restore(checkpoints, model, optimizer, progress, device, ranks=ranks, identity=identity)
    steering = None
    if stage.target_sparsity is not None:
        steering = (
            Steering(**extra) if extra else Steering(stage.target_sparsity, last - first + 1, l1_lambda=lambda_before)
        )
    start = max(first, done + 1)
    log_path = folder / LOG if ranks.is_first else Path(os.devnull)
    _cut_log(log_path, before=start)
    model.train()
    saved_at = time.monotonic()
    regularizer = L1Regularizer(model, train.l1_reduction, compiled=runtime.compile)
    with regularizer, open(log_path, "a", encoding="utf-8") as log:
        regularizer.num_processes = ranks.size
        loop = _Loop(model, optimizer, regularizer, mixture, train, index, precision, teacher, ranks)
        if start <= last:
            loop.settle(start)
        if start <= last and steering is None:
            regularizer.l1_lambda = l1_lambda(train.stages, last)
            progress.note(
                f"lambda at the end {regularizer.l1_lambda:g}: per element of x1 "
                f"{regularizer.element_coefficient(train.tokens_per_step):.3g}"
            )
        for step in range(start, last + 1):
            regularizer.l1_lambda = steering.l1_lambda if steering else l1_lambda(train.stages, step)
            metrics = loop.step(step)
            if steering:
                steering.update(metrics.sparsity, metrics.lm_loss, metrics.l1)
            log.write(json.dumps(asdict(metrics)) + "\n")
            log.flush()
            progress.update(
                step - first + 1,
                last - first + 1,
                step=step,
                **{"lambda": metrics.l1_lambda},
                lm_loss=metrics.lm_loss,
                l1=metrics.l1,
                sparsity=metrics.sparsity,
                tokens_per_s=metrics.tokens_per_s,
            )
            if not math.isfinite(metrics.lm_loss) or not math.isfinite(metrics.grad_norm):
                raise ProSparseError(
                    f"stage {index}, step {step}: loss {metrics.lm_loss}, gradient norm {metrics.grad_norm}",
                    hint="lower train.lr or the stage's l1",
                )
            by_steps = runtime.checkpoint_every_steps and step % runtime.checkpoint_every_steps == 0
            by_time = ranks.from_first(time.monotonic() - saved_at > 60 * runtime.checkpoint_every_minutes)
            if step < last and (by_steps or by_time):
                state = steering.state() if steering else None
                checkpoint.save(checkpoints, step, model, optimizer, state, ranks=ranks, identity=identity)
                saved_at = time.monotonic()
        if steering:
            progress.note(
                f"lambda was steered to {steering.l1_lambda:.4g} for {steering.target:.1%} sparsity: per element of x1 "
                f"{regularizer.element_coefficient(train.tokens_per_step):.3g}"
            )
    model.eval()


@dataclass
class _Loop:
    """What every step of a stage needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    regularizer: L1Regularizer
    mixture: Mixture
    train: Train
    index: int
    precision: Precision
    teacher: nn.Module | None
    ranks: Ranks

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.forward = Forward(self.model, self.ranks)

    def settle(self, step: int) -> None:
        """See :meth:`prosparse_core.distributed.parallel.Forward.settle`."""
        if self.ranks.size > 1:
            tokens = self._batch(step).tokens[self.ranks.share(self._sequences)]
            self.forward.settle(tokens.to(self.device))
            self.regularizer.forget()

    @property
    def _sequences(self) -> int:
        return self.train.tokens_per_step // self.mixture.seq_len

    def _batch(self, step: int) -> Batch:
        """The whole step's, whatever the number of processes."""
        return self.mixture.batch(step, self._sequences)

    def _taught(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """The teacher's logits, which nothing keeps."""
        assert self.teacher is not None
        more = forward_arguments(self.teacher, positions)
        with torch.no_grad(), autocast(self.precision, self.device.type):
            logits: Tensor = self.teacher(input_ids=tokens, use_cache=False, **more).logits
        return logits

    def step(self, step: int) -> StepMetrics:
        """One update of the weights from this process's share of the batch and the gradients of all."""
        began = time.perf_counter()
        train, ranks, regularizer, device = self.train, self.ranks, self.regularizer, self.device
        rate = learning_rate(train, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        distill = train.stages[self.index].distill
        batch = self._batch(step)
        num_labels = int((batch.labels[:, 1:] != -100).sum())
        mine = ranks.share(self._sequences)
        parts = list(_micro_batches(batch, mine, train.micro_batch))
        lm_loss, distilled = torch.zeros((), device=device), torch.zeros((), device=device)
        for number, (tokens, labels, positions) in enumerate(parts, start=1):
            regularizer.scale = len(tokens) / self._sequences
            tokens, labels = tokens.to(device), labels.to(device)
            with self.forward.accumulating(is_last=number == len(parts)):
                with autocast(self.precision, device.type):
                    logits = self.forward(tokens, positions)
                loss = next_token_loss(logits, labels) / max(1, num_labels)
                lm_loss += loss.detach()
                if self.teacher is not None and distill is not None:
                    share = distill.weight / max(1, num_labels)
                    divergence = distillation_loss(
                        logits, self._taught(tokens, positions), labels, distill.temperature, share
                    )
                    distilled += divergence.detach() / distill.weight
                    loss = loss + divergence
                (ranks.size * loss).backward()  # the gradients are averaged over the processes
        norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip)
        if hasattr(norm, "full_tensor"):  # of a sharded model
            norm = norm.full_tensor()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        l1, mean_abs_x1, sparsity = regularizer.collect(ranks.group)
        sum_loss, sum_distilled = ranks.sums(float(lm_loss), float(distilled))
        wall = time.perf_counter() - began
        return StepMetrics(
            stage=self.index,
            step=step,
            tokens=step * train.tokens_per_step,
            l1_lambda=regularizer.l1_lambda,
            lr=rate,
            lm_loss=sum_loss,
            l1=l1,
            l1_term=regularizer.l1_lambda * l1,
            mean_abs_x1=mean_abs_x1,
            sparsity=sparsity,
            grad_norm=float(norm),
            distill=None if distill is None else sum_distilled,
            tokens_per_s=train.tokens_per_step / wall,
            wall_s=wall,
        )


def _micro_batches(batch: Batch, mine: slice, micro: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Tokens, labels and positions of one process's share, ``micro`` sequences at a time."""
    tokens, labels = batch.tokens[mine], batch.labels[mine]
    size = micro or len(tokens)
    places = [None] * -(-len(tokens) // size) if batch.positions is None else batch.positions[mine].split(size)
    yield from zip(tokens.split(size), labels.split(size), places, strict=True)


def last_lambda(folder: Path) -> float:
    """The factor of the last step that the log of a stage tells of; 0 where there is none."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return float(json.loads(lines[-1])["l1_lambda"]) if lines else 0.0


def _cut_log(path: Path, before: int) -> None:
    """Keep only whole lines of steps before ``before``: the others are about to be run again."""
    if not path.is_file():
        return
    kept: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] < before:
            kept.append(entry)
    path.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")

"""The loop of one stage: next-token loss + lambda * L1(x1) (paper, eq. 2), resumable to the bit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prosparse_core import checkpoint
from prosparse_core.checkpoint_pace import Clock
from prosparse_core.distillation import distillation_loss
from prosparse_core.distributed.checkpoint_shards import num_bytes
from prosparse_core.distributed.parallel import Forward
from prosparse_core.distributed.ranks import ALONE, Ranks
from prosparse_core.document_masks import forward_arguments
from prosparse_core.guard import Events, Guard, Verdict
from prosparse_core.loss import next_token_loss
from prosparse_core.mixing import Batch, Mixture
from prosparse_core.precision import Precision, autocast
from prosparse_core.progress import Progress
from prosparse_core.recipe import Runtime
from prosparse_core.recipe_train import Train
from prosparse_core.regularizer import L1Regularizer
from prosparse_core.schedule import first_step, learning_rate
from prosparse_core.stage_course import Eyes, StageCourse
from prosparse_core.training_log import CHECKPOINTS, StepMetrics

RANK_SEEDS = 1_000_003
"""Apart: seeds of two processes, whose dropout must differ."""


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
    held_out: Mapping[str, Batch] | None = None,
    tracking: Path | None = None,
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
        held_out: windows by corpus to look at now and then; see :mod:`prosparse_core.monitor`.
        tracking: folder for TensorBoard event files.

    Raises:
        ProSparseError: a step that is not finite, or a spike, ends the stage by rule; or there were too many.
        BadInput: the newest checkpoint belongs to another model, other data or another recipe.
        EnvironmentProblem: the disk is full.
    """
    device = next(model.parameters()).device.type
    stage, first = train.stages[index], first_step(train.stages, index)
    torch.manual_seed(first + RANK_SEEDS * ranks.rank)
    assert (teacher is None) == (stage.distill is None)
    regularizer = L1Regularizer(model, train.l1_reduction, compiled=runtime.compile)
    saver = checkpoint.Writer(
        folder / CHECKPOINTS, model, optimizer, ranks=ranks, identity=identity, reach=train.rollback_reach
    )
    with regularizer, saver:
        regularizer.num_processes = ranks.size
        loop = Loop(model, optimizer, regularizer, mixture, train, index, precision, teacher, ranks)
        clock = Clock(runtime, num_bytes(model, optimizer), on_cpu=device == "cpu")
        eyes = Eyes(loop, runtime, folder, held_out or {})
        run = StageCourse(
            loop,
            folder,
            runtime,
            progress,
            lambda_before,
            identity,
            saver,
            clock,
            eyes,
            Events(folder, ranks),
            tracking,
        )
        run.run()
    model.eval()


@dataclass
class Loop:
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

    @property
    def batch_size(self) -> int:
        """Sequences of a forward pass."""
        return self.train.micro_batch or self._sequences // self.ranks.size

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

    def step(self, step: int, guard: Guard) -> tuple[StepMetrics, Verdict | None]:
        """One update of the weights from this process's share of the batch and the gradients of all.

        Or none, where the guard has found the step bad.
        """
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
        # What every process decides by is what all have summed up: the same to the bit.
        sum_loss, sum_distilled, sum_norm = ranks.sums(float(lm_loss), float(distilled), float(norm))
        verdict = guard.judge(sum_loss, sum_norm / ranks.size)
        if verdict is None or verdict.takes_step:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        l1, mean_abs_x1, sparsity = regularizer.collect(ranks.group)
        wall = time.perf_counter() - began
        metrics = StepMetrics(
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
            skipped=None if verdict is None or verdict.takes_step else verdict.reason,
        )
        return metrics, verdict

    def passed(self, step: int) -> StepMetrics:
        """The line of a step that is not taken at all."""
        nan = float("nan")
        return StepMetrics(
            stage=self.index,
            step=step,
            tokens=step * self.train.tokens_per_step,
            l1_lambda=self.regularizer.l1_lambda,
            lr=learning_rate(self.train, step),
            **dict.fromkeys(("lm_loss", "l1", "l1_term", "mean_abs_x1", "sparsity", "grad_norm"), nan),
            distill=None,
            tokens_per_s=nan,
            wall_s=nan,
            skipped="taken back, with a later step",
        )


def _micro_batches(batch: Batch, mine: slice, micro: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Tokens, labels and positions of one process's share, ``micro`` sequences at a time."""
    tokens, labels = batch.tokens[mine], batch.labels[mine]
    size = micro or len(tokens)
    places = [None] * -(-len(tokens) // size) if batch.positions is None else batch.positions[mine].split(size)
    yield from zip(tokens.split(size), labels.split(size), places, strict=True)

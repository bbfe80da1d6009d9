"""speed of a shape alone: the kernels on random weights and masks, such as those of a model that is not here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prosparse_core.errors import BadInput, EnvironmentProblem
from prosparse_core.store import Artifact
from tasks.step import Run, Work, provenance
from tasks.timing.facts import Reporter

VERSION = 3
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MAX_WIDTH = 1 << 20


@dataclass(frozen=True)
class Synthetic:
    """One layer of random weights and the share of its neurons that random masks kill."""

    d_model: int
    d_ff: int
    dtype: str
    """One of :data:`DTYPES`."""
    sparsity: float

    @property
    def name(self) -> str:
        return f"{self.d_model}x{self.d_ff}"


def parse_synthetic(shape: str, dtype: str, sparsity: float) -> Synthetic:
    """``4096x11008`` (d_model x d_ff) and its conditions.

    Raises:
        BadInput: not two positive numbers, an unknown dtype, a share outside 0 to 1.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", shape)
    if not found or not all(1 <= int(n) <= MAX_WIDTH for n in found.groups()):
        raise BadInput(
            f"--shape {shape}: two numbers from 1 to {MAX_WIDTH}, d_model x d_ff", hint="for example --shape 4096x11008"
        )
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    if not 0 <= sparsity <= 1:
        raise BadInput(f"--sparsity {sparsity:g}: a share from 0 to 1, such as 0.89")
    return Synthetic(int(found[1]), int(found[2]), dtype, sparsity)


def speed_synthetic(run: Run, synthetic: Synthetic) -> Artifact:
    """The artifact with the speed-ups of S2, S3 and the FFN of such a layer, like those of the speed step."""
    section = run.recipe.speed
    return run.step(
        "speed",
        f"speed · {synthetic.name}, {synthetic.dtype}, {synthetic.sparsity:.0%} zeros",
        lambda work: _build(work, run, synthetic),
        version=VERSION,
        config={
            "speed": section.model_dump(mode="json", include={"threads", "budget_s"}),
            "synthetic": vars(synthetic),
            "cpu": provenance()["cpu"],
        },
        inputs={},
    )


def _build(work: Work, run: Run, synthetic: Synthetic) -> None:
    import torch

    from kernels import cpu
    from kernels.bench import bench_layers, random_case
    from kernels.measure import torch_threads

    section = run.recipe.speed
    native = cpu.available()
    if native and section.threads > 1 and not cpu.load().openmp:
        raise EnvironmentProblem(
            f"{section.threads} threads: this machine's compiler has no OpenMP", hint="use --threads 1"
        )
    report = Reporter(work, run, None, None if native else f"no native kernels: {native.why}")
    dtype: torch.dtype = getattr(torch, DTYPES[synthetic.dtype])
    work.progress.update(0, 1, phase="random weights")
    weights, x, threshold = random_case(
        synthetic.d_model, synthetic.d_ff, synthetic.sparsity, dtype, run.recipe.seed, tokens=section.num_tokens
    )
    with torch_threads(section.threads):
        rows = bench_layers(
            [weights],
            [x],
            [threshold],
            mask_source="random",
            threads=section.threads,
            budget_s=section.budget_s,
            progress=report.part("kernels", 0.0, 1.0),
            ceiling=report.ceiling,
        )
    report.kernels(rows, is_synthetic=True)
    report.finish()

"""The memory that ``prosparse plan`` estimates beside the peak RSS of a fresh process that trains: ``make memory``.

Each case runs real optimizer steps through ``prosparse_core.training`` in a process of its own and writes what a stage
writes; the kernel's VmHWM of that process is the measurement.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2
"""The optimizer's moments are there from the second on."""


@dataclass(frozen=True)
class Case:
    """One training run: a model's sizes, and how it is trained."""

    name: str
    num_layers: int
    d_model: int
    d_ff: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    sequences: int
    seq_len: int
    precision: str
    tied: bool = True
    passes: int = 1
    frozen_embeddings: bool = False
    distil: bool = False


def sizes(name: str, layers: int, d: int, ff: int, vocab: int, heads: int, kv: int) -> dict[str, int | str]:
    return {
        "name": name, "num_layers": layers, "d_model": d, "d_ff": ff, "vocab_size": vocab, "num_heads": heads,
        "num_kv_heads": kv,
    }  # fmt: skip


M10 = sizes("10M", 6, 256, 688, 16384, 4, 2)
M40 = sizes("40M", 8, 512, 1376, 32000, 8, 8)
M135 = sizes("SmolLM2-135M", 30, 576, 1536, 49152, 9, 3)
CASES = [
    Case(**M10, sequences=4, seq_len=256, precision="fp32"),  # type: ignore[arg-type]
    Case(**M10, sequences=8, seq_len=512, precision="bf16"),  # type: ignore[arg-type]
    Case(**M40, sequences=2, seq_len=512, precision="fp32", tied=False),  # type: ignore[arg-type]
    Case(**M40, sequences=1, seq_len=256, precision="bf16", tied=False, passes=2),  # type: ignore[arg-type]
    Case(**M40, sequences=8, seq_len=512, precision="bf16"),  # type: ignore[arg-type]
    Case(**M135, sequences=2, seq_len=512, precision="bf16", frozen_embeddings=True),  # type: ignore[arg-type]
    Case(**M135, sequences=1, seq_len=256, precision="fp32"),  # type: ignore[arg-type]
    Case(**M135, sequences=4, seq_len=512, precision="fp32", passes=2),  # type: ignore[arg-type]
    Case(**M135, sequences=2, seq_len=256, precision="bf16", distil=True),  # type: ignore[arg-type]
]


def estimate(case: Case) -> tuple[int, dict[str, int], str]:
    """(bytes in all, by term, the moment) as ``prosparse plan`` says them."""
    from prosparse_core.planning.hardware import CPU
    from prosparse_core.planning.layout import Layout
    from prosparse_core.planning.memory import Training, memory
    from prosparse_core.recipe_machine import Shape

    shape = Shape(**{k: v for k, v in asdict(case).items() if k in Shape.model_fields})
    training = Training(shape, case.seq_len, case.precision, case.frozen_embeddings, case.distil)  # type: ignore[arg-type]
    found = memory(training, Layout(CPU, 2, 1, 1, "single", case.sequences, case.passes, False))
    return found.total, found.terms, found.moment


def measure(case: Case) -> int:
    """Peak resident bytes of a fresh process that trains the case."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, json.dumps(asdict(case))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def train(case: Case) -> None:
    """In the child: build, train, write, print VmHWM."""
    import torch
    from torch.distributed.checkpoint import FileSystemWriter
    from transformers import AutoConfig, AutoModelForCausalLM

    from prosparse_core.memory import keep_freed_memory
    from prosparse_core.mixing import Batch
    from prosparse_core.progress import Silent
    from prosparse_core.recipe import Runtime
    from prosparse_core.recipe_train import Distill, Stage, Train
    from prosparse_core.substitute import use_relu
    from prosparse_core.training import make_optimizer, train_stage
    from prosparse_core.variants import OPTIMIZER

    class Uniform:
        seq_len = case.seq_len

        def batch(self, step: int, sequences: int) -> Batch:
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(3, case.vocab_size, (sequences, case.seq_len), generator=generator)
            return Batch(tokens=tokens, labels=tokens.clone(), corpora=[0] * sequences)

    class Saving(Silent):
        """Lets the writing of the checkpoint begin after the last step: until then its copy is there, as at worst."""

        def update(self, done: float, total: float, **fields: float | int | str) -> None:
            if done == total:
                may_write.set()

    may_write, write_data = threading.Event(), FileSystemWriter.write_data

    def late(*arguments: Any) -> Any:
        may_write.wait()
        return write_data(*arguments)

    FileSystemWriter.write_data = late

    def build() -> torch.nn.Module:
        config = AutoConfig.for_model(
            "llama",
            vocab_size=case.vocab_size,
            hidden_size=case.d_model,
            intermediate_size=case.d_ff,
            num_hidden_layers=case.num_layers,
            num_attention_heads=case.num_heads,
            num_key_value_heads=case.num_kv_heads,
            max_position_embeddings=case.seq_len,
            tie_word_embeddings=case.tied,
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    keep_freed_memory()  # as every run does
    distil = Distill() if case.distil else None
    train = Train(
        tokens_per_step=case.sequences * case.passes * case.seq_len,
        micro_batch=case.sequences,
        lr=1e-4,
        freeze=["embeddings"] if case.frozen_embeddings else [],
        stages=[Stage(until_step=1, l1=0), Stage(until_step=1 + STEPS, l1=0.1, distill=distil)],
    )
    model = build()
    use_relu(model)
    optimizer = make_optimizer(model, train)
    with tempfile.TemporaryDirectory() as folder:
        train_stage(
            model,
            optimizer,
            Uniform(),  # type: ignore[arg-type]
            train,
            1,
            Path(folder),
            precision=case.precision,  # type: ignore[arg-type]
            runtime=Runtime(checkpoint_every_steps=2),
            progress=Saving(),
            teacher=build().eval() if distil else None,
        )
        model.save_pretrained(folder)  # type: ignore[operator]
        torch.save(optimizer.state_dict(), Path(folder) / OPTIMIZER)
    status = Path("/proc/self/status").read_text()
    print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))


def main(arguments: list[str]) -> None:
    if arguments and arguments[0].startswith("{"):
        return train(Case(**json.loads(arguments[0])))
    sys.path.insert(0, str(ROOT))
    worst = 0.0
    for case in CASES:
        if arguments and case.name not in arguments:
            continue
        measured, (total, _, moment) = measure(case), estimate(case)
        off = total / measured - 1
        worst = max(worst, abs(off))
        notes = [f"{case.passes} passes"] * (case.passes > 1) + ["embeddings frozen"] * case.frozen_embeddings
        notes += ["untied"] * (not case.tied) + ["distils"] * case.distil
        how = f"{case.sequences} x {case.seq_len} {case.precision} {', '.join(notes)}"
        print(f"{case.name:13} {how:42} planned {total / 2**20:7.0f} MiB  measured {measured / 2**20:7.0f} MiB  "
              f"{100 * off:+5.1f} %  ({moment})", flush=True)  # fmt: skip
    print(f"worst: {100 * worst:.1f} %")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The loop of a stage: the right lambda and rate at every step, and resuming that is equal to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny

from prosparse_core import checkpoint, training
from prosparse_core.distillation import distillation_loss
from prosparse_core.distributed.parallel import compile_layers, layers_of
from prosparse_core.document_masks import positions_of
from prosparse_core.errors import ProSparseError
from prosparse_core.mixing import Batch
from prosparse_core.progress import Silent
from prosparse_core.recipe import Runtime
from prosparse_core.recipe_train import Distill, Stage, Train
from prosparse_core.schedule import l1_lambda, learning_rate
from prosparse_core.substitute import use_relu
from prosparse_core.training_log import LOG, cut_log


class CountedMixture:
    """Batches from a generator seeded by the step, like the real mixture's: a pure function of the step."""

    seq_len = 16

    def batch(self, step: int, sequences: int) -> Batch:
        tokens = torch.randint(3, 96, (sequences, 16), generator=torch.Generator().manual_seed(step))
        labels = tokens.clone()
        labels[:, :4] = -100
        begins = torch.zeros(sequences, 16, dtype=torch.bool)
        begins[:, 3 + step % 9] = True
        return Batch(tokens=tokens, labels=labels, corpora=[0] * sequences, positions=positions_of(begins))


class SuccessionMixture(CountedMixture):
    """Text that can be learnt: each token decides the next one, but for some noise."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def batch(self, step: int, sequences: int) -> Batch:
        generator = torch.Generator().manual_seed(step + 100_003 * self.seed)
        tokens = torch.randint(3, 96, (sequences, 16), generator=generator)
        follows = torch.rand(sequences, 16, generator=generator) < 0.9
        for t in range(1, 16):
            tokens[:, t] = torch.where(follows[:, t], (tokens[:, t - 1] * 7 + 5) % 93 + 3, tokens[:, t])
        return Batch(tokens=tokens, labels=tokens.clone(), corpora=[0] * sequences)


def recipe(**changes: object) -> Train:
    stages = [Stage(until_step=4, l1=0), Stage(until_step=6, l1=0.5), Stage(until_step=14, l1=2.0, ramp="sine")]
    return Train(**{"tokens_per_step": 64, "lr": 3e-3, "warmup_steps": 2, "stages": stages, **changes})  # type: ignore[arg-type]


def logged(folder: Path, *, compiled: bool) -> list[dict[str, float]]:
    """The log of a stage whose lambda changes at every step."""
    folder.mkdir()
    model = tiny()
    use_relu(model)
    if compiled:
        compile_layers(model)
    train, runtime = recipe(), Runtime(compile=compiled)
    optimizer = training.make_optimizer(model, train)
    training.train_stage(
        model,
        optimizer,
        CountedMixture(),  # type: ignore[arg-type]
        train,
        2,
        folder,
        precision="fp32",
        runtime=runtime,
        progress=Silent(),
    )
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # both are of torch's own compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_train_alike_and_are_compiled_once(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    plain = logged(tmp_path / "plain", compiled=False)
    counters.clear()
    compiled = logged(tmp_path / "compiled", compiled=True)
    num_layers = len(layers_of(tiny()))
    assert 0 < counters["stats"]["unique_graphs"] <= 2 * num_layers  # before and after the hook, not anew at each step
    assert len(plain) == len(compiled) == 8
    for a, b in zip(plain, compiled, strict=True):
        assert a["l1_lambda"] == b["l1_lambda"]
        for name in ("lm_loss", "l1", "sparsity", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (name, a["step"])


class Interrupted(Exception):
    pass


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class StopAt(Silent):
    """Progress that breaks off after a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.stop = step

    def update(self, done: float, total: float, **fields: float | int | str) -> None:
        if fields["step"] == self.stop:
            raise Interrupted


def run_stages(
    folder: Path,
    train: Train,
    stops: dict[int, list[int]],
    every: int | None = 3,
    mixture: object = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """All stages in one go, breaking off and starting anew from disk at the given steps of each stage."""
    model = tiny(seed=seed)
    use_relu(model)
    optimizer = training.make_optimizer(model, train)
    for index in range(len(train.stages)):
        begin = {k: v.clone() for k, v in model.state_dict().items()}
        torch.save(optimizer.state_dict(), folder / "opt.pt")
        for stop in [*stops.get(index, []), None]:
            model.load_state_dict(begin)
            optimizer = training.make_optimizer(model, train)
            if index:
                optimizer.load_state_dict(torch.load(folder / "opt.pt", weights_only=True))
            try:
                training.train_stage(
                    model,
                    optimizer,
                    mixture or CountedMixture(),  # type: ignore[arg-type]
                    train,
                    index,
                    folder / str(index),
                    precision="fp32",
                    runtime=Runtime(checkpoint_every_steps=every),
                    progress=Silent() if stop is None else StopAt(stop),
                )
            except Interrupted:
                continue
    return model.state_dict()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in "012":
        (tmp_path / name).mkdir()
    return tmp_path


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for i in "012" for line in (folder / i / LOG).read_text().splitlines()]


def test_resuming_at_any_step_ends_in_equal_bits(tmp_path: Path) -> None:
    finals = []
    for name, stops in (("straight", {}), ("broken", {0: [2], 1: [5], 2: [8, 9, 13]})):
        folder = tmp_path / name
        for i in "012":
            (folder / i).mkdir(parents=True)
        finals.append(run_stages(folder, recipe(), stops))
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])
    straight, broken = log_of(tmp_path / "straight"), log_of(tmp_path / "broken")
    for a, b in zip(straight, broken, strict=True):
        timing = {"tokens_per_s", "wall_s"}
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


def test_the_log_has_every_step_with_its_lambda_and_rate(folders: Path) -> None:
    train = recipe()
    run_stages(folders, train, {})
    log = log_of(folders)
    assert [e["step"] for e in log] == list(range(1, 15))
    assert [e["l1_lambda"] for e in log] == [l1_lambda(train.stages, s) for s in range(1, 15)]
    assert [e["lr"] for e in log] == [learning_rate(train, s) for s in range(1, 15)]
    assert [e["stage"] for e in log] == [0] * 4 + [1] * 2 + [2] * 8
    assert all(0 < e["sparsity"] < 1 and e["l1_term"] == pytest.approx(e["l1_lambda"] * e["l1"]) for e in log)


def test_regularization_lowers_l1_and_raises_sparsity(tmp_path: Path) -> None:
    logs = []
    for name, factor in (("plain", 0.0), ("regularized", 30.0)):
        folder = tmp_path / name
        for i in "012":
            (folder / i).mkdir(parents=True)
        stages = [
            Stage(until_step=2, l1=0),
            Stage(until_step=3, l1=factor),
            Stage(until_step=40, l1=factor, ramp="sine"),
        ]
        run_stages(folder, recipe(stages=stages), {}, every=None)
        logs.append(log_of(folder)[-1])
    assert logs[1]["mean_abs_x1"] < 0.7 * logs[0]["mean_abs_x1"]
    assert logs[1]["sparsity"] > logs[0]["sparsity"]


def test_micro_batches_equal_one_pass(tmp_path: Path) -> None:
    finals = []
    for name, micro in (("whole", None), ("micro", 1)):
        folder = tmp_path / name
        for i in "012":
            (folder / i).mkdir(parents=True)
        finals.append(run_stages(folder, recipe(micro_batch=micro), {}))
    for key in finals[0]:
        assert torch.allclose(finals[0][key], finals[1][key], rtol=1e-3, atol=1e-5), key


def test_a_loss_that_is_not_finite_stops_the_stage(folders: Path) -> None:
    with pytest.raises(ProSparseError, match="stage 0, step") as caught:
        run_stages(folders, recipe(lr=1e30, warmup_steps=0, grad_clip=1e30), {})
    assert "lower train.lr" in (caught.value.hint or "")


def saved(root: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
    with checkpoint.Writer(root, model, optimizer, **options) as writer:
        writer.save(step)


def test_a_torn_checkpoint_is_ignored_and_a_corrupt_one_is_dropped_aloud(tmp_path: Path) -> None:
    model = tiny()
    optimizer = training.make_optimizer(model, recipe())
    saved(tmp_path, 3, model, optimizer)
    torn = tmp_path / ".step-00000006.1.tmp"
    shutil.copytree(tmp_path / "step-00000003", torn)
    assert checkpoint.latest(tmp_path) == checkpoint.Checkpoint(3, tmp_path / "step-00000003")
    saved(tmp_path, 6, model, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006"]

    (tmp_path / "step-00000006" / "__0_0.distcp").write_bytes(b"nonsense")
    notes = Notes()
    assert checkpoint.restore(tmp_path, model, optimizer, notes) == (0, {})
    assert "not readable" in notes.notes[0]
    assert checkpoint.latest(tmp_path) is None


def test_an_unreadable_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    model = tiny()
    optimizer = training.make_optimizer(model, recipe())
    for step in (3, 6):
        saved(tmp_path, step, model, optimizer, reach=3)
    (tmp_path / "step-00000006" / "progress.json").write_text("{")
    assert checkpoint.restore(tmp_path, model, optimizer, Silent()) == (3, {})


@pytest.mark.parametrize(
    ("steps", "reach", "kept"),
    [([3], 0, [3]), ([3, 6], 0, [6]), ([0, 3, 6], 4, [0, 3, 6]), ([0, 3, 6, 9], 5, [3, 6, 9]), ([2, 9], 20, [2, 9])],
)
def test_a_rollback_finds_a_checkpoint_that_is_old_enough(steps: list[int], reach: int, kept: list[int]) -> None:
    assert checkpoint.needed(steps, reach) == kept


def test_a_torn_last_line_of_the_log_is_cut(tmp_path: Path) -> None:
    log = tmp_path / LOG
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st', encoding="utf-8")
    cut_log(log, before=3)
    assert log.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_embeddings_stay_and_the_rest_moves(folders: Path, tied: bool) -> None:
    train = recipe(freeze=["embeddings"])
    model = tiny(tie_word_embeddings=tied)
    use_relu(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = training.make_optimizer(model, train)
    training.train_stage(
        model,
        optimizer,
        CountedMixture(),  # type: ignore[arg-type]
        train,
        0,
        folders / "0",
        precision="fp32",
        runtime=Runtime(),
        progress=Silent(),
    )
    same = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}


def steered(total: int, target: float, lr: float, tokens: int = 256) -> Train:
    stages = [Stage(until_step=20, l1=0), Stage.model_validate({"until_step": total, "target_sparsity": target})]
    return recipe(stages=stages, lr=lr, tokens_per_step=tokens)


@pytest.mark.parametrize(("target", "lr"), [(0.65, 3e-3), (0.75, 1e-3)])
def test_a_steered_stage_reaches_its_target_and_resumes_to_the_bit(tmp_path: Path, target: float, lr: float) -> None:
    logs = []
    for name, stops in (("straight", {}), ("broken", {1: [9, 150]})):
        for i in "01":
            (tmp_path / name / i).mkdir(parents=True)
        run_stages(tmp_path / name, steered(220, target, lr), stops, every=40, mixture=SuccessionMixture())
        lines = (tmp_path / name / "1" / LOG).read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for key in ("l1_lambda", "sparsity", "lm_loss"):
        assert [e[key] for e in logs[0]] == [e[key] for e in logs[1]]
    assert logs[0][0]["l1_lambda"] == 0
    assert logs[0][0]["sparsity"] < 0.6
    assert sum(e["sparsity"] for e in logs[0][-20:]) / 20 == pytest.approx(target, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "lr"), [(0.65, 3e-3), (0.75, 1e-3)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_steered_stage_reaches_its_target_from_any_model_and_text(
    tmp_path: Path, target: float, lr: float, seed: int
) -> None:
    for i in "01":
        (tmp_path / i).mkdir()
    train = steered(220, target, lr, tokens=512)
    run_stages(tmp_path, train, {}, every=None, mixture=SuccessionMixture(seed), seed=seed)
    log = [json.loads(line) for line in (tmp_path / "1" / LOG).read_text().splitlines()]
    assert sum(e["sparsity"] for e in log[-20:]) / 20 == pytest.approx(target, abs=0.01)


def test_distilling_pulls_towards_the_teacher(tmp_path: Path) -> None:
    teacher, found = tiny(), {}
    for weight in (None, 4.0):
        distill = None if weight is None else Distill(weight=weight, temperature=1.0)
        train = recipe(stages=[Stage(until_step=12, l1=0, distill=distill)])
        model = tiny()
        use_relu(model)
        folder = tmp_path / str(weight)
        folder.mkdir()
        training.train_stage(
            model,
            training.make_optimizer(model, train),
            CountedMixture(),  # type: ignore[arg-type]
            train,
            0,
            folder,
            precision="fp32",
            runtime=Runtime(),
            progress=Silent(),
            teacher=None if weight is None else teacher,
        )
        batch = CountedMixture().batch(99, 8)
        with torch.no_grad():
            logits = [m(input_ids=batch.tokens, use_cache=False).logits for m in (model, teacher)]
        found[weight] = float(distillation_loss(*logits, batch.labels, 1.0))
        logged = [json.loads(line)["distill"] for line in (folder / LOG).read_text().splitlines()]
        assert all((value is None) == (weight is None) for value in logged)
    assert found[4.0] < 0.8 * found[None]
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_sees_documents_as_the_model_does(tmp_path: Path) -> None:
    """A model that is its own teacher has nothing to learn from it: with masks on one side only it would."""
    train = recipe(lr=1e-9, stages=[Stage(until_step=3, l1=0, distill=Distill())])
    model = tiny()
    training.train_stage(
        model,
        training.make_optimizer(model, train),
        CountedMixture(),  # type: ignore[arg-type]
        train,
        0,
        tmp_path,
        precision="fp32",
        runtime=Runtime(),
        progress=Silent(),
        teacher=tiny(),
    )
    found = [json.loads(line)["distill"] for line in (tmp_path / LOG).read_text().splitlines()]
    assert found == pytest.approx([0, 0, 0], abs=1e-6)
    batch = CountedMixture().batch(1, 4)
    with torch.no_grad():
        mixed = model(input_ids=batch.tokens, use_cache=False).logits
        apart = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    assert float(distillation_loss(mixed, apart, batch.labels, 1.0)) > 1e-4

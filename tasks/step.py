"""A step becomes an artifact: fingerprint -> in the store? -> lock -> run in a work folder -> hash -> rename -> record.

The only cache of the pipeline, and the only place that knows Prefect's ``@task``.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from prosparse_core.distributed.nodes import Leader
from prosparse_core.errors import EnvironmentProblem, ProSparseError
from prosparse_core.ledger import Ledger
from prosparse_core.progress import Progress
from prosparse_core.recipe import Recipe
from prosparse_core.store import FACTS, Artifact, Store, fingerprint, make_folder, require_space

STEPS = (
    "base_model",
    "mixture",
    "substitute",
    "stage",
    "calibrate",
    "evaluate",
    "predictor",
    "speed",
    "export",
    "report",
)
Outcome = Literal["done", "cached", "failed", "planned", "would run", "dropped"]


class Finished(Exception):
    """The run reached the step it was told to stop after (``--until``)."""


class Watcher(Protocol):
    """Who looks on: the console, or nobody."""

    def step(self, label: str) -> AbstractContextManager[Progress]: ...
    def outcome(self, label: str, outcome: Outcome, detail: str = "") -> None: ...


@dataclass
class Work:
    """What the body of a step gets: a folder to fill, a way to tell how far it is, a place for facts."""

    folder: Path
    progress: Progress
    meta: dict[str, Any] = field(default_factory=dict)
    """Small results that later steps and tables read."""
    _facts: list[dict[str, Any]] = field(default_factory=list)

    def fact(self, table: str, **columns: Any) -> None:
        """One row for a table of the ledger; it gets the digest of this step's artifact."""
        self._facts.append({"table": table, **columns})

    def write_facts(self) -> None:
        text = "".join(json.dumps(fact, ensure_ascii=False) + "\n" for fact in self._facts)
        (self.folder / FACTS).write_text(text, encoding="utf-8")


@dataclass
class Run:
    """One run of a recipe: where it keeps things, who watches, what to force, where to stop."""

    recipe: Recipe
    home: Path
    run_id: str
    ledger: Ledger
    watcher: Watcher
    force: frozenset[str] = frozenset()
    until: str | None = None
    planning: bool = False
    """Ask the store only: nothing runs, nothing is written."""
    prefect: bool = False
    """Inside a Prefect flow run: each step is a task run."""
    leader: Leader | None = None
    """Of the nodes that train together, when there are several and this is the first."""
    history: list[tuple[str, Artifact | None, Outcome]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a planned step would run, by label."""

    def __post_init__(self) -> None:
        self.store = Store(self.home)
        self._reached = False

    def step(
        self,
        name: str,
        label: str,
        body: Callable[[Work], None],
        *,
        version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        seed: int | None = None,
        stage: int | None = None,
        needs_bytes: int = 0,
        holding: Sequence[str] = (),
    ) -> Artifact:
        """The artifact of one step: from the store when its fingerprint is there, else by running ``body``.

        Args:
            name: one of ``STEPS``.
            label: what people read; also the name of the Prefect task run.
            body: fills ``work.folder``; may find what an interrupted attempt left there.
            version: raised when the code of the step changes its result.
            config: the part of the recipe (and of the outside world) that decides the result; plain JSON values.
            inputs: artifacts by role; their digests are part of the identity.
            seed: where it is not the recipe's.
            needs_bytes: what the disk must hold before the step starts.
            holding: files that are needed even of an artifact in the store: where a retention rule took one away, the
                step runs again.
        """
        assert name in STEPS
        if self._reached and name != self.until:
            raise Finished(name)
        self._reached = name == self.until
        if any(a.digest is None for a in inputs.values()):
            return self._plan(name, label, None, holding)
        payload = self._payload(name, version, config, inputs, seed)
        if self.planning:
            return self._plan(name, label, payload, holding)
        attempt = _Attempt(self, name, label, body, payload, inputs, stage, needs_bytes, holding)
        artifact = _as_prefect_task(attempt) if self.prefect else attempt.execute()[0]
        return artifact

    def would_run(
        self,
        name: str,
        *,
        version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        seed: int | None = None,
        holding: Sequence[str] = (),
    ) -> bool:
        """Whether :meth:`step` with the same arguments would run its body."""
        if name in self.force or any(a.digest is None for a in inputs.values()):
            return True
        found = self.store.find(name, "", fingerprint(self._payload(name, version, config, inputs, seed)))
        return found is None or bool(_missing(found, holding))

    def _payload(
        self, name: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, Artifact], seed: int | None
    ) -> dict[str, Any]:
        """Everything that decides the result of a step: what its fingerprint is of."""
        return {
            "step": name,
            "version": version,
            "config": dict(config),
            "inputs": {role: artifact.digest for role, artifact in inputs.items()},
            "seed": self.recipe.seed if seed is None else seed,
        }

    def _plan(self, name: str, label: str, payload: Mapping[str, Any] | None, holding: Sequence[str]) -> Artifact:
        found = None
        if payload is not None and name not in self.force:
            found = self.store.find(name, label, fingerprint(payload))
        if found and (missing := _missing(found, holding)):
            self.history = [entry for entry in self.history if entry[0] != label]  # it was said to be cached
            self.history.append((label, None, "would run"))
            self.reasons[label] = _dropped(missing)
            return found  # as the same bits are expected of it
        outcome: Outcome = "cached" if found else "would run"
        self.history.append((label, found, outcome))
        if not found:
            self.reasons[label] = _why(self, name, payload)
        return found or Artifact(name, label, None, None, None)


@dataclass
class _Attempt:
    """One try at one step."""

    run: Run
    name: str
    label: str
    body: Callable[[Work], None]
    payload: dict[str, Any]
    inputs: Mapping[str, Artifact]
    stage: int | None
    needs_bytes: int
    holding: Sequence[str]

    def execute(self) -> tuple[Artifact, Outcome]:
        run, store = self.run, self.run.store
        print_ = fingerprint(self.payload)
        step_id = run.ledger.start_step(
            run.run_id, step=self.name, stage=self.stage, label=self.label, fingerprint=print_
        )
        try:
            with run.watcher.step(self.label) as progress:
                with store.lock(print_, on_wait=lambda: progress.note("another run is at this step: waiting for it")):
                    if self.name in run.force:
                        store.remove(self.name, print_)
                    found = store.find(self.name, self.label, print_)
                    missing = _missing(found, self.holding) if found else []
                    if missing:
                        progress.note(_dropped(missing))
                    artifact = found if found and not missing else self._make(progress)
                    outcome: Outcome = "cached" if artifact is found else "done"
                with run.ledger.together():
                    run.ledger.record_artifact(artifact.path)
                    run.ledger.end_step(step_id, status=outcome, artifact=artifact.digest)
        except BaseException as error:
            message = str(error) or type(error).__name__
            hint = getattr(error, "hint", None)
            run.ledger.end_step(step_id, status="failed", error=f"{type(error).__name__}: {message}", hint=hint)
            run.history.append((self.label, None, "failed"))
            run.watcher.outcome(self.label, "failed", message)
            raise
        run.history.append((self.label, artifact, outcome))
        run.watcher.outcome(self.label, outcome)
        return artifact, outcome

    def _make(self, progress: Progress) -> Artifact:
        store = self.run.store
        folder = store.work_folder(self.name, fingerprint(self.payload))
        require_space(folder, self.needs_bytes, self.label)
        make_folder(folder)
        work = Work(folder, progress)
        began = time.monotonic()
        try:
            self.body(work)
            work.write_facts()
            return store.commit(
                folder,
                step=self.name,
                label=self.label,
                payload=self.payload,
                inputs=self.inputs,
                provenance={**provenance(), "wall_s": round(time.monotonic() - began, 3)},
                meta=work.meta,
            )
        except OSError as error:
            if error.errno == 28:
                raise EnvironmentProblem(
                    f"{self.label}: the disk of {folder} is full",
                    hint="free some space and run the same command again: it goes on from its last checkpoint",
                ) from error
            raise


def _missing(artifact: Artifact, holding: Sequence[str]) -> list[str]:
    return [name for name in holding if not (artifact.path / name).exists()]


def _dropped(missing: Sequence[str]) -> str:
    return f"runs again: {', '.join(missing)} was dropped (runtime.keep=last), and a stage has to go on from it"


def _as_prefect_task(attempt: _Attempt) -> Artifact:
    """An attempt as a Prefect task run: readable name, ``Cached`` when the store had it, the error when it fails."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    result: list[Artifact] = []

    def step(fingerprint: str) -> Any:
        artifact, outcome = attempt.execute()
        result.append(artifact)
        return Completed(name="Cached" if outcome == "cached" else "Completed", message=str(artifact.folder))

    # NO_CACHE: our store is the only cache; persist_result off: only ids and paths travel, and only within the process.
    wrapped = task(
        name=attempt.name, task_run_name=_escape(attempt.label), cache_policy=NO_CACHE, persist_result=False
    )(step)
    state: Any = wrapped(fingerprint(attempt.payload)[:20], return_state=True)
    if not result:
        state.result()  # raises what the step raised
        raise ProSparseError(f"{attempt.label}: ended as {state.name} without a result")
    return result[0]


def _escape(label: str) -> str:
    """Prefect formats task run names: braces in a label are meant literally."""
    return label.replace("{", "{{").replace("}", "}}")


def _why(run: Run, name: str, payload: Mapping[str, Any] | None) -> str:
    """Why a step is not cached: forced, its inputs are not built yet, never run, or what differs from the last time."""
    if payload is None:
        return "its inputs are not built yet"
    if name in run.force:
        return "forced"
    folder = run.store.root / name
    records = sorted(folder.glob("*/artifact.json"), key=lambda p: p.stat().st_mtime) if folder.is_dir() else []
    work = run.store.work_folder(name, fingerprint(payload))
    if work.is_dir():
        return "interrupted: goes on from where it stopped"
    if not records:
        return "not in the store"
    last = json.loads(records[-1].read_text(encoding="utf-8"))["payload"]
    changed = _first_difference(last, payload)
    return f"differs from the one in the store in {changed}"


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(k for k in old if k not in new)]:
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    if isinstance(old, Sequence) and isinstance(new, Sequence) and not isinstance(old, str) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if a != b:
                return _first_difference(a, b, f"{path}[{i}]")
    return f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def provenance() -> dict[str, Any]:
    """Where, when and with what this process runs."""
    loaded = [m for m in ("torch", "transformers", "lm_eval", "triton") if m in sys.modules]
    versions: dict[str, Any] = {m: getattr(sys.modules[m], "__version__", "?") for m in loaded}
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        "python": platform.python_version(),
        "user": getpass.getuser(),
        "pid": os.getpid(),
        "process_started": process_start(os.getpid()),
        **versions,
    }


def process_start(pid: int) -> float | None:
    """When a process of this host began, in seconds since the epoch; None when there is none of that number."""
    import psutil

    try:
        return round(psutil.Process(pid).create_time(), 1)
    except psutil.NoSuchProcess:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

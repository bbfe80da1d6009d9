"""Opening and closing a run: check before anything expensive, tell the ledger, say at the end what came out."""

from __future__ import annotations

import contextlib
import difflib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows import console, nodes
from prosparse_core import recipe as recipes
from prosparse_core.errors import BadInput
from prosparse_core.ledger import Ledger
from prosparse_core.memory import keep_freed_memory
from prosparse_core.recipe import Recipe
from prosparse_core.store import make_folder
from tasks import preflight
from tasks.step import STEPS, Finished, Run, process_start, provenance


def home_folder() -> Path:
    """``$PROSPARSE_HOME``, by default ``./.prosparse``; absolute."""
    return Path(os.environ.get("PROSPARSE_HOME", ".prosparse")).expanduser().resolve()


@contextlib.contextmanager
def open_run(
    recipe: str | Recipe,
    overrides: Sequence[str] = (),
    *,
    flow: str = "prosparse",
    force: Sequence[str] = (),
    until: str | None = None,
    prefect: bool = False,
) -> Iterator[Run]:
    """A run of a recipe, recorded in the ledger whatever happens to it.

    Args:
        recipe: a name or path; or a recipe already loaded, which its flow has checked.

    Raises:
        BadInput, EnvironmentProblem: before anything is written.
    """
    loaded = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, overrides)
    check_steps(force, until)
    home = home_folder()
    if not isinstance(recipe, Recipe):
        preflight.check(loaded, home, flow)
    ledger = Ledger(make_folder(home))
    run = Run(
        recipe=loaded,
        home=home,
        run_id=new_run_id(loaded),
        ledger=ledger,
        watcher=console.watcher(),
        force=frozenset(force),
        until=until,
        prefect=prefect,
    )
    ledger.start_run(
        run_id=run.run_id,
        flow=flow,
        recipe=loaded.name,
        recipe_yaml=loaded.to_yaml(),
        overrides=list(overrides),
        model=loaded.model.id,
        provenance={**provenance(), "argv": sys.argv, "prefect_flow_run": _flow_run_id() if prefect else None},
    )
    console.run_started(run)
    keep_freed_memory()
    status, error = "done", None
    try:
        with terminate_as_exception(), nodes.leading(loaded) as run.leader:
            yield run
    except Finished:
        console.say(f"stopped after {until}, as asked")
    except BaseException as failure:
        status, error = "failed", f"{type(failure).__name__}: {failure}"
        raise
    finally:
        ledger.end_run(run.run_id, status, error)
    console.run_finished(run)


def planned(recipe: str, overrides: Sequence[str] = (), *, force: Sequence[str] = ()) -> tuple[Recipe, Run]:
    """A run that only asks the store what it would do; writes nothing."""
    loaded = recipes.load(recipe, overrides)
    check_steps(force, None)
    home = home_folder()
    run = Run(
        recipe=loaded,
        home=home,
        run_id="plan",
        ledger=Ledger(home),
        watcher=console.NoWatcher(),
        force=frozenset(force),
        planning=True,
    )
    return loaded, run


def check_steps(force: Sequence[str], until: str | None) -> None:
    """Refuse names that are no step, with the nearest one."""
    for name in [*force, *([until] if until else [])]:
        if name not in STEPS:
            near = difflib.get_close_matches(name, STEPS, n=1)
            raise BadInput(
                f"unknown step {name!r}", hint=f"did you mean {near[0]!r}?" if near else f"steps: {', '.join(STEPS)}"
            )


def new_run_id(recipe: Recipe) -> str:
    """Sortable by time: 20260101T120000-smollm2-135m-3f9a."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{recipe.name}-{secrets.token_hex(2)}"


@contextlib.contextmanager
def terminate_as_exception() -> Iterator[None]:
    """SIGTERM ends the run like Ctrl-C does: recorded, with locks released and checkpoints kept."""

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt("terminated")

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: whoever owns it handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _flow_run_id() -> str | None:
    from prefect.runtime import flow_run

    return flow_run.id


def mark_dead_runs(home: Path) -> list[str]:
    """End, as failed, the runs of this host whose process is gone (kill -9, power cut)."""
    ledger = Ledger(home)
    if not ledger.exists():
        return []

    def is_alive(run: dict[str, Any]) -> bool:
        there = run["provenance"]
        if there.get("host") != socket.gethostname():
            return True  # another machine's process cannot be seen from here
        began = process_start(int(there["pid"]))
        return began is not None and abs(began - there["process_started"]) < 1.0  # else the number was given away anew

    return ledger.mark_dead_runs(is_alive)

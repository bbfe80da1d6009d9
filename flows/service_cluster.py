"""The deployments of ``prefect.yaml`` whose work pool is a cluster's: read, and registered where that pool exists.

``prosparse up`` alone leaves them out: their pools are not on this machine, and their workers need a cluster's leave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flows.service_address import Address
from flows.service_process import Deployment
from prosparse_core.errors import BadInput, EnvironmentProblem

POOL_TYPES = {"kubernetes": "flows/pools/kubernetes.json", "slurm": None}
"""Type -> its base job template, where the one of its package is not enough."""


def cluster_deployments(folder: Path, pool: str, ours: str) -> list[Deployment]:
    """Those that ``prefect.yaml`` in ``folder`` gives to ``pool``.

    Raises:
        BadInput: it has none for that pool; the hint names the pools it knows.
        EnvironmentProblem: there is no such file.
    """
    path = folder / "prefect.yaml"
    try:
        entries: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as problem:
        raise EnvironmentProblem(
            f"{path} is not readable: {problem}", hint="run this in the folder that holds it"
        ) from problem
    found = [entry for entry in entries if entry["work_pool"]["name"] == pool]
    if not found or pool == ours:
        known = sorted({entry["work_pool"]["name"] for entry in entries} - {ours})
        raise BadInput(
            f"no deployment of {path} is for the work pool {pool!r}",
            hint=f"its pools: {', '.join(known)}; put the name of yours there" if known else "add one to the file",
        )
    return [
        Deployment(entry["name"], entry["entrypoint"], pool, entry["work_pool"].get("job_variables"), entry.get("pull"))
        for entry in found
    ]


def require_pool(address: Address, pool: str) -> None:
    """Refuse a work pool the server does not have: a run sent there would wait for ever.

    Raises:
        BadInput: with the pools there are, and how to make this one.
    """
    pools = {row["name"]: row for row in address.call("/work_pools/filter", {})}
    if pool in pools:
        return
    kind = next((kind for kind in POOL_TYPES if kind in pool), "kubernetes")
    template = f" --base-job-template {POOL_TYPES[kind]}" if POOL_TYPES[kind] else ""
    raise BadInput(
        f"the work pool {pool!r} does not exist at {address.url} (there: {', '.join(sorted(pools)) or 'none'})",
        hint=f"pip install 'prosparse[{kind}]', then: prefect work-pool create {pool} --type {kind}{template}",
    )


def waiting(address: Address, entrypoints: set[str]) -> list[str]:
    """Of our deployments at ``address``, in words: those whose runs would wait for ever, or until a worker comes."""
    pools = {row["name"]: row for row in address.call("/work_pools/filter", {})}
    rows = [row for row in address.call("/deployments/filter", {}) if row.get("entrypoint") in entrypoints]
    said = []
    for row in sorted(rows, key=lambda row: str(row["name"])):
        pool = row.get("work_pool_name")
        if pool not in pools:
            said.append(f"{row['name']}: its work pool{f' {pool}' if pool else ''} does not exist")
        elif pools[pool].get("status") == "NOT_READY":
            said.append(f"{row['name']}: no worker polls its work pool {pool}")
    return said

"""Deployments on clusters: read from prefect.yaml, refused without their pool, told when nobody takes their runs."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import service
from flows.service_address import Address
from flows.service_cluster import cluster_deployments, require_pool, waiting
from prosparse_core.errors import BadInput, EnvironmentProblem

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = {"full-kubernetes": "prosparse-kubernetes", "full-slurm": "prosparse-slurm"}
SLURM_VARIABLES = {"cpu", "memory", "partition", "shebang", "source_files", "time_limit", "working_dir", "env", "name"}
"""What prefect-slurm 0.1.7 takes; it has no others."""


class Answers(Address):
    """An address whose API answers from memory."""

    def __init__(self, pools: list[dict[str, Any]], deployments: list[dict[str, Any]] | None = None) -> None:
        super().__init__("http://127.0.0.1:1/api", owned=False)
        object.__setattr__(self, "rows", {"/work_pools/filter": pools, "/deployments/filter": deployments or []})

    def call(self, path: str, body: Any = None, **_: Any) -> Any:
        return self.rows[path]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "pool"), CLUSTERS.items())
def test_each_cluster_has_the_full_flow(name: str, pool: str) -> None:
    (deployment,) = cluster_deployments(ROOT, pool, service.POOL)
    assert (deployment.name, deployment.pool) == (name, pool)
    module, _, function = deployment.entrypoint.rpartition(".")
    assert getattr(importlib.import_module(module), function).name == "prosparse"
    assert deployment.job_variables is not None
    home = Path(deployment.job_variables["env"]["PROSPARSE_HOME"])
    (step,) = deployment.pull or []
    folder = step["prefect.deployments.steps.set_working_directory"]["directory"]
    assert home.is_relative_to(folder), "what is shared is one file system"


def test_up_alone_makes_no_deployment_of_a_cluster() -> None:
    assert {deployment.pool for deployment in service.DEPLOYMENTS} == {service.POOL}
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {e["name"]: e["work_pool"]["name"] for e in entries if e["work_pool"]["name"] != service.POOL} == CLUSTERS


def test_job_variables_are_those_the_pools_know() -> None:
    (on_slurm,) = cluster_deployments(ROOT, "prosparse-slurm", service.POOL)
    assert set(on_slurm.job_variables or {}) <= SLURM_VARIABLES
    template = json.loads((ROOT / "flows/pools/kubernetes.json").read_text())
    variables = template["variables"]
    (on_kubernetes,) = cluster_deployments(ROOT, "prosparse-kubernetes", service.POOL)
    assert set(variables["required"]) <= set(on_kubernetes.job_variables or {}) <= set(variables["properties"])
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(variables["properties"]), "a variable that is not used is a promise that is not kept"
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    for name, value in (on_kubernetes.job_variables or {}).items():
        kind = variables["properties"][name].get("type", "string")
        assert isinstance(value, {"string": str, "integer": int, "object": dict, "boolean": bool}[kind]), name


def test_a_pool_that_does_not_exist_is_refused() -> None:
    there = Answers([{"name": "default"}, {"name": "gpus"}])
    require_pool(there, "gpus")
    with pytest.raises(BadInput, match=r"'prosparse-slurm' does not exist at .* \(there: default, gpus\)") as caught:
        require_pool(there, "prosparse-slurm")
    assert "prefect work-pool create prosparse-slurm --type slurm" in (caught.value.hint or "")
    with pytest.raises(BadInput) as caught:
        require_pool(there, "prosparse-kubernetes")
    template = re.search(r"--base-job-template (\S+)", caught.value.hint or "")
    assert template
    assert (ROOT / template[1]).is_file()


def test_a_pool_that_prefect_yaml_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no deployment of .* is for the work pool 'gpus'") as caught:
        service.up(tmp_path / "home", folder=tmp_path, pool="gpus")
    assert "prosparse-kubernetes, prosparse-slurm" in (caught.value.hint or "")
    with pytest.raises(EnvironmentProblem, match="not readable"):
        cluster_deployments(tmp_path, "gpus", service.POOL)
    assert not (tmp_path / "home").exists()


def test_deployments_that_nobody_would_run_are_told() -> None:
    entrypoint = "flows.full.prosparse"
    rows = [
        {"name": "full", "entrypoint": entrypoint, "work_pool_name": "prosparse"},
        {"name": "full-slurm", "entrypoint": entrypoint, "work_pool_name": "prosparse-slurm"},
        {"name": "full-kubernetes", "entrypoint": entrypoint, "work_pool_name": None},
        {"name": "somebody-elses", "entrypoint": "their.flow", "work_pool_name": None},
    ]
    pools = [{"name": "prosparse", "status": "READY"}, {"name": "prosparse-slurm", "status": "NOT_READY"}]
    assert waiting(Answers(pools, rows), {entrypoint}) == [
        "full-kubernetes: its work pool does not exist",
        "full-slurm: no worker polls its work pool prosparse-slurm",
    ]

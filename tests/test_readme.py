"""The README is true: its commands parse, its targets, recipes, deployments and files exist. test_full.py runs them."""

from __future__ import annotations

import importlib
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from flows import cli
from prosparse_core import recipe as recipes
from tasks import preflight

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


OF_CLUSTERS = ("prefect work-pool create ", "srun ")


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("prosparse ")])
def test_prosparse_commands_parse(command: str, tmp_path: Path) -> None:
    parsed = cli.build_parser().parse_args(shlex.split(command)[1:])
    if getattr(parsed, "recipe", None):
        recipe = recipes.load(parsed.recipe, parsed.overrides)
        flow = "compare" if parsed.verb == "compare" or getattr(parsed, "compare", False) else "prosparse"
        preflight.check(recipe, tmp_path, flow, elsewhere=True)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("prefect deployment run ")])
def test_deployments_exist(command: str) -> None:
    flow, deployment = command.split()[3].split("/")
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    found = [d["entrypoint"].rpartition(".") for d in deployments if d["name"] == deployment]
    assert flow in [getattr(importlib.import_module(module), function).name for module, _, function in found]


def test_pools_and_their_templates_exist() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    created = [shlex.split(c) for c in COMMANDS if c.startswith("prefect work-pool create ")]
    assert {words[3] for words in created} == {d["work_pool"]["name"] for d in deployments} - {"prosparse"}
    for words in created:
        for option, value in pairwise(words):
            assert option != "--base-job-template" or (ROOT / value).is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("srun ")])
def test_what_srun_starts_parses(command: str) -> None:
    words = shlex.split(command)
    parsed = cli.build_parser().parse_args(words[words.index("prosparse") + 1 :])
    nodes = int(words[words.index("-N") + 1])
    assert recipes.load(parsed.recipe, parsed.overrides).runtime.nodes == nodes


def test_every_command_is_of_a_known_kind() -> None:
    known = ("prosparse ", "make ", "prefect deployment run ", ". .venv/bin/activate", "duckdb ", *OF_CLUSTERS)
    assert [c for c in COMMANDS if not c.startswith(known)] == []


def test_folders_and_recipes_named_exist() -> None:
    for path in re.findall(r"`((?:flows|tasks|prosparse_core|kernels|tests)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`((?:llama2|minicpm|smollm2)-[\w-]+)`", README):
        assert name in recipes.names()

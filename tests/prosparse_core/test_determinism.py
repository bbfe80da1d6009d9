"""Deterministic algorithms while a stage trains, and nothing of it afterwards."""

from __future__ import annotations

import os

import pytest
import torch

from prosparse_core.determinism import WORKSPACE, deterministic


def state() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def failing() -> None:
    with deterministic(True):
        assert state() == (True, True, False)
        assert os.environ[WORKSPACE] == ":4096:8"
        raise ZeroDivisionError


def test_what_is_set_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    before = state()
    with deterministic(False):
        assert state() == before
    with pytest.raises(ZeroDivisionError):
        failing()
    assert state() == before

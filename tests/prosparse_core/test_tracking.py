"""TensorBoard's event files beside the ledger: every scalar once, also of a stage that was interrupted."""

from __future__ import annotations

import importlib.util

import pytest

from prosparse_core import tracking
from prosparse_core.errors import EnvironmentProblem


def test_without_the_package_it_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracking.require(None)
    with pytest.raises(EnvironmentProblem, match=r"runtime.tracking=tensorboard, but the package") as caught:
        tracking.require("tensorboard")
    assert "prosparse[tracking]" in str(caught.value.hint)

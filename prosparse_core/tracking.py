"""Training curves for TensorBoard, beside the ledger, where ``runtime.tracking`` asks for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from prosparse_core.errors import EnvironmentProblem


def require(tracking: str | None) -> None:
    """Refuse what cannot be tracked for want of a package.

    Raises:
        EnvironmentProblem: tensorboard is asked for and not installed.
    """
    if tracking == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise EnvironmentProblem(
            "runtime.tracking=tensorboard, but the package tensorboard is not installed",
            hint="pip install 'prosparse[tracking]', or leave runtime.tracking out",
        )


class Tracker:
    """Event files of one stage in ``folder``; without a folder, nothing.

    Args:
        start: the first step that will come: what is there of it and later ones, of an interrupted run, is void.
    """

    def __init__(self, folder: Path | None, start: int) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=start)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._writer is None:
            return
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

"""The errors a user can meet. Each says what, where, the value, and (``hint``) the way out."""

from __future__ import annotations


class ProSparseError(Exception):
    """A failure of the pipeline itself; the command line exits with 1."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class BadInput(ProSparseError, ValueError):
    """The user asked for something that cannot be done as asked; the command line exits with 2."""

    exit_code = 2


class EnvironmentProblem(ProSparseError):
    """The machine lacks something: a compiler, disk space, a free lock; the command line exits with 3."""

    exit_code = 3

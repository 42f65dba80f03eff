"""Exceptions of pudnet, and the one format of their messages."""

from __future__ import annotations

from collections.abc import Sequence


class PudnetError(Exception):
    """Base class of every error pudnet raises on purpose."""


class InputError(PudnetError, ValueError):
    """Bad input: an argument, a file or data that breaks a stated rule. The command line exits with 2."""


class ShapeError(InputError):
    """A tensor or array has the wrong shape."""


class DtypeError(InputError, TypeError):
    """A tensor or array has the wrong dtype."""


class CheckpointError(InputError):
    """A checkpoint is truncated, of another version, or not one of ours."""


class Cancelled(PudnetError):
    """The caller asked to stop, or the time that was allowed is over; nothing half-done is left behind."""


class DatasetErrors(PudnetError, ExceptionGroup[Exception]):
    """Some of several datasets failed: their errors, each with a note that names the dataset.

    Attributes:
        results: of every dataset, in order: what was made of it, or its error.
    """

    results: Sequence[object]

    def __new__(cls, text: str, errors: Sequence[Exception], results: Sequence[object]) -> DatasetErrors:
        group = super().__new__(cls, text, errors)
        group.results = results
        return group

    def derive(self, errors: Sequence[Exception]) -> DatasetErrors:  # type: ignore[override]
        """The same with fewer errors, for ``except*``."""
        return DatasetErrors(self.message, errors, self.results)


class BackendUnavailableError(PudnetError, RuntimeError):
    """A backend asked for by name cannot run this call; the message lists every backend's reasons."""


def message(where: str, argument: str, rule: str, got: object, hint: str = "") -> str:
    """Format ``where: argument must be <rule>; got <value>. <hint>``; a long rule or value is cut."""
    text = f"{where}: {argument} must be {_cut(rule)}; got {_cut(str(got))}."
    return f"{text} {hint}" if hint else text


def one_line(error: Exception) -> str:
    """What ``error`` says, on one line of bounded length, to quote in a message."""
    return _cut(" ".join(str(error).split()), 300)


def _cut(text: str, most: int = 800) -> str:
    return text if len(text) <= most else f"{text[:most]}..."

"""Exceptions of pudnet, and the one format of their messages."""

from __future__ import annotations


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


class BackendUnavailableError(PudnetError, RuntimeError):
    """A backend asked for by name cannot run this call; the message lists every backend's reasons."""


def message(where: str, argument: str, rule: str, got: object, hint: str = "") -> str:
    """Format ``where: argument must be <rule>; got <value>. <hint>``."""
    text = f"{where}: {argument} must be {rule}; got {got}."
    return f"{text} {hint}" if hint else text


def one_line(error: Exception) -> str:
    """What ``error`` says, on one line of bounded length, to quote in a message."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."

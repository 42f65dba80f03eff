"""The only door to the compiled extension ``pudnet._C``: loaded once, on first need, never at import of pudnet."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
from pathlib import Path
from types import ModuleType

import pudnet
from pudnet.errors import BackendUnavailableError

# The signatures of csrc/module.cpp this package calls; raise it together with kInterface there.
INTERFACE = 4

_REBUILD = "Rebuild it in the checkout with: pip install -e . --no-build-isolation --no-deps"


def load() -> ModuleType:
    """Return ``pudnet._C``.

    Raises:
        BackendUnavailableError: it is missing, does not load, or was built for another version; in one sentence.
    """
    module, problem = _attempt()
    if module is None:
        raise BackendUnavailableError(problem)
    return module


def why_not() -> list[str]:
    """Reasons why the extension cannot be used; empty when it can. Never raises."""
    problem = _attempt()[1]
    return [problem] if problem else []


@functools.cache
def _attempt() -> tuple[ModuleType | None, str]:
    """Load the extension and shake hands with it; failure is remembered like success."""
    try:
        module = importlib.import_module("pudnet._C")
    except ModuleNotFoundError:
        return None, _missing()
    except ImportError as error:
        return None, f"pudnet._C does not load: {error}. {_REBUILD}"
    where = getattr(module, "__file__", "an unknown place")
    try:
        info = module.build_info()
        built, interface = info["version"], info["interface"]
    except (AttributeError, KeyError, TypeError):
        return None, f"the module pudnet._C found at {where} is not pudnet's extension. {_REBUILD}"
    if (built, interface) != (pudnet.__version__, INTERFACE):
        return None, (
            f"pudnet._C was built for pudnet {built} (interface {interface}) and this is pudnet {pudnet.__version__} "
            f"(interface {INTERFACE}). {_REBUILD}"
        )
    return module, ""


def _missing() -> str:
    """Say why there is no ``_C`` to import: none at all, or one for another Python."""
    ours = importlib.machinery.EXTENSION_SUFFIXES
    for folder in pudnet.__path__:
        for path in sorted(Path(folder).glob("_C.*")):
            if path.suffix in (".so", ".pyd") and path.name.removeprefix("_C") not in ours:
                tag = path.name.removeprefix("_C.").removesuffix(path.suffix)
                own = ours[0].strip(".").removesuffix(path.suffix)
                return f"pudnet._C in {folder} was built for {tag} and this Python is {own}. {_REBUILD}"
    return (
        f"pudnet is installed without its extension: there is no pudnet._C in {next(iter(pudnet.__path__))}. {_REBUILD}"
    )

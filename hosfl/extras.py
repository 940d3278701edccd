"""Packages that hosfl works without: each is of an extra, and imported where it is used."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, what: str, extra: str = "studies") -> Any:
    """A module of an extra, or one of hosfl's own that needs one. what: who needs it.

    Raises ImportError that says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("hosfl", "hosfl_kernels"):
            raise  # a fault of ours
        raise ImportError(f"{what} needs {error.name}, which is missing: pip install 'hosfl[{extra}]'") from error

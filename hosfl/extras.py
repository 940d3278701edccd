"""Packages that hosfl works without: each is of an extra, and imported where it is used."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, what: str) -> Any:
    """A module of the extra `studies`. what: who needs it. Raises ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{what} needs {error.name}, which is missing: pip install 'hosfl[studies]'") from error

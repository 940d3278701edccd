"""Optional packages. Each belongs to an extra, and is imported where it is used."""

from __future__ import annotations

import importlib
import sys
from typing import Any

# Packages that need a later Python than hosfl does.
FROM_PYTHON = {"onnxruntime": (3, 11)}


def require(module: str, what: str, extra: str = "studies") -> Any:
    """Import a module of an optional package, or a module of hosfl that imports one. what: names who needs it.

    Raises ImportError that says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("hosfl", "hosfl_kernels"):
            raise  # a fault of ours
        if (least := FROM_PYTHON.get(error.name)) is not None and sys.version_info < least:
            version = ".".join(map(str, least))
            raise ImportError(f"{what} needs {error.name}, and with it Python {version} or later") from error
        raise ImportError(f"{what} needs {error.name}, which is missing: pip install 'hosfl[{extra}]'") from error

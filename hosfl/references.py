"""Objects by name: "package.module:name", or "FILE.py:name" of a file that need not be installed."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


def load_object(name: str, what: str, known: Mapping[str, str]) -> Any:
    """The object of a name: a key of `known`, whose values are references, or a reference itself.

    what: the name's kind in errors, such as "method". Raises ValueError for a name that leads nowhere.
    """
    reference = known.get(name, name)
    place, colon, inner = reference.rpartition(":")
    if not colon or not place or not inner:
        raise ValueError(
            f"{what} must be one of {', '.join(known)}, or FILE.py:NAME or package.module:NAME, got {name!r}"
        )
    try:
        module = _load_file(Path(place), what) if place.endswith(".py") else _import_module(place, what)
    except SyntaxError as error:
        raise ValueError(f"{what} {name!r}: {error.filename}, line {error.lineno}: {error.msg}") from None
    try:
        return getattr(module, inner)
    except AttributeError:
        raise ValueError(f"{what} {name!r}: there is no {inner} in {place}") from None


def absolute_reference(name: str) -> str:
    """A reference with the absolute path of its file, so that it means the same in every folder."""
    place, colon, inner = name.rpartition(":")
    return f"{Path(place).absolute()}{colon}{inner}" if place.endswith(".py") else name


def reference_file(name: str) -> str:
    """The file of "FILE.py:name"; anything else is taken for a file's name itself."""
    place, _, _ = name.rpartition(":")
    return place if place.endswith(".py") else name


def short_name(name: str) -> str:
    """The short name for tables and folders: the part of a reference after its colon."""
    return name.rpartition(":")[2]


def _import_module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ValueError(
                f"{what}: there is no module {error.name}: install it, or name a file, FILE.py:NAME"
            ) from None
        raise


def _load_file(path: Path, what: str) -> ModuleType:
    """The module of a file, which is run once per process, so that its classes are the same for every caller."""
    path = path.absolute()
    if not path.is_file():
        raise ValueError(f"{what}: there is no file {path}")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: data classes look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

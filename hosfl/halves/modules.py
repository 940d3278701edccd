"""Copies of a module with some submodules replaced, which share all other weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn


def has_submodule(module: nn.Module, path: str) -> bool:
    """Whether there is a submodule at the path."""
    try:
        module.get_submodule(path)
        return True
    except AttributeError:
        return False


def existing_submodules(module: nn.Module, names: Sequence[str]) -> list[str]:
    """The names among these of submodules that exist and are not None: it depends on version and configuration."""
    return [name for name in names if getattr(module, name, None) is not None]


def copy_module(module: nn.Module) -> nn.Module:
    """A shallow copy of a module: it shares weights and children, but has its own attributes and list of children."""
    if hasattr(type(module), "__copy__"):  # graph modules and scripts
        duplicate: nn.Module = copy.copy(module)
    else:  # copy.copy calls __getstate__, which parametrized modules refuse
        duplicate = type(module).__new__(type(module))
        duplicate.__dict__.update(module.__dict__)
        duplicate.__dict__.pop("_compiled_call_impl", None)  # it would run the original's forward pass
    duplicate._modules = dict(module._modules)
    return duplicate


def replace_submodule(module: nn.Module, path: str, new: nn.Module | None) -> nn.Module:
    """A copy of the module with `new` at the path; None: with no submodule there. Everything else is shared.

    The path "" is the module itself.
    """
    if not path:
        assert new is not None
        return new
    duplicate, (name, _, rest) = copy_module(module), path.partition(".")
    children: Any = duplicate._modules
    children[name] = replace_submodule(children[name], rest, new) if rest else new
    return duplicate

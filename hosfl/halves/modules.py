"""Copies of a module with other modules inside, over the same weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn


def has_submodule(module: nn.Module, path: str) -> bool:
    """Whether there is a submodule at the path."""
    try:
        module.get_submodule(path)
        return True
    except AttributeError:
        return False


def existing_submodules(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the named submodules that exist and are not None; which do depends on version and configuration."""
    return [name for name in names if getattr(module, name, None) is not None]


def copy_module(module: nn.Module) -> nn.Module:
    """A shallow copy of a module: it shares weights and children, but has its own attributes and list of children."""
    if hasattr(type(module), "__copy__"):  # followed graphs and scripts know how
        own: nn.Module = copy.copy(module)
    else:  # copy.copy asks __getstate__, which parametrized modules refuse
        own = type(module).__new__(type(module))
        own.__dict__.update(module.__dict__)
        own.__dict__.pop("_compiled_call_impl", None)  # would run the module's own forward pass
    own._modules = dict(module._modules)
    return own


def replace_submodule(module: nn.Module, path: str, new: nn.Module | None) -> nn.Module:
    """A copy of the module with another submodule at the path, or none; everything else is shared.

    At the path "" is the module itself.
    """
    if not path:
        assert new is not None
        return new
    own, (name, _, rest) = copy_module(module), path.partition(".")
    own._modules[name] = replace_submodule(own._modules[name], rest, new) if rest else new  # type: ignore[arg-type]
    return own

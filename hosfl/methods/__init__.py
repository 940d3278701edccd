"""The ways to train a split model, a file each. `METHODS` is the list; nothing is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hosfl.references import load_object

if TYPE_CHECKING:
    from hosfl.methods.method import Method

METHODS = {
    "ho": "hosfl.methods.ho:HO",
    "first-order": "hosfl.methods.first_order:FirstOrder",
    "frozen": "hosfl.methods.frozen:Frozen",
    "checkpointed": "hosfl.methods.checkpointed:Checkpointed",
    "splitfed": "hosfl.methods.splitfed:SplitFed",
    "zo-both": "hosfl.methods.zo_both:ZOBoth",
    "hosl": "hosfl.methods.hosl:HOSL",
    "mu-splitfed": "hosfl.methods.mu_splitfed:MUSplitFed",
}


def method_of(name: str) -> type[Method]:
    """A method by its name in `METHODS`, or by "FILE.py:CLASS" or "package.module:CLASS". Raises ValueError."""
    method: type[Method] = load_object(name, "method", METHODS)
    if not hasattr(method, "reads") or not hasattr(method, "make_ledger"):
        raise ValueError(f"method {name!r} is a {type(method).__name__}: a subclass of hosfl.Method is needed")
    return method

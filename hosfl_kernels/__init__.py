"""Seeded noise, added in place: exact kernels for zeroth-order training. Start with `spec.py`."""

import sys

from hosfl_kernels import ops, rules
from hosfl_kernels.ops import *  # noqa: F403
from hosfl_kernels.rules import *  # noqa: F403

if sys.modules.get("torch") is not None:
    from hosfl_kernels import tensors as tensors  # registers the ops; without torch, or before it, nothing imports it

__all__ = ops.__all__ + rules.__all__

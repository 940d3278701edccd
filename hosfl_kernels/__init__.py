"""Seeded noise, added in place: exact kernels for zeroth-order training. Start with `spec.py`."""

from hosfl_kernels import ops, rules
from hosfl_kernels.ops import *  # noqa: F403
from hosfl_kernels.rules import *  # noqa: F403

__all__ = ops.__all__ + rules.__all__

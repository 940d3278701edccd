"""Seeded noise, added in place: exact kernels for zeroth-order training. Start with `spec.py`."""

from hosfl_kernels.ops import backends, derive, noise, perturb_, replay_, snap_

__all__ = ["backends", "derive", "noise", "perturb_", "replay_", "snap_"]

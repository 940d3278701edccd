"""Seeded noise, added in place: exact kernels for zeroth-order training. Start with `spec.py`."""

from hosfl_kernels.ops import backends, derive, noise, perturb_, project, replay_, snap_, update_
from hosfl_kernels.rules import SGD, AdamW

__all__ = ["SGD", "AdamW", "backends", "derive", "noise", "perturb_", "project", "replay_", "snap_", "update_"]

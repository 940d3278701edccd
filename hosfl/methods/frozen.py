"""The control: the client half stays as it is, and the server half learns alone.

Per client and round: the cut and labels go up, nothing comes down. Every other method must beat it; where none does,
the client half had nothing to learn.
"""

from __future__ import annotations

from hosfl.methods.method import Method


class Frozen(Method):
    """A client half that never learns: d theta = 0. It has no client rate, and no ledger."""

"""The faults of a simulation: settings of `hosfl simulate` in addition to those of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hosfl.settings import setting

LIES = (
    *("labels", "random-labels", "flipped-cuts", "scaled-cuts", "noisy-cuts"),
    *("flipped-scalars", "scalars"),
)


@dataclass(frozen=True)
class Faults:
    """The faults of a simulation.

    Args:
        dropout: the share of clients that vanish in the middle of a round, at any of its messages.
        absence: the share of invited clients that turn out to be away.
        longest_absence: rounds that a client stays away at most.
        delay: mean seconds that a message travels (exponential).
        deadline: seconds for each of a round's two exchanges. What the server gets later arrives in its next round and
            is refused.
        byzantine: the share of clients that lie.
        lies: what they falsify, of `LIES`, with commas between: "labels" (C - 1 - c for c, of C classes),
            "random-labels" (any class but the right one), "flipped-cuts" (times -1), "scaled-cuts" (times `magnitude`),
            "noisy-cuts" (noise of the same size), "flipped-scalars", and "scalars" (times `magnitude`, of either sign).
        magnitude: the factor of scaled cuts and scalars.
        damage: the share of messages in which a bit flips.
        crash_every: mean rounds between two deaths of the server, at any message or right after a commit; 0: never.

    Raises:
        ValueError: a value is invalid.
    """

    dropout: float = setting(0.0, "share of clients that vanish in the middle of a round")
    absence: float = setting(0.0, "share of invited clients that turn out to be away")
    longest_absence: int = setting(300, "rounds that a client stays away at most")
    delay: float = setting(0.0, "mean seconds that a message travels; nothing really waits")
    deadline: float = setting(10.0, "seconds for each of a round's two exchanges")
    byzantine: float = setting(0.0, "share of clients that lie")
    lies: str = setting("scalars", f"what they lie about, with commas between: {', '.join(LIES)}")
    magnitude: float = setting(1e6, "how many times too large liars' scalars and scaled cuts are")
    damage: float = setting(0.0, "share of messages in which a bit flips")
    crash_every: int = setting(0, "mean rounds between two deaths of the server; 0: never")

    def __post_init__(self) -> None:
        for name in ("dropout", "absence", "byzantine", "damage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1, got {getattr(self, name)}")
        for name in ("delay", "deadline", "magnitude"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        for lie in self.lie_names:
            if lie not in LIES:
                raise ValueError(f"lies are {', '.join(LIES)}, with commas between, got {self.lies!r}")
        for name in ("longest_absence", "crash_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.crash_every == 1:
            raise ValueError("a server that dies in every round never ends one: crash_every is 0, or 2 or more")

    @property
    def lie_names(self) -> list[str]:
        """The lies, as a list."""
        return self.lies.split(",")

"""A simulated network that loses, delays and damages messages, and a server that dies between two messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hosfl.protocol.messages import Message, Multiplier, Wire
from hosfl.runs.faults import Faults


class ServerDied(Exception):
    """The simulated server dies in the middle of a round."""


class UnreliableWire(Wire):
    """Loses, delays and damages messages, and kills the server, by the probabilities in `faults`."""

    def __init__(self, faults: Faults, random: np.random.Generator) -> None:
        super().__init__()
        self.faults, self.random = faults, random
        self.messages_left: dict[int, int] = {}  # by client that will vanish: the number of messages until it does
        self.clock: dict[int, float] = {}  # by client: seconds since the exchange began
        self.late: list[bytes] = []  # messages that the server gets in the next round
        self.steps_left: int | None = (
            None  # the number of messages and commits until the server dies; None: it does not
        )
        self.lost = self.overdue = self.damaged = 0

    def begin(self, clients: Mapping[int, int]) -> list[bytes]:
        """Begin a round. Returns the messages of the last one that are late.

        clients: by client, the number of messages that it sends and receives.
        """
        vanishing = self.random.random(len(clients)) < self.faults.dropout
        self.messages_left = {
            c: int(self.random.integers(clients[c])) for c, v in zip(clients, vanishing, strict=True) if v
        }
        self.clock = {}
        if self.faults.crash_every and self.random.random() < 1 / self.faults.crash_every:
            self.steps_left = int(self.random.integers(2 + sum(clients.values())))
        late, self.late = self.late, []
        return late

    def carry(self, client: int, messages: Sequence[Message]) -> bytes | None:
        """Carry messages to a client; None if they do not arrive in time."""
        data = super().carry(client, messages)
        assert data is not None
        if isinstance(messages[-1], Multiplier):
            self.clock[client] = 0.0  # the second exchange
        in_time, received = self._transmit(client, data)
        if received is not None and not in_time:
            self.overdue += 1
        return received if in_time else None

    def bring(self, client: int, data: bytes) -> bytes | None:
        """Bring bytes to the server; None if they do not arrive in time: late ones arrive in the next round."""
        in_time, received = self._transmit(client, data)
        if received is not None and not in_time:
            self.overdue += 1
            self.late.append(received)
        return received if in_time else None

    def _transmit(self, client: int, data: bytes) -> tuple[bool, bytes | None]:
        """Transmit bytes: (whether they arrive in time, those received); None for these if the client has vanished."""
        self.maybe_die()
        if client in self.messages_left:
            if self.messages_left[client] == 0:
                self.lost += 1
                return False, None
            self.messages_left[client] -= 1
        if self.faults.damage and self.random.random() < self.faults.damage:
            self.damaged += 1
            bit = int(self.random.integers(8 * len(data)))
            data = data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
        return self._is_in_time(client), data

    def maybe_die(self) -> None:
        """Count a message or a commit. Raises ServerDied if it is the server's last."""
        if self.steps_left is None:
            return
        if self.steps_left == 0:
            self.steps_left = None
            raise ServerDied
        self.steps_left -= 1

    def _is_in_time(self, client: int) -> bool:
        """Advance a client's clock by a random delay. Returns whether it is within the deadline."""
        if self.faults.delay:
            delay = float(self.random.exponential(self.faults.delay))
            self.clock[client] = self.clock.get(client, 0.0) + delay
        return self.clock.get(client, 0.0) <= self.faults.deadline

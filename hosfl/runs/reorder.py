"""A reorder buffer: messages of several clients are delivered in the clients' order, in whatever order they arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from hosfl.protocol.messages import Message


class ReorderBuffer:
    """Delivers each client's message once those of all clients before it have arrived or been given up.

    deliver: called with each message. messages: how many have arrived.
    """

    def __init__(self, clients: Iterable[int], deliver: Callable[[Message], None]) -> None:
        self.deliver, self._waiting = deliver, deque(sorted(clients))
        self._received: dict[int, Message | None] = {}
        self.messages = 0

    def add(self, client: int, message: Message | None) -> None:
        """Add a client's message. None: it will not send one."""
        self._received[client] = message
        self.messages += message is not None
        while self._waiting and self._waiting[0] in self._received:
            self._deliver(self._waiting.popleft())

    def flush(self) -> None:
        """Deliver everything that has arrived, ahead of messages that may still arrive."""
        arrived = [client for client in self._waiting if client in self._received]
        self._waiting = deque(client for client in self._waiting if client not in self._received)
        for client in arrived:
            self._deliver(client)

    def close(self) -> None:
        """Give up the messages that have not arrived, and deliver the others."""
        while self._waiting:
            self._deliver(self._waiting.popleft())

    def _deliver(self, client: int) -> None:
        message = self._received.pop(client, None)
        if message is not None:
            self.deliver(message)

"""Messages of several clients in the clients' order, however they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from hosfl.protocol.messages import Message


class InOrder:
    """Hands on what comes of several clients in their order, each once those before it have come, or never will."""

    def __init__(self, clients: Iterable[int], take: Callable[[Message], None]) -> None:
        self.take, self._waiting = take, deque(sorted(clients))
        self._there: dict[int, Message | None] = {}
        self.messages = 0  # that came

    def came(self, client: int, message: Message | None) -> None:
        """Its message is here; None: there will be none."""
        self._there[client] = message
        self.messages += message is not None
        while self._waiting and self._waiting[0] in self._there:
            self._hand_on(self._waiting.popleft())

    def take_those_here(self) -> None:
        """Hand on those that have come, before others that may still come."""
        here = [client for client in self._waiting if client in self._there]
        self._waiting = deque(client for client in self._waiting if client not in self._there)
        for client in here:
            self._hand_on(client)

    def end(self) -> None:
        """Whoever has not come will not."""
        while self._waiting:
            self._hand_on(self._waiting.popleft())

    def _hand_on(self, client: int) -> None:
        message = self._there.pop(client, None)
        if message is not None:
            self.take(message)

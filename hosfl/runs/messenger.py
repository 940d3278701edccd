"""The server's messages to its clients, and their replies. An engine carries the bytes: see `hosfl.engines.engine`.

A request carries the rounds that its client has missed. Where the server does not know which round a client has
reached, the client answers with its position, and is asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hosfl.engines.engine import Engine, Reply
from hosfl.methods.reasons import Reasons
from hosfl.methods.server import Server
from hosfl.protocol.messages import Complaint, Differs, Hello, Message, PoolMoves, Records, Statistics, Wire, text_of
from hosfl.terminal import printable

OnReply = Callable[[int, Message | None], None]  # called with a client and its answer; None: no usable answer
TRIES = 3  # requests for one answer: a client may first send its position, and then find that its half is wrong
POSITION_SHARE = 0.25  # of the deadline, in which clients of unknown position must send theirs


@dataclass
class Messenger:
    """Sends requests to clients and passes their answers on.

    Two arguments of its methods are callables. on_reply: see `OnReply`. is_enough: called after each answer; whether to
    go on without the remaining clients.

    Attributes:
        server: decodes and checks the replies, and knows which rounds a client has missed.
        engine: carries the messages.
        deadline: seconds for each exchange; None: as long as it takes.
        wire: counts the bytes; a simulation's loses some.
        positions: by client, (rounds, epoch) that it has applied, where the server knows.
        missing: how many requests were not answered.
        failures: by client, why it did not answer in this round: "gone", "late", "lost" or "failed: ...".
        complaints: why clients refused what they were sent.
    """

    server: Server
    engine: Engine
    deadline: float | None = None
    wire: Wire = field(default_factory=Wire)
    positions: dict[int, tuple[int, int]] = field(default_factory=dict)
    missing: int = 0
    failures: dict[int, str] = field(default_factory=dict)
    complaints: Reasons = field(default_factory=Reasons)

    def collect(
        self,
        clients: Sequence[int],
        ask: Callable[[int], Sequence[Message]],
        on_reply: OnReply,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Ask clients, each after the rounds that it has missed, and pass on what they answer.

        ask: the request to a client, by its number; called for every try. `on_reply` is not called for a client that
        answers every try with its position.
        """
        ends = self._deadline_at()
        missed = {n: self._missed(n) for n in clients}
        if self.server.ledger is not None:
            # A client sends its position at once, so nobody has to wait for one that computes. A client that stays
            # silent costs the others only this share of their time.
            unknown = {n: missed.pop(n) for n in clients if n not in self.positions}
            missed |= self._collect_once(unknown, ask, on_reply, is_enough, self._deadline_at(POSITION_SHARE))
        for _ in range(TRIES):
            missed = self._collect_once(missed, ask, on_reply, is_enough, ends)

    def deliver(
        self,
        messages: Mapping[int, Message],
        on_reply: OnReply,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Send each client its message, once, and pass on what they answer."""
        for client, message in self._replies({n: [message] for n, message in messages.items()}, self._deadline_at()):
            on_reply(client, message)
            if is_enough():
                break

    def _collect_once(
        self,
        missed: Mapping[int, Sequence[Message]],
        ask: Callable[[int], Sequence[Message]],
        on_reply: OnReply,
        is_enough: Callable[[], bool],
        ends: float | None,
    ) -> dict[int, list[Message]]:
        """One try. Returns the updates for clients whose position was not what the server believed."""
        again: dict[int, list[Message]] = {}
        for client, message in self._replies({n: [*some, *ask(n)] for n, some in missed.items()}, ends):
            if isinstance(message, (Hello, Differs, Statistics)):
                of = self.server.calibration if isinstance(message, Statistics) else self.server.welcome
                news = of(message)
                if news is not None:
                    again[client] = [news]
                    continue
                message = None
            on_reply(client, message)
            if message is None:
                continue
            for applied in missed[client]:
                self.positions[client] = _position_after(applied)
            if is_enough():
                return {}
        return again

    def _replies(
        self, asks: Mapping[int, Sequence[Message]], ends: float | None
    ) -> Iterator[tuple[int, Message | None]]:
        """Clients and their replies, as they arrive; None for no usable reply. Closing it cancels the request."""
        data: dict[int, bytes] = {}
        for client, messages in asks.items():
            carried = self.wire.carry(client, messages)
            if carried is None:
                self._count_missing(client)
            else:
                data[client] = carried
        if not data:
            return
        for reply in self.engine.ask(data, None if ends is None else max(0.0, ends - time.monotonic())):
            yield reply.client, self._receive(reply)

    def _receive(self, reply: Reply) -> Message | None:
        """The message of a reply; None if there is none or it cannot be read."""
        data = None if reply.data is None else self.wire.bring(reply.client, reply.data)
        if data is None:
            self._count_missing(reply.client)
            self.failures[reply.client] = reply.reason or "lost"
            return None
        message = self.server.receive(data, reply.client)
        if message is None:
            self.positions.pop(reply.client, None)
            return None
        self.wire.count(message)
        if isinstance(message, Complaint):
            self.positions.pop(reply.client, None)
            self.complaints.add(f"client {reply.client}: {printable(text_of(message))}")
            return None
        return message

    def _count_missing(self, client: int) -> None:
        self.missing += 1
        self.positions.pop(client, None)  # unknown whether it has applied what it was sent: it will say

    def _missed(self, client: int) -> list[Message]:
        """The update that a client has missed; nothing where its position is unknown."""
        if client not in self.positions:
            return []
        round, epoch = self.positions[client]
        news = self.server.welcome(Hello(client=client, round=round, epoch=epoch), from_client=False)
        return [] if news is None else [news]

    def _deadline_at(self, share: float = 1.0) -> float | None:
        return None if self.deadline is None else time.monotonic() + share * self.deadline


def _position_after(news: Message) -> tuple[int, int]:
    """(rounds, epoch) of a client once it has applied an update."""
    match news:
        case Records():
            return news.round + len(news.coefficients), news.epoch
        case PoolMoves():
            return int(news.until[0]), news.epoch
        case _:
            return news.round, news.epoch

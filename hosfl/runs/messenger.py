"""The server's messages to its clients, and what comes back. An engine carries the bytes: see `hosfl.engines.engine`.

A client that has missed rounds is sent what it has missed along with what it is asked. Where the server does not know
how far a client is, the client says so, and is asked again.
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

Came = Callable[[int, Message | None], None]  # of a client and its answer; None: it brought nothing of use
TRIES = 3  # asks for one answer: a client that is elsewhere, and one that then finds its half wrong, are asked again
TO_SAY_WHERE = 0.25  # of the deadline: for those of whom the server does not know where they are


@dataclass
class Messenger:
    """Asks clients, and hands on what they answer.

    Two arguments of its methods are callables. came: see `Came`. suffices: says after an answer whether to go on
    without the rest.

    Attributes:
        server: reads what comes, and knows what a client has missed.
        engine: carries the messages.
        deadline: seconds for each exchange; None: as long as it takes.
        wire: counts the bytes; a simulation's loses some.
        where: by client, (rounds, epoch) that it has applied, as far as the server knows.
        missing: how many times a client that was asked did not answer.
        why: by client, why it did not answer in this round: "gone", "late", "lost" or "failed: ...".
        complained: why clients refused what they were sent.
    """

    server: Server
    engine: Engine
    deadline: float | None = None
    wire: Wire = field(default_factory=Wire)
    where: dict[int, tuple[int, int]] = field(default_factory=dict)
    missing: int = 0
    why: dict[int, str] = field(default_factory=dict)
    complained: Reasons = field(default_factory=Reasons)

    def collect(
        self,
        clients: Sequence[int],
        ask: Callable[[int], Sequence[Message]],
        came: Came,
        suffices: Callable[[], bool] = lambda: False,
    ) -> None:
        """Hand on what clients answer when they have taken all that they have missed.

        ask: what a client is asked, by number; called for every try. Of a client that has only said where it is, at
        every try, `came` hears nothing.
        """
        ends = self._ends_at()
        missed = {n: self._missed(n) for n in clients}
        if self.server.ledger is not None:
            # Where a client is, it says at once: nobody who computes is waited for meanwhile. One that says nothing
            # leaves the others most of their time.
            unknown = {n: missed.pop(n) for n in clients if n not in self.where}
            missed |= self._collect_once(unknown, ask, came, suffices, self._ends_at(TO_SAY_WHERE))
        for _ in range(TRIES):
            missed = self._collect_once(missed, ask, came, suffices, ends)

    def deliver(
        self,
        messages: Mapping[int, Message],
        came: Came,
        suffices: Callable[[], bool] = lambda: False,
    ) -> None:
        """Send each client its message, and hand on what they answer; none of them is asked twice."""
        for client, message in self._replies({n: [message] for n, message in messages.items()}, self._ends_at()):
            came(client, message)
            if suffices():
                break

    def _collect_once(
        self,
        missed: Mapping[int, Sequence[Message]],
        ask: Callable[[int], Sequence[Message]],
        came: Came,
        suffices: Callable[[], bool],
        ends: float | None,
    ) -> dict[int, list[Message]]:
        """Returns what those have missed who said that they are elsewhere."""
        again: dict[int, list[Message]] = {}
        for client, message in self._replies({n: [*some, *ask(n)] for n, some in missed.items()}, ends):
            if isinstance(message, (Hello, Differs, Statistics)):
                of = self.server.calibration if isinstance(message, Statistics) else self.server.welcome
                news = of(message)
                if news is not None:
                    again[client] = [news]
                    continue
                message = None
            came(client, message)
            if message is None:
                continue
            for applied in missed[client]:
                self.where[client] = _after(applied)
            if suffices():
                return {}
        return again

    def _replies(
        self, asks: Mapping[int, Sequence[Message]], ends: float | None
    ) -> Iterator[tuple[int, Message | None]]:
        """What comes back, as it comes: None where it is nothing. Whoever closes this is done with the ask."""
        data: dict[int, bytes] = {}
        for client, messages in asks.items():
            carried = self.wire.carry(client, messages)
            if carried is None:
                self._did_not_answer(client)
            else:
                data[client] = carried
        if not data:
            return
        for reply in self.engine.ask(data, None if ends is None else max(0.0, ends - time.monotonic())):
            yield reply.client, self._receive(reply)

    def _receive(self, reply: Reply) -> Message | None:
        """The message of a reply, if it brings one that can be read."""
        data = None if reply.data is None else self.wire.bring(reply.client, reply.data)
        if data is None:
            self._did_not_answer(reply.client)
            self.why[reply.client] = reply.reason or "lost"
            return None
        message = self.server.receive(data, reply.client)
        if message is None:
            self.where.pop(reply.client, None)
            return None
        self.wire.count(message)
        if isinstance(message, Complaint):
            self.where.pop(reply.client, None)
            self.complained.add(f"client {reply.client}: {printable(text_of(message))}")
            return None
        return message

    def _did_not_answer(self, client: int) -> None:
        self.missing += 1
        self.where.pop(client, None)  # whether it has taken what it was sent, it will say

    def _missed(self, client: int) -> list[Message]:
        """What a client has missed, as far as the server knows where it is."""
        if client not in self.where:
            return []
        round, epoch = self.where[client]
        news = self.server.welcome(Hello(client=client, round=round, epoch=epoch), from_client=False)
        return [] if news is None else [news]

    def _ends_at(self, share: float = 1.0) -> float | None:
        return None if self.deadline is None else time.monotonic() + share * self.deadline


def _after(news: Message) -> tuple[int, int]:
    """(rounds, epoch) of a client that has applied what it was sent."""
    match news:
        case Records():
            return news.round + len(news.coefficients), news.epoch
        case PoolMoves():
            return int(news.until[0]), news.epoch
        case _:
            return news.round, news.epoch

"""The exchange of messages between the server and its clients. An engine carries the bytes: see `hosfl.engines.engine`.

A request contains the rounds that its client has missed. If the server does not know the client's position, that is
the rounds that it has applied, the client answers with its position, and gets another request.
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
TRIES = 3  # requests for one answer: a client may first send its position, and then report that its half is wrong
POSITION_SHARE = 0.25  # the part of the deadline in which clients of unknown position must send it


@dataclass
class Messenger:
    """Sends requests to clients and passes their answers on.

    Its methods take two callables. on_reply: see `OnReply`. is_enough: called after each answer; returns whether to go
    on without the remaining clients.

    Attributes:
        server: decodes and checks the replies, and knows which rounds a client has missed.
        engine: carries the messages.
        deadline: seconds for each exchange; None: as long as it takes.
        wire: counts the bytes; a simulation's loses some.
        positions: by client, if known, (rounds, epoch) that it has applied.
        missing: the number of requests that were not answered.
        failures: by client, why it did not answer in this round: "gone", "late", "lost" or "failed: ...".
        complaints: the reasons for which clients refused requests.
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
        request: Callable[[int], Sequence[Message]],
        on_reply: OnReply,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Send each client the rounds that it has missed and a request, and pass on the answers.

        request: a client's number -> its request; called for every try. `on_reply` is not called for a client that
        answers every try with its position.
        """
        ends = self._deadline_at()
        updates = {n: self._missed_update(n) for n in clients}
        if self.server.ledger is not None:
            # Clients of unknown position are asked first. Each sends its position at once, so that nobody has to wait
            # for one that computes. A client that stays silent costs the others only this share of their time.
            unknown = {n: updates.pop(n) for n in clients if n not in self.positions}
            updates |= self._collect_once(unknown, request, on_reply, is_enough, self._deadline_at(POSITION_SHARE))
        for _ in range(TRIES):
            updates = self._collect_once(updates, request, on_reply, is_enough, ends)

    def deliver(
        self,
        messages: Mapping[int, Message],
        on_reply: OnReply,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Send each client its message, once, and pass on the answers."""
        for client, message in self._replies({n: [message] for n, message in messages.items()}, self._deadline_at()):
            on_reply(client, message)
            if is_enough():
                break

    def _collect_once(
        self,
        updates: Mapping[int, Sequence[Message]],
        request: Callable[[int], Sequence[Message]],
        on_reply: OnReply,
        is_enough: Callable[[], bool],
        ends: float | None,
    ) -> dict[int, list[Message]]:
        """Try once. Returns the updates for clients whose position was not what the server assumed."""
        updates_again: dict[int, list[Message]] = {}
        for client, message in self._replies({n: [*update, *request(n)] for n, update in updates.items()}, ends):
            if isinstance(message, (Hello, Differs, Statistics)):
                make_update = self.server.calibration if isinstance(message, Statistics) else self.server.welcome
                update = make_update(message)
                if update is not None:
                    updates_again[client] = [update]
                    continue
                message = None
            on_reply(client, message)
            if message is None:
                continue
            for applied in updates[client]:
                self.positions[client] = _position_after(applied)
            if is_enough():
                return {}
        return updates_again

    def _replies(
        self, requests: Mapping[int, Sequence[Message]], ends: float | None
    ) -> Iterator[tuple[int, Message | None]]:
        """Send requests, and yield (client, its reply) as they arrive; None for no usable reply.

        Closing the iterator cancels the requests.
        """
        data: dict[int, bytes] = {}
        for client, messages in requests.items():
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
        """Decode a reply; None if there is none, or it cannot be decoded, or it is a complaint."""
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
        self.positions.pop(client, None)  # it may or may not have applied the update

    def _missed_update(self, client: int) -> list[Message]:
        """Return the update that a client has missed; [] if there is none, or its position is unknown."""
        if client not in self.positions:
            return []
        round, epoch = self.positions[client]
        update = self.server.welcome(Hello(client=client, round=round, epoch=epoch), from_client=False)
        return [] if update is None else [update]

    def _deadline_at(self, share: float = 1.0) -> float | None:
        return None if self.deadline is None else time.monotonic() + share * self.deadline


def _position_after(update: Message) -> tuple[int, int]:
    """Return the position, (rounds, epoch), of a client that has applied an update."""
    match update:
        case Records():
            return update.round + len(update.coefficients), update.epoch
        case PoolMoves():
            return int(update.until[0]), update.epoch
        case _:
            return update.round, update.epoch

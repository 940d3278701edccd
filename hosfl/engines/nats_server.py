"""The server's side of a NATS broker: whom it asks, and what is believed of clients. See `nats.py`."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import ssl
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from hosfl.engines.engine import EngineError, Reply, check_ask
from hosfl.engines.frames import (
    SMALL,
    WINDOW,
    Beat,
    Bye,
    Ended,
    EndReason,
    Fetch,
    FrameError,
    Incoming,
    Outgoing,
    Piece,
    Ping,
    Want,
    decode,
    encode,
    start_incoming,
)
from hosfl.engines.nats import MAX_MESSAGE, STALLED, TWO_SERVERS, ThrottledLog, check_line, log
from hosfl.engines.nats_link import Link
from hosfl.terminal import printable

LARGEST = 64 * 1024 * 1024 + 64 * 1024  # bytes of a reply, where nobody says what the run's are: 64 MB, and a frame
ALL_WINDOWS = 4 * WINDOW  # bytes on their way to the server; a broker cuts who lets 64 MB lie
GRACE = 4.0  # seconds from a new connection on, in which clients find their way back too
ABSENT = 1.0  # seconds in which a client's connection may come back before its asks are over
PING = 1.0  # seconds between two pings
RATE, BURST = 200.0, 1000.0  # frames of a client that nobody asked for: a second, and at once


@dataclass
class _Ask:
    """One client's ask. id: of the transfer of the ask, and of its answer. line: the client's line that has it."""

    client: int
    id: int
    outgoing: Outgoing
    replies: SimpleQueue[Reply | None]
    line: int | None = None
    incoming: Incoming | None = None


@dataclass
class _Peer:
    """The server's state of a client. line: None while it is away. absent: when its connection was lost."""

    line: int | None = None
    connection: int = 0
    heard: float = 0.0
    absent: float | None = None
    replaced: tuple[int, ...] = ()
    asked: dict[int, _Ask] = field(default_factory=dict)
    file: tuple[int, Outgoing] | None = None
    allowance: float = BURST
    counted: float = 0.0

    def expects(self, piece: Piece) -> bool:
        """Whether the piece is the next one of an answer that was asked for."""
        asked = self.asked.get(piece.id)
        return asked is not None and asked.incoming is not None and asked.incoming.fits(piece)

    def receiving(self) -> bool:
        """Whether an answer of this client is being received: one at a time."""
        return any(asked.incoming is not None for asked in self.asked.values())

    def within_rate(self, now: float) -> bool:
        """Whether one more frame is within the client's rate limit; counts it if so (a token bucket)."""
        self.allowance = min(BURST, self.allowance + (now - self.counted) * RATE)
        self.counted = now
        if self.allowance < 1:
            return False
        self.allowance -= 1
        return True


class NatsEngine:
    """The server's side; one for a run at a time.

    urls: of brokers, such as "tls://host:4222". run: its name, of letters, digits, _ and -. clients: numbered
    0 ... clients - 1. tls: with the authority of the broker's certificate, our own and its key, as `Member.context`
    makes it; None for a broker without certificates, which anybody can speak to: tests. largest: bytes of a reply,
    until `limit` says what they are in the run. patience: seconds of silence after which a client is gone whose
    connection still stands.

    Connects in the background, and waits for a broker that is away. Raises EngineError for what cannot work.
    dropped: frames that were not followed, by client: malformed, late, twice, or too many.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        run: str,
        clients: int,
        tls: ssl.SSLContext | None = None,
        *,
        largest: int = LARGEST,
        patience: float = 10.0,
    ) -> None:
        check_line(run, clients)
        self.run, self.largest, self.patience = run, largest, patience
        self.dropped: Counter[int] = Counter()
        self._id, self._connections, self._since, self._pinged = secrets.randbits(64), 0, 0.0, 0.0
        self._peers = [_Peer() for _ in range(clients)]
        self._strangers = _Peer()  # all that the broker knows and the run does not
        self._offered: dict[str, Outgoing] | None = None
        self._moving: set[int] = set()  # asks whose answer is on its way
        self._log = ThrottledLog()
        self._subject = re.compile(rf"hosfl\.{run}\.up\.(0|[1-9][0-9]{{0,8}})\.(m|gone)".encode())
        subjects = [f"hosfl.{run}.up.*.m", f"hosfl.{run}.up.*.gone"]
        self._link = Link(urls, tls, f"the server of run {run}", subjects, self._receive, self._connected, self._tick)
        self._link.start()

    def present(self) -> frozenset[int]:
        """The clients that could be asked now, by number: none while there is no broker."""
        return self._link.call(self._present)

    def ask(self, messages: Mapping[int, bytes], deadline: float | None = None) -> Iterator[Reply]:
        """See `Engine.ask`. The asks leave when the first reply is asked for.

        Without a broker, and for some seconds after it is back, clients that are not here are waited for. A message
        that is too large fails the ask of its client alone.
        """
        check_ask(messages, len(self._peers))
        return self._replies(messages, deadline)

    def _replies(self, messages: Mapping[int, bytes], deadline: float | None) -> Iterator[Reply]:
        ends = None if deadline is None else time.monotonic() + deadline
        replies: SimpleQueue[Reply | None] = SimpleQueue()
        outgoing = {client: Outgoing(bytes(data)) for client, data in messages.items() if len(data) <= MAX_MESSAGE}
        for client in messages.keys() - outgoing.keys():
            text = f"an ask of {len(messages[client])} bytes; the largest is one of {MAX_MESSAGE}"
            log.warning("client %d: %s", client, text)
            replies.put(Reply(client, None, f"failed: {text}"))
        asks = self._link.call(self._begin, outgoing, replies)
        unanswered = dict.fromkeys(messages)
        try:
            while unanswered:
                try:
                    reply = replies.get(timeout=None if ends is None else max(0.0, ends - time.monotonic()))
                except Empty:
                    break
                if reply is None:
                    raise EngineError(f"{self._link.name} was closed during an ask")
                del unanswered[reply.client]
                yield reply
        finally:
            with contextlib.suppress(EngineError):  # closed: nobody is asked any more
                self._link.call(self._end, asks)
        while not replies.empty():  # what came while the ask was ended
            if reply := replies.get():
                del unanswered[reply.client]
                yield reply
        for client in unanswered:
            yield Reply(client, None, "late")

    def offer(self, files: Mapping[str, bytes]) -> None:
        """See `Engine.offer`. Until the first offer, those that fetch wait."""
        offered = {name: Outgoing(bytes(data)) for name, data in files.items()}
        self._link.call(self._offer, offered)

    def limit(self, largest: int) -> None:
        """See `Engine.limit`."""
        self.largest = largest

    def close(self) -> None:
        """See `Engine.close`."""
        with contextlib.suppress(EngineError):
            self._link.call(self._close)
        self._link.close()

    # From here on, everything runs in the link's thread.

    def _present(self) -> frozenset[int]:
        return frozenset(n for n, peer in enumerate(self._peers) if peer.line is not None and self._link.up)

    def _offer(self, offered: dict[str, Outgoing]) -> None:
        self._offered = offered

    def _close(self) -> None:
        for peer in self._peers:
            for asked in peer.asked.values():
                asked.replies.put(None)

    def _begin(self, outgoing: Mapping[int, Outgoing], replies: SimpleQueue[Reply | None]) -> list[_Ask]:
        asks = [_Ask(client, secrets.randbits(64), data, replies) for client, data in outgoing.items()]
        for asked in asks:
            peer = self._peers[asked.client]
            peer.asked[asked.id] = asked
            if peer.line is not None:
                asked.line = peer.line
                self._post(asked.client, asked.outgoing.announcement(asked.id))
            elif self._settled(time.monotonic()):
                self._finish(asked, Reply(asked.client, None, "gone"))
        return asks

    def _end(self, asks: list[_Ask]) -> None:
        for asked in asks:
            if self._forget(asked):
                log.info("client %d had not answered ask %016x when it ended", asked.client, asked.id)
                self._post(asked.client, encode(Ended(asked.id, EndReason.LATE)))

    def _forget(self, asked: _Ask) -> bool:
        self._link.stop(self._down(asked.client), asked.id)
        self._moving.discard(asked.id)
        return self._peers[asked.client].asked.pop(asked.id, None) is not None

    def _finish(self, asked: _Ask, reply: Reply, why: EndReason = EndReason.DONE, text: str = "") -> None:
        self._forget(asked)
        self._post(asked.client, encode(Ended(asked.id, why, text)))
        asked.replies.put(reply)

    def _down(self, client: int) -> str:
        return f"hosfl.{self.run}.down.{client}.m"

    def _post(self, client: int, frame: bytes, reply: str = "") -> None:
        self._link.post(self._down(client), frame, reply)

    def _ping(self, client: int) -> None:
        """Ping a client. If nobody listens, the broker replies at the `gone` subject at once."""
        self._post(client, encode(Ping(self._id, self._connections)), f"hosfl.{self.run}.up.{client}.gone")

    def _settled(self, now: float) -> bool:
        return self._link.up and now - self._since > GRACE

    def _connected(self) -> None:
        self._connections += 1
        self._since = self._pinged = time.monotonic()
        for client, peer in enumerate(self._peers):
            peer.heard, peer.absent = self._since, None
            self._ping(client)
            for asked in peer.asked.values():
                self._request_more(asked, again=True)

    def _tick(self, since: float) -> None:
        now = time.monotonic()
        settled = self._settled(since)
        for client, peer in enumerate(self._peers):
            if settled and peer.line is None:
                for asked in list(peer.asked.values()):
                    self._finish(asked, Reply(client, None, "gone"))
            elif settled and peer.absent is not None and since - peer.absent > ABSENT:
                self._gone(client, "its connection is gone")
            elif settled and since - peer.heard > self.patience:
                self._gone(client, f"nothing was heard of it for {self.patience:g} seconds")
            for asked in peer.asked.values():
                if asked.incoming is not None and now - asked.incoming.moved > STALLED:
                    self._request_more(asked, again=True)
        if now - self._pinged > PING:
            self._pinged = now
            for client in range(len(self._peers)):
                self._ping(client)

    def _gone(self, client: int, why: str) -> None:
        peer = self._peers[client]
        log.info("client %d is gone: %s", client, why)
        left, peer.line, peer.absent = peer.line, None, None
        for asked in list(peer.asked.values()):
            if asked.line == left:
                self._finish(asked, Reply(client, None, "gone"))
        if peer.file is not None:
            self._link.stop(self._down(client), peer.file[0])
            peer.file = None

    def _drop(self, client: int, why: str, *values: object) -> None:
        self.dropped[client] += 1
        self._log.warn((client, why), f"client %d: {why}", client, *values)

    def _receive(self, subject: bytes, data: bytes) -> None:
        of = self._subject.fullmatch(subject)
        client = int(of[1]) if of else -1
        now = time.monotonic()
        if of is None or client >= len(self._peers):
            self._log.warn("stranger", "a message at %s, of no client of the run", printable(repr(subject)))
            if of is not None and of[2] == b"m" and self._strangers.within_rate(now):
                self._turn_away(client, data)
            return
        peer = self._peers[client]
        if of[2] == b"gone":
            if peer.absent is None:  # said by the broker; or by the client, of itself
                peer.absent = now
            return
        peer.heard, peer.absent = now, None
        try:
            frame = decode(data)
        except FrameError as error:
            if peer.within_rate(now):
                self._drop(client, "bytes that are no message are dropped: %s", error)
            else:
                self._drop(client, "it sends too much, and is not listened to")
            return
        if isinstance(frame, Piece) and peer.expects(frame):
            self._on_piece(client, frame)
        elif not peer.within_rate(now):
            self._drop(client, "it sends too much, and is not listened to")
        elif isinstance(frame, Piece):
            self._on_piece(client, frame)
        elif isinstance(frame, Beat):
            self._on_beat(client, frame)
        elif isinstance(frame, Want):
            self._on_want(client, frame)
        elif isinstance(frame, Fetch):
            self._on_fetch(client, frame)
        elif isinstance(frame, Bye):
            if frame.line == peer.line:
                self._gone(client, "it said goodbye")
        elif isinstance(frame, Ended):
            if frame.id == self._id:  # it hears another server, which we cannot; believed for a line of the log
                self._log.warn("servers", f"{TWO_SERVERS}; client %d says so", self.run, client, level=logging.ERROR)
            elif peer.file is not None and peer.file[0] == frame.id:
                peer.file = None
        else:
            self._drop(client, "a frame that only servers send is dropped")

    def _turn_away(self, client: int, data: bytes) -> None:
        """Tell a client whose number the run does not have that it is not in it; it would wait for ever otherwise."""
        with contextlib.suppress(FrameError):
            frame = decode(data)
            if isinstance(frame, (Beat, Fetch)):
                last = len(self._peers) - 1
                text = f"this run has clients 0 to {last}, and no client {client}: a new run takes it in"
                id = frame.line if isinstance(frame, Beat) else frame.id
                self._post(client, encode(Ended(id, EndReason.REFUSED, text)))

    def _on_beat(self, client: int, beat: Beat) -> None:
        peer = self._peers[client]
        if beat.line in peer.replaced:
            self._post(client, encode(Ended(beat.line, EndReason.REPLACED)))
            return
        if beat.line != peer.line:
            if peer.line is not None:
                peer.replaced = (*peer.replaced[-7:], peer.line)
                self._gone(client, "another process of the same client is here")
            peer.line, peer.connection = beat.line, beat.connection
            log.info("client %d is here", client)
            self._ping(client)  # before it hears an ask it knows whose
        again = beat.connection != peer.connection
        peer.connection = beat.connection
        listed = dict(beat.asks)
        for asked in peer.asked.values():
            asked.line = peer.line
            if asked.id not in listed:
                if asked.incoming is None:
                    self._post(client, asked.outgoing.announcement(asked.id))
            elif asked.incoming is not None:
                if again:
                    self._request_more(asked, again=True)
            elif listed[asked.id] and not peer.receiving():
                self._post(client, encode(Want(asked.id, 0, 0)))
        for id in listed:
            if id not in peer.asked:
                self._post(client, encode(Ended(id, EndReason.UNKNOWN)))

    def _request_more(self, asked: _Ask, again: bool = False) -> None:
        if asked.incoming is not None:
            window = max(SMALL, min(WINDOW, ALL_WINDOWS // len(self._moving)))
            want = asked.incoming.wanted(asked.id, window, again)
            if want is not None:
                self._post(asked.client, want)

    def _on_piece(self, client: int, piece: Piece) -> None:
        peer = self._peers[client]
        asked = peer.asked.get(piece.id)
        if asked is None:
            self._drop(client, "late, to ask %016x, which is over", piece.id)
            self._post(client, encode(Ended(piece.id, EndReason.LATE)))
            return
        if piece.total > self.largest:
            text = f"a reply of {piece.total} bytes; the largest is one of {self.largest}"
            self._drop(client, "%s", text)
            self._finish(asked, Reply(client, None, f"failed: {text}"), EndReason.REFUSED, text)
            return
        if asked.incoming is None:
            incoming = start_incoming(piece, time.monotonic)
            if not incoming.whole and peer.receiving():
                if piece.data:
                    self._drop(client, "a piece of ask %016x that was not asked for", piece.id)
                return  # its beats will say that there is another
            asked.incoming = incoming
            self._moving.add(asked.id)
        elif asked.incoming.fits(piece):
            asked.incoming.take(piece)
        elif piece.data:  # and not the announcement once more
            self._drop(client, "a piece of ask %016x that was not asked for", piece.id)
            return
        incoming = asked.incoming
        if not incoming.whole:
            self._request_more(asked)
            return
        data = incoming.message()
        if data is None:
            self._drop(client, "its reply to ask %016x is damaged", piece.id)
            self._finish(
                asked, Reply(client, None, "failed: damaged on its way"), EndReason.REFUSED, "damaged on its way"
            )
        elif incoming.failed:
            reason = printable(data.decode(errors="replace"))
            self._finish(asked, Reply(client, None, f"failed: {reason}"))
        else:
            self._finish(asked, Reply(client, data))

    def _on_want(self, client: int, want: Want) -> None:
        peer = self._peers[client]
        asked = peer.asked.get(want.id)
        outgoing = asked.outgoing if asked else None
        if peer.file is not None and peer.file[0] == want.id:
            outgoing = peer.file[1]
        if outgoing is None:
            self._post(client, encode(Ended(want.id, EndReason.UNKNOWN)))
        elif want.offset >= len(outgoing.data) or want.length == 0:
            self._drop(client, "it wants nothing of a message, or what lies behind its end")
        else:
            end = min(len(outgoing.data), want.offset + min(want.length, WINDOW))
            self._link.stream(self._down(client), want.id, outgoing, want.offset, end)

    def _on_fetch(self, client: int, fetch: Fetch) -> None:
        if self._offered is None:
            return
        peer = self._peers[client]
        if peer.file is not None and peer.file[0] != fetch.id:
            self._link.stop(self._down(client), peer.file[0])
        outgoing = self._offered.get(fetch.name)
        if outgoing is None:
            self._post(client, encode(Ended(fetch.id, EndReason.REFUSED)))
        else:
            peer.file = fetch.id, outgoing
            self._post(client, outgoing.announcement(fetch.id))

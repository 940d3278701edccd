"""The server's side of the NATS engine: sends requests, receives answers, limits what clients send. See `nats.py`."""

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
from hosfl.engines.nats import MAX_MESSAGE, STALLED, TWO_SERVERS, ThrottledLog, check_names, log
from hosfl.engines.nats_link import Link
from hosfl.terminal import printable

LARGEST = 64 * 1024 * 1024 + 64 * 1024  # default limit of a reply, bytes: 64 MB, and a frame
ALL_WINDOWS = 4 * WINDOW  # bytes in flight to the server; a broker disconnects a receiver with 64 MB pending
CONNECT_GRACE = 4.0  # seconds after the server has connected, in which clients may reconnect too
LOST_GRACE = 1.0  # seconds in which a client may reconnect before its requests fail
PING_EVERY = 1.0  # seconds
RATE, BURST = 200.0, 1000.0  # rate limit of a client's unrequested frames: per second, and at once


@dataclass
class _Request:
    """A request to one client. id: of its transfer, and of its answer's. line: the client's line that received it."""

    client: int
    id: int
    outgoing: Outgoing
    replies: SimpleQueue[Reply | None]
    line: int | None = None
    incoming: Incoming | None = None


@dataclass
class _Peer:
    """The server's state of a client.

    line: the number of its line; None while it is not connected. last_heard: time of its last frame. lost_since: when
    its connection was lost; None if it stands. replaced: earlier lines of this client. file: the file that it fetches,
    with the transfer's id. allowance, last_counted: of the rate limit.
    """

    line: int | None = None
    connection: int = 0
    last_heard: float = 0.0
    lost_since: float | None = None
    replaced: tuple[int, ...] = ()
    requests: dict[int, _Request] = field(default_factory=dict)
    file: tuple[int, Outgoing] | None = None
    allowance: float = BURST
    last_counted: float = 0.0

    def is_requested(self, piece: Piece) -> bool:
        """Whether the piece is the next one of an answer, and was requested."""
        request = self.requests.get(piece.id)
        return request is not None and request.incoming is not None and request.incoming.fits(piece)

    def is_receiving(self) -> bool:
        """Whether an answer of this client is being received; only one at a time is."""
        return any(request.incoming is not None for request in self.requests.values())

    def within_rate(self, now: float) -> bool:
        """Whether one more frame is within the client's rate limit; counts it if so (a token bucket)."""
        self.allowance = min(BURST, self.allowance + (now - self.last_counted) * RATE)
        self.last_counted = now
        if self.allowance < 1:
            return False
        self.allowance -= 1
        return True


class NatsEngine:
    """The server's side of the NATS engine. A run has one at a time.

    urls: of brokers, such as "tls://host:4222". run: the run's name, of letters, digits, _ and -. clients: their
    number; they are numbered from 0. tls: with the authority of the broker's certificate, the server's own certificate
    and its key, as `Member.context` makes it; None for a broker without certificates, which anybody can use: for tests.
    largest: size of the largest reply, bytes, until `limit` sets the run's. patience: seconds of silence after which a
    client is gone although its connection stands.

    Connects in the background, and waits for a broker that is away. Raises EngineError for invalid arguments.
    dropped: the number of frames that were ignored, by client: malformed, late, repeated, or above the rate limit.
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
        check_names(run, clients)
        self.run, self.largest, self.patience = run, largest, patience
        self.dropped: Counter[int] = Counter()
        self._id, self._connections, self._since, self._pinged = secrets.randbits(64), 0, 0.0, 0.0
        self._peers = [_Peer() for _ in range(clients)]
        self._strangers = _Peer()  # the rate limit of all clients that the broker knows and the run does not
        self._files: dict[str, Outgoing] | None = None
        self._receiving: set[int] = set()  # ids of requests whose answer is being received
        self._log = ThrottledLog()
        self._subject = re.compile(rf"hosfl\.{run}\.up\.(0|[1-9][0-9]{{0,8}})\.(m|gone)".encode())
        subjects = [f"hosfl.{run}.up.*.m", f"hosfl.{run}.up.*.gone"]
        self._link = Link(urls, tls, f"the server of run {run}", subjects, self._receive, self._connected, self._tick)
        self._link.start()

    def present(self) -> frozenset[int]:
        """See `Engine.present`. No client is present while the server has no broker."""
        return self._link.call(self._find_present)

    def ask(self, messages: Mapping[int, bytes], deadline: float | None = None) -> Iterator[Reply]:
        """See `Engine.ask`.

        Without a broker, and for some seconds after it is back, this waits for clients that are not connected. A
        message that is too large fails the request of its client only.
        """
        check_ask(messages, len(self._peers))
        return self._replies(messages, deadline)

    def _replies(self, messages: Mapping[int, bytes], deadline: float | None) -> Iterator[Reply]:
        ends = None if deadline is None else time.monotonic() + deadline
        replies: SimpleQueue[Reply | None] = SimpleQueue()
        outgoing = {client: Outgoing(bytes(data)) for client, data in messages.items() if len(data) <= MAX_MESSAGE}
        for client in messages.keys() - outgoing.keys():
            text = f"a request of {len(messages[client])} bytes; the largest is one of {MAX_MESSAGE}"
            log.warning("client %d: %s", client, text)
            replies.put(Reply(client, None, f"failed: {text}"))
        requests = self._link.call(self._begin_requests, outgoing, replies)
        unanswered = dict.fromkeys(messages)
        try:
            while unanswered:
                try:
                    reply = replies.get(timeout=None if ends is None else max(0.0, ends - time.monotonic()))
                except Empty:
                    break
                if reply is None:
                    raise EngineError(f"{self._link.name} was closed during a request")
                del unanswered[reply.client]
                yield reply
        finally:
            with contextlib.suppress(EngineError):  # closed
                self._link.call(self._end_requests, requests)
        while not replies.empty():  # replies that arrived before the requests were ended
            if reply := replies.get():
                del unanswered[reply.client]
                yield reply
        for client in unanswered:
            yield Reply(client, None, "late")

    def offer(self, files: Mapping[str, bytes]) -> None:
        """See `Engine.offer`."""
        self._link.call(self._set_files, {name: Outgoing(bytes(data)) for name, data in files.items()})

    def limit(self, largest: int) -> None:
        """See `Engine.limit`."""
        self.largest = largest

    def close(self) -> None:
        """See `Engine.close`."""
        with contextlib.suppress(EngineError):
            self._link.call(self._close)
        self._link.close()

    # From here on, everything runs in the link's thread.

    def _find_present(self) -> frozenset[int]:
        return frozenset(n for n, peer in enumerate(self._peers) if peer.line is not None and self._link.up)

    def _set_files(self, files: dict[str, Outgoing]) -> None:
        self._files = files

    def _close(self) -> None:
        for peer in self._peers:
            for request in peer.requests.values():
                request.replies.put(None)

    def _begin_requests(self, outgoing: Mapping[int, Outgoing], replies: SimpleQueue[Reply | None]) -> list[_Request]:
        requests = [_Request(client, secrets.randbits(64), data, replies) for client, data in outgoing.items()]
        for request in requests:
            peer = self._peers[request.client]
            peer.requests[request.id] = request
            if peer.line is not None:
                request.line = peer.line
                self._post(request.client, request.outgoing.announcement(request.id))
            elif self._has_settled(time.monotonic()):
                self._finish(request, Reply(request.client, None, "gone"))
        return requests

    def _end_requests(self, requests: list[_Request]) -> None:
        for request in requests:
            if self._forget_request(request):
                log.info("client %d had not answered request %016x when it ended", request.client, request.id)
                self._post(request.client, encode(Ended(request.id, EndReason.LATE)))

    def _forget_request(self, request: _Request) -> bool:
        """Stop sending and receiving for a request. Returns whether it was still open."""
        self._link.stop(self._down_subject(request.client), request.id)
        self._receiving.discard(request.id)
        return self._peers[request.client].requests.pop(request.id, None) is not None

    def _finish(self, request: _Request, reply: Reply, reason: EndReason = EndReason.DONE, text: str = "") -> None:
        """End a request with a reply, and tell the client that it is over."""
        self._forget_request(request)
        self._post(request.client, encode(Ended(request.id, reason, text)))
        request.replies.put(reply)

    def _down_subject(self, client: int) -> str:
        return f"hosfl.{self.run}.down.{client}.m"

    def _post(self, client: int, frame: bytes, reply: str = "") -> None:
        self._link.post(self._down_subject(client), frame, reply)

    def _ping(self, client: int) -> None:
        """Ping a client. If nobody listens, the broker replies at the `gone` subject at once."""
        self._post(client, encode(Ping(self._id, self._connections)), f"hosfl.{self.run}.up.{client}.gone")

    def _has_settled(self, now: float) -> bool:
        """Whether the server has been connected long enough for clients to have reconnected too."""
        return self._link.up and now - self._since > CONNECT_GRACE

    def _connected(self) -> None:
        self._connections += 1
        self._since = self._pinged = time.monotonic()
        for client, peer in enumerate(self._peers):
            peer.last_heard, peer.lost_since = self._since, None
            self._ping(client)
            for request in peer.requests.values():
                self._request_more(request, again=True)

    def _tick(self, since: float) -> None:
        """Find out which clients are gone, resume stalled transfers, and ping. since: see `Link`."""
        now = time.monotonic()
        settled = self._has_settled(since)
        for client, peer in enumerate(self._peers):
            if settled and peer.line is None:
                for request in list(peer.requests.values()):
                    self._finish(request, Reply(client, None, "gone"))
            elif settled and peer.lost_since is not None and since - peer.lost_since > LOST_GRACE:
                self._set_gone(client, "its connection is gone")
            elif settled and since - peer.last_heard > self.patience:
                self._set_gone(client, f"nothing was heard of it for {self.patience:g} seconds")
            for request in peer.requests.values():
                if request.incoming is not None and now - request.incoming.last_progress > STALLED:
                    self._request_more(request, again=True)
        if now - self._pinged > PING_EVERY:
            self._pinged = now
            for client in range(len(self._peers)):
                self._ping(client)

    def _set_gone(self, client: int, reason: str) -> None:
        peer = self._peers[client]
        log.info("client %d is gone: %s", client, reason)
        lost_line, peer.line, peer.lost_since = peer.line, None, None
        for request in list(peer.requests.values()):
            if request.line == lost_line:
                self._finish(request, Reply(client, None, "gone"))
        if peer.file is not None:
            self._link.stop(self._down_subject(client), peer.file[0])
            peer.file = None

    def _count_dropped(self, client: int, reason: str, *values: object) -> None:
        """Count a frame that is ignored, and log the reason. values: of the reason's format string."""
        self.dropped[client] += 1
        self._log.warn((client, reason), f"client %d: {reason}", client, *values)

    def _receive(self, subject: bytes, data: bytes) -> None:
        """Handle a message. Only the subject says which client sent it."""
        match = self._subject.fullmatch(subject)
        client = int(match[1]) if match else -1
        now = time.monotonic()
        if match is None or client >= len(self._peers):
            self._log.warn("stranger", "a message at %s, of no client of the run", printable(repr(subject)))
            if match is not None and match[2] == b"m" and self._strangers.within_rate(now):
                self._refuse_stranger(client, data)
            return
        peer = self._peers[client]
        if match[2] == b"gone":
            if peer.lost_since is None:  # the broker says so, or the client of itself
                peer.lost_since = now
            return
        peer.last_heard, peer.lost_since = now, None
        try:
            frame = decode(data)
        except FrameError as error:
            if peer.within_rate(now):
                self._count_dropped(client, "bytes that are no message are dropped: %s", error)
            else:
                self._count_dropped(client, "it sends too much, and is not listened to")
            return
        if isinstance(frame, Piece) and peer.is_requested(frame):
            self._on_piece(client, frame)
        elif not peer.within_rate(now):
            self._count_dropped(client, "it sends too much, and is not listened to")
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
                self._set_gone(client, "it said goodbye")
        elif isinstance(frame, Ended):
            if frame.id == self._id:  # the client gets pings of another server too; this is only logged
                self._log.warn("servers", f"{TWO_SERVERS}; client %d says so", self.run, client, level=logging.ERROR)
            elif peer.file is not None and peer.file[0] == frame.id:
                peer.file = None
        else:
            self._count_dropped(client, "a frame that only servers send is dropped")

    def _refuse_stranger(self, client: int, data: bytes) -> None:
        """Tell a client whose number is not in the run that it is refused; otherwise it would wait for ever."""
        with contextlib.suppress(FrameError):
            frame = decode(data)
            if isinstance(frame, (Beat, Fetch)):
                last = len(self._peers) - 1
                text = f"this run has clients 0 to {last}, and no client {client}: a new run takes it in"
                id = frame.line if isinstance(frame, Beat) else frame.id
                self._post(client, encode(Ended(id, EndReason.REFUSED, text)))

    def _on_beat(self, client: int, beat: Beat) -> None:
        """Note that a client is present, and align the requests that it lists with those that are open."""
        peer = self._peers[client]
        if beat.line in peer.replaced:
            self._post(client, encode(Ended(beat.line, EndReason.REPLACED)))
            return
        if beat.line != peer.line:
            if peer.line is not None:
                peer.replaced = (*peer.replaced[-7:], peer.line)
                self._set_gone(client, "another process of the same client is here")
            peer.line, peer.connection = beat.line, beat.connection
            log.info("client %d is here", client)
            self._ping(client)  # so that it knows the server before its first request
        reconnected = beat.connection != peer.connection
        peer.connection = beat.connection
        listed = dict(beat.requests)
        for request in peer.requests.values():
            request.line = peer.line
            if request.id not in listed:
                if request.incoming is None:
                    self._post(client, request.outgoing.announcement(request.id))
            elif request.incoming is not None:
                if reconnected:
                    self._request_more(request, again=True)
            elif listed[request.id] and not peer.is_receiving():
                self._post(client, encode(Want(request.id, 0, 0)))
        for id in listed:
            if id not in peer.requests:
                self._post(client, encode(Ended(id, EndReason.UNKNOWN)))

    def _request_more(self, request: _Request, again: bool = False) -> None:
        """Request the next window of an answer, if it is time to. again: also what was requested and has not come."""
        if request.incoming is not None:
            window = max(SMALL, min(WINDOW, ALL_WINDOWS // len(self._receiving)))
            want = request.incoming.next_want(request.id, window, again)
            if want is not None:
                self._post(request.client, want)

    def _on_piece(self, client: int, piece: Piece) -> None:
        """Handle a piece of an answer: the announcement, or the next bytes."""
        peer = self._peers[client]
        request = peer.requests.get(piece.id)
        if request is None:
            self._count_dropped(client, "late, to request %016x, which is over", piece.id)
            self._post(client, encode(Ended(piece.id, EndReason.LATE)))
            return
        if piece.total > self.largest:
            text = f"a reply of {piece.total} bytes; the largest is one of {self.largest}"
            self._count_dropped(client, "%s", text)
            self._finish(request, Reply(client, None, f"failed: {text}"), EndReason.REFUSED, text)
            return
        if request.incoming is None:
            incoming = start_incoming(piece, time.monotonic)
            if not incoming.complete and peer.is_receiving():
                if piece.data:
                    self._count_dropped(client, "a piece of request %016x that was not asked for", piece.id)
                return  # its next beats list this answer again
            request.incoming = incoming
            self._receiving.add(request.id)
        elif request.incoming.fits(piece):
            request.incoming.add(piece)
        elif piece.data:  # without data it is only a repeated announcement
            self._count_dropped(client, "a piece of request %016x that was not asked for", piece.id)
            return
        if request.incoming.complete:
            self._finish_answer(request, request.incoming)
        else:
            self._request_more(request)

    def _finish_answer(self, request: _Request, incoming: Incoming) -> None:
        """End a request whose answer has been received."""
        client, data = request.client, incoming.take_message()
        if data is None:
            self._count_dropped(client, "its reply to request %016x is damaged", request.id)
            reply = Reply(client, None, "failed: damaged on its way")
            self._finish(request, reply, EndReason.REFUSED, "damaged on its way")
        elif incoming.failed:
            reason = printable(data.decode(errors="replace"))
            self._finish(request, Reply(client, None, f"failed: {reason}"))
        else:
            self._finish(request, Reply(client, data))

    def _on_want(self, client: int, want: Want) -> None:
        """Send bytes of a request or of a file."""
        peer = self._peers[client]
        request = peer.requests.get(want.id)
        outgoing = request.outgoing if request else None
        if peer.file is not None and peer.file[0] == want.id:
            outgoing = peer.file[1]
        if outgoing is None:
            self._post(client, encode(Ended(want.id, EndReason.UNKNOWN)))
        elif want.offset >= len(outgoing.data) or want.length == 0:
            self._count_dropped(client, "it requests no bytes of a message, or bytes beyond its end")
        else:
            end = min(len(outgoing.data), want.offset + min(want.length, WINDOW))
            self._link.stream(self._down_subject(client), want.id, outgoing, want.offset, end)

    def _on_fetch(self, client: int, fetch: Fetch) -> None:
        """Announce a file, once files have been offered; the client repeats its request until then."""
        if self._files is None:
            return
        peer = self._peers[client]
        if peer.file is not None and peer.file[0] != fetch.id:
            self._link.stop(self._down_subject(client), peer.file[0])
        outgoing = self._files.get(fetch.name)
        if outgoing is None:
            self._post(client, encode(Ended(fetch.id, EndReason.REFUSED)))
        else:
            peer.file = fetch.id, outgoing
            self._post(client, outgoing.announcement(fetch.id))

"""Clients on other machines: a NATS broker carries the messages. `NatsEngine` at the server, `NatsLine` at a client.

Two subjects for each client of a run: it publishes `hosfl.RUN.up.CLIENT.m` and hears `hosfl.RUN.down.CLIENT.m`. Who a
message is of is its subject, which the broker holds against the sender's certificate; what a message says of itself is
believed by nobody. See `frames.py` for what is sent, `broker.py` for the connection.

A client is here from its first beat on. It is gone when the broker has nobody at its subject any more, which a ping
tells within two seconds, also of a process that was killed; when it says goodbye; when another process of the same
client takes its place; and after `patience` seconds of silence, for machines that lost their power.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from hosfl.engines.broker import Link
from hosfl.engines.engine import EngineError, Reply, check_ask
from hosfl.engines.frames import (
    LISTED,
    SMALL,
    WINDOW,
    Beat,
    Bye,
    Ended,
    Fetch,
    FrameError,
    Incoming,
    Outgoing,
    Piece,
    Ping,
    Want,
    Why,
    begin,
    decode,
    encode,
    printable,
)

log = logging.getLogger("hosfl.engines.nats")

LARGEST = 64 * 1024 * 1024 + 64 * 1024  # bytes of a reply, where nobody says what the run's are: 64 MB, and a frame
# Bytes of an ask or a file: all messages that the protocol has. A replay grows with its rounds, and a base half is as
# large as it is; a client cannot know either.
MOST = 1 << 32
ALL_WINDOWS = 4 * WINDOW  # bytes on their way to the server; a broker cuts who lets 64 MB lie
GRACE = 4.0  # seconds from a new connection on, in which clients find their way back too
ABSENT = 1.0  # seconds in which a client's connection may come back before its asks are over
PING = 1.0  # seconds between two pings
SILENT = 3.0  # seconds without a ping, after which a client says that it is here: a server pings those of its run alone
STALLED = 20.0  # seconds without a byte, after which a transfer begins again where it stopped
ANEW = 1.0  # seconds without an answer, after which a file is asked for again
RATE, BURST = 200.0, 1000.0  # frames of a client that nobody asked for: a second, and at once
QUIET = 10.0  # seconds between two lines of the log about the same thing
TWO = "two servers are at work on run %s, and each ends what the other asks: end one of them"


def _checked(run: str, client: int) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", run):
        raise EngineError(f"a run is named by letters, digits, _ and -, not {run!r}")
    if client < 0:
        raise EngineError(f"clients are numbered from 0, not {client}")


class _Notes:
    """Lines of the log, of each kind one in ten seconds: a stranger must not fill it."""

    def __init__(self) -> None:
        self._kept: dict[object, tuple[float, int]] = {}

    def warn(self, kind: object, text: str, *values: object, level: int = logging.WARNING) -> None:
        said, more = self._kept.get(kind, (-QUIET, 0))
        if time.monotonic() - said < QUIET:
            self._kept[kind] = said, more + 1
            return
        self._kept[kind] = time.monotonic(), 0
        log.log(level, text + (f" (and {more} more of the kind)" if more else ""), *values)


@dataclass
class _Asked:
    """What one client is asked. id: the transfer of the question and of its answer. line: which has it."""

    client: int
    id: int
    outgoing: Outgoing
    replies: SimpleQueue[Reply | None]
    line: int | None = None
    incoming: Incoming | None = None


@dataclass
class _Peer:
    """A client, as the server knows it. line: None while it is not here. absent: since when nobody hears it."""

    line: int | None = None
    connection: int = 0
    heard: float = 0.0
    absent: float | None = None
    replaced: tuple[int, ...] = ()
    asked: dict[int, _Asked] = field(default_factory=dict)
    file: tuple[int, Outgoing] | None = None
    allowance: float = BURST
    counted: float = 0.0

    def expects(self, piece: Piece) -> bool:
        """Whether it was asked for."""
        asked = self.asked.get(piece.id)
        return asked is not None and asked.incoming is not None and asked.incoming.fits(piece)

    def receiving(self) -> bool:
        """Whether an answer is on its way here: of each client one at a time."""
        return any(asked.incoming is not None for asked in self.asked.values())

    def within_rate(self, now: float) -> bool:
        """Whether one more frame is within what a client may send."""
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
        _checked(run, clients)
        self.run, self.largest, self.patience = run, largest, patience
        self.dropped: Counter[int] = Counter()
        self._id, self._connections, self._since, self._pinged = secrets.randbits(64), 0, 0.0, 0.0
        self._peers = [_Peer() for _ in range(clients)]
        self._strangers = _Peer()  # all that the broker knows and the run does not
        self._offered: dict[str, Outgoing] | None = None
        self._moving: set[int] = set()  # asks whose answer is on its way
        self._notes = _Notes()
        self._subject = re.compile(rf"hosfl\.{run}\.up\.(0|[1-9][0-9]{{0,8}})\.(m|gone)".encode())
        heard = [f"hosfl.{run}.up.*.m", f"hosfl.{run}.up.*.gone"]
        self._link = Link(urls, tls, f"the server of run {run}", heard, self._receive, self._connected, self._tick)
        self._link.start()

    def present(self) -> frozenset[int]:
        """The clients that could be asked now, by number: none while there is no broker."""
        return self._link.call(self._present)

    def ask(
        self, messages: Mapping[int, bytes], deadline: float | None = None, enough: int | None = None
    ) -> Iterator[Reply]:
        """See `Engine.ask`. The asks leave when the first reply is asked for.

        Without a broker, and for some seconds after it is back, clients that are not here are waited for. A message
        that is too large fails the ask of its client alone.
        """
        check_ask(messages, len(self._peers), enough)
        return self._replies(messages, deadline, enough)

    def _replies(self, messages: Mapping[int, bytes], deadline: float | None, enough: int | None) -> Iterator[Reply]:
        over = None if deadline is None else time.monotonic() + deadline
        replies: SimpleQueue[Reply | None] = SimpleQueue()
        outgoing = {client: Outgoing(bytes(data)) for client, data in messages.items() if len(data) <= MOST}
        for client in messages.keys() - outgoing.keys():
            text = f"an ask of {len(messages[client])} bytes; the largest is one of {MOST}"
            log.warning("client %d: %s", client, text)
            replies.put(Reply(client, None, f"failed: {text}"))
        asked = self._link.call(self._begin, outgoing, replies)
        open = dict.fromkeys(messages)
        brought = 0
        try:
            while open and (enough is None or brought < enough):
                try:
                    reply = replies.get(timeout=None if over is None else max(0.0, over - time.monotonic()))
                except Empty:
                    break
                if reply is None:
                    raise EngineError(f"{self._link.name} was closed during an ask")
                del open[reply.client]
                brought += reply.data is not None
                yield reply
        finally:
            with contextlib.suppress(EngineError):  # closed: nobody is asked any more
                self._link.call(self._end, asked)
        while not replies.empty():  # what came while the ask was ended
            if reply := replies.get():
                del open[reply.client]
                yield reply
        for client in open:
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

    def _begin(self, outgoing: Mapping[int, Outgoing], replies: SimpleQueue[Reply | None]) -> list[_Asked]:
        made = [_Asked(client, secrets.randbits(64), data, replies) for client, data in outgoing.items()]
        for asked in made:
            peer = self._peers[asked.client]
            peer.asked[asked.id] = asked
            if peer.line is not None:
                asked.line = peer.line
                self._post(asked.client, asked.outgoing.announcement(asked.id))
            elif self._settled(time.monotonic()):
                self._finish(asked, Reply(asked.client, None, "gone"))
        return made

    def _end(self, made: list[_Asked]) -> None:
        for asked in made:
            if self._forget(asked):
                log.info("client %d had not answered ask %016x when it ended", asked.client, asked.id)
                self._post(asked.client, encode(Ended(asked.id, Why.LATE)))

    def _forget(self, asked: _Asked) -> bool:
        self._link.stop(self._down(asked.client), asked.id)
        self._moving.discard(asked.id)
        return self._peers[asked.client].asked.pop(asked.id, None) is not None

    def _finish(self, asked: _Asked, reply: Reply, why: Why = Why.DONE, text: str = "") -> None:
        self._forget(asked)
        self._post(asked.client, encode(Ended(asked.id, why, text)))
        asked.replies.put(reply)

    def _down(self, client: int) -> str:
        return f"hosfl.{self.run}.down.{client}.m"

    def _post(self, client: int, frame: bytes, reply: str = "") -> None:
        self._link.post(self._down(client), frame, reply)

    def _ping(self, client: int) -> None:
        """Where nobody hears it, the broker says so at once at the subject to reply to."""
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
                self._want(asked, again=True)

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
                    self._want(asked, again=True)
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
        self._notes.warn((client, why), f"client %d: {why}", client, *values)

    def _receive(self, subject: bytes, data: bytes) -> None:
        of = self._subject.fullmatch(subject)
        client = int(of[1]) if of else -1
        now = time.monotonic()
        if of is None or client >= len(self._peers):
            self._notes.warn("stranger", "a message at %s, of no client of the run", printable(repr(subject)))
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
                self._drop(client, "a message that is none is dropped: %s", error)
            else:
                self._drop(client, "it sends too much, and is not listened to")
            return
        if isinstance(frame, Piece) and peer.expects(frame):
            self._piece(client, frame)
        elif not peer.within_rate(now):
            self._drop(client, "it sends too much, and is not listened to")
        elif isinstance(frame, Piece):
            self._piece(client, frame)
        elif isinstance(frame, Beat):
            self._here(client, frame)
        elif isinstance(frame, Want):
            self._wants(client, frame)
        elif isinstance(frame, Fetch):
            self._fetches(client, frame)
        elif isinstance(frame, Bye):
            if frame.line == peer.line:
                self._gone(client, "it said goodbye")
        elif isinstance(frame, Ended):
            if frame.id == self._id:  # it hears another server, which we cannot; believed for a line of the log
                self._notes.warn("servers", f"{TWO}; client %d says so", self.run, client, level=logging.ERROR)
            elif peer.file is not None and peer.file[0] == frame.id:
                peer.file = None
        else:
            self._drop(client, "a frame that only servers send is dropped")

    def _turn_away(self, client: int, data: bytes) -> None:
        """Tell a client that came after the run had begun, which would wait for ever, that it has no part in it."""
        with contextlib.suppress(FrameError):
            frame = decode(data)
            if isinstance(frame, (Beat, Fetch)):
                last = len(self._peers) - 1
                text = f"this run has clients 0 to {last}, and no client {client}: a new run takes it in"
                id = frame.line if isinstance(frame, Beat) else frame.id
                self._post(client, encode(Ended(id, Why.REFUSED, text)))

    def _here(self, client: int, beat: Beat) -> None:
        peer = self._peers[client]
        if beat.line in peer.replaced:
            self._post(client, encode(Ended(beat.line, Why.REPLACED)))
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
                    self._want(asked, again=True)
            elif listed[asked.id] and not peer.receiving():
                self._post(client, encode(Want(asked.id, 0, 0)))
        for id in listed:
            if id not in peer.asked:
                self._post(client, encode(Ended(id, Why.UNKNOWN)))

    def _want(self, asked: _Asked, again: bool = False) -> None:
        if asked.incoming is not None:
            window = max(SMALL, min(WINDOW, ALL_WINDOWS // len(self._moving)))
            want = asked.incoming.wanted(asked.id, window, again)
            if want is not None:
                self._post(asked.client, want)

    def _piece(self, client: int, piece: Piece) -> None:
        peer = self._peers[client]
        asked = peer.asked.get(piece.id)
        if asked is None:
            self._drop(client, "late, to ask %016x, which is over", piece.id)
            self._post(client, encode(Ended(piece.id, Why.LATE)))
            return
        if piece.total > self.largest:
            text = f"a reply of {piece.total} bytes; the largest is one of {self.largest}"
            self._drop(client, "%s", text)
            self._finish(asked, Reply(client, None, f"failed: {text}"), Why.REFUSED, text)
            return
        if asked.incoming is None:
            incoming = begin(piece, time.monotonic)
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
            self._want(asked)
            return
        data = incoming.message()
        if data is None:
            self._drop(client, "its reply to ask %016x is damaged", piece.id)
            self._finish(asked, Reply(client, None, "failed: damaged on its way"), Why.REFUSED, "damaged on its way")
        elif incoming.failed:
            reason = printable(data.decode(errors="replace"))
            self._finish(asked, Reply(client, None, f"failed: {reason}"))
        else:
            self._finish(asked, Reply(client, data))

    def _wants(self, client: int, want: Want) -> None:
        peer = self._peers[client]
        asked = peer.asked.get(want.id)
        outgoing = asked.outgoing if asked else None
        if peer.file is not None and peer.file[0] == want.id:
            outgoing = peer.file[1]
        if outgoing is None:
            self._post(client, encode(Ended(want.id, Why.UNKNOWN)))
        elif want.offset >= len(outgoing.data) or want.length == 0:
            self._drop(client, "it wants nothing of a message, or what lies behind its end")
        else:
            end = min(len(outgoing.data), want.offset + min(want.length, WINDOW))
            self._link.stream(self._down(client), want.id, outgoing, want.offset, end)

    def _fetches(self, client: int, fetch: Fetch) -> None:
        if self._offered is None:
            return
        peer = self._peers[client]
        if peer.file is not None and peer.file[0] != fetch.id:
            self._link.stop(self._down(client), peer.file[0])
        outgoing = self._offered.get(fetch.name)
        if outgoing is None:
            self._post(client, encode(Ended(fetch.id, Why.REFUSED)))
        else:
            peer.file = fetch.id, outgoing
            self._post(client, outgoing.announcement(fetch.id))


@dataclass
class _Task:
    """An ask, at the client: on its way, waiting or being answered, answered."""

    incoming: Incoming
    queued: bool = False
    reply: Outgoing | None = None


@dataclass
class _Fetching:
    """A file on its way. done: its bytes, or why there are none."""

    id: int
    name: str
    done: SimpleQueue[bytes | str]
    asked: float = 0.0  # when, the last time
    announced: bool = False  # since then
    incoming: Incoming | None = None


class NatsLine:
    """A client's side.

    urls, run, tls: as of `NatsEngine`; the certificate is this client's. client: its number. largest: bytes of an
    ask, or of a file.

    Connects in the background. The server sees a client that serves; fetching it can do before.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        run: str,
        client: int,
        tls: ssl.SSLContext | None = None,
        *,
        largest: int = MOST,
    ) -> None:
        _checked(run, client)
        self.run, self.client, self.largest = run, client, largest
        self._up = f"hosfl.{run}.up.{client}.m"
        self._id, self._connections = secrets.randbits(64), 0
        self._server: Ping | None = None
        self._before: tuple[int, ...] = ()  # servers that another took the place of
        self._heard = 0.0  # when the server's last ping was
        self._serving = self._closed = False
        self._out = ""  # why the server has no place for it
        self._tasks: dict[int, _Task] = {}
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._one = threading.Lock()
        self._fetching: _Fetching | None = None
        self._notes = _Notes()
        heard = [f"hosfl.{run}.down.{client}.m"]
        name = f"client {client} of run {run}"
        self._link = Link(urls, tls, name, heard, self._receive, self._connected, self._tick)
        self._link.start()

    def fetch(self, name: str, deadline: float | None = None) -> bytes:
        """See `Line.fetch`. One after another, from any thread."""
        if not name or len(name.encode()) > 500:
            raise EngineError("a file's name has 1 to 500 bytes")
        with self._one:
            fetching = _Fetching(secrets.randbits(64), name, SimpleQueue())
            self._link.call(self._fetch, fetching)
            try:
                found = fetching.done.get(timeout=deadline)
            except Empty:
                raise EngineError(f"{name!r} has not come in {deadline:g} seconds") from None
            finally:
                with contextlib.suppress(EngineError):  # closed: nothing is fetched any more
                    self._link.call(self._fetch, None)
        if isinstance(found, str):
            raise EngineError(found)
        return found

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """See `Line.serve`."""
        self._present(True)
        try:
            while (id := self._queue.get()) is not None:
                message = self._link.call(self._take, id)
                if message is not None:
                    self._link.call(self._reply, id, self._answered(answer, message))
        except EngineError:
            if not self._closed:
                raise
        finally:
            self._present(False)
        if self._out:
            raise EngineError(self._out)

    def _answered(self, answer: Callable[[bytes], bytes], message: bytes) -> Outgoing:
        """The kind of an error is told, its text is not: that may be of the client's data."""
        try:
            return Outgoing(bytes(memoryview(answer(message))))
        except Exception as error:
            log.exception("client %d could not answer", self.client)
            return Outgoing(type(error).__name__[:100].encode(), failed=True)

    def _present(self, serving: bool) -> None:
        try:
            self._link.call(self._serve, serving)
        except EngineError:
            if serving:
                raise

    def close(self) -> None:
        """See `Line.close`."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(EngineError):
            self._link.call(self._close)
        self._queue.put(None)
        self._link.close()

    # From here on, everything runs in the link's thread.

    def _serve(self, serving: bool) -> None:
        if self._serving and not serving:
            self._post(encode(Bye(self._id)))
        self._serving = serving
        if serving:
            self._beat()

    def _close(self) -> None:
        self._serve(False)
        if self._fetching is not None:
            self._fetching.done.put(f"{self._link.name} was closed")

    def _fetch(self, fetching: _Fetching | None) -> None:
        if fetching is None and self._fetching is not None:
            self._post(encode(Ended(self._fetching.id, Why.DONE)))
        self._fetching = fetching
        if fetching is not None:
            self._ask_file(fetching)

    def _ask_file(self, fetching: _Fetching) -> None:
        fetching.asked, fetching.announced = time.monotonic(), False
        self._post(encode(Fetch(fetching.id, fetching.name)))

    def _take(self, id: int) -> bytes | None:
        task = self._tasks.get(id)
        if task is None:
            return None
        message = task.incoming.message()
        if message is None:
            self._reply(id, Outgoing(b"the message is damaged", failed=True))
        return message

    def _reply(self, id: int, reply: Outgoing) -> None:
        task = self._tasks.get(id)
        if task is None:
            log.warning("client %d: its reply to ask %016x is not sent: the ask is over", self.client, id)
            return
        task.reply = reply
        self._post(reply.announcement(id))

    def _post(self, frame: bytes) -> None:
        self._link.post(self._up, frame)

    def _beat(self) -> None:
        if self._serving:
            asks = tuple((id, task.reply is not None) for id, task in self._tasks.items())
            self._post(encode(Beat(self._id, self._connections, asks)))

    def _connected(self) -> None:
        self._connections += 1
        self._beat()
        self._want_again()

    def _want_again(self, stalled: float = 0.0) -> None:
        """What was on its way, after a new connection at either end; or what has not moved for so many seconds."""
        now = time.monotonic()
        for id, task in self._tasks.items():
            if not task.incoming.whole and not task.queued and now - task.incoming.moved >= stalled:
                self._want(id, task.incoming, again=True)
        if self._fetching is not None:
            incoming = self._fetching.incoming
            if now - max(self._fetching.asked, incoming.moved if incoming else 0.0) >= stalled:
                self._ask_file(self._fetching)

    def _want(self, id: int, incoming: Incoming, again: bool = False) -> None:
        want = incoming.wanted(id, WINDOW, again)
        if want is not None:
            self._post(want)

    def _tick(self, since: float) -> None:
        if time.monotonic() - self._heard > SILENT:
            self._beat()
        self._want_again(STALLED)
        fetching = self._fetching
        if fetching is not None and not fetching.announced and time.monotonic() - fetching.asked > ANEW:
            self._ask_file(fetching)

    def _receive(self, subject: bytes, data: bytes) -> None:
        try:
            frame = decode(data)
        except FrameError as error:
            self._notes.warn("malformed", "client %d: a message that is none is dropped: %s", self.client, error)
            return
        if isinstance(frame, Ping):
            self._pinged(frame)
        elif isinstance(frame, Piece):
            if self._fetching is not None and frame.id == self._fetching.id:
                self._file(self._fetching, frame)
            else:
                self._piece(frame)
        elif isinstance(frame, Want):
            task = self._tasks.get(frame.id)
            if task is not None and task.reply is not None:
                if frame.length == 0:
                    self._post(task.reply.announcement(frame.id))
                elif frame.offset < len(task.reply.data):
                    end = min(len(task.reply.data), frame.offset + min(frame.length, WINDOW))
                    self._link.stream(self._up, frame.id, task.reply, frame.offset, end)
        elif isinstance(frame, Ended):
            self._ended(frame)

    def _pinged(self, ping: Ping) -> None:
        before, self._server, self._heard = self._server, ping, time.monotonic()
        if before != ping:  # a new connection of the server's, or another server, which will say what it does not know
            self._want_again()
        if before is not None and before.engine != ping.engine:
            if ping.engine in self._before:  # it has not ended, as one does that is started anew
                self._notes.warn("servers", f"client %d: {TWO}", self.client, self.run, level=logging.ERROR)
                for engine in (before.engine, ping.engine):
                    self._post(encode(Ended(engine, Why.REPLACED)))
            self._before = (*self._before[-7:], before.engine)
        self._beat()

    def _forget(self, id: int) -> None:
        del self._tasks[id]
        self._link.stop(self._up, id)

    def _piece(self, piece: Piece) -> None:
        task = self._tasks.get(piece.id)
        if task is None:
            if len(self._tasks) >= LISTED:
                return
            task = self._tasks[piece.id] = _Task(begin(piece, time.monotonic))
            if piece.total > self.largest:
                task.queued = True
                text = f"{piece.total} bytes, more than the largest message of {self.largest}"
                self._reply(piece.id, Outgoing(text.encode(), failed=True))
        elif not task.queued and task.incoming.fits(piece):
            task.incoming.take(piece)
        if task.queued:
            return
        if task.incoming.whole:
            task.queued = True
            self._queue.put(piece.id)
        else:
            self._want(piece.id, task.incoming)

    def _file(self, fetching: _Fetching, piece: Piece) -> None:
        fetching.announced = True
        if piece.total > self.largest:
            fetching.done.put(f"{fetching.name!r} has {piece.total} bytes; the largest file is one of {self.largest}")
            return
        incoming = fetching.incoming
        if incoming is None or (incoming.total, incoming.crc) != (piece.total, piece.crc):
            incoming = fetching.incoming = begin(piece, time.monotonic)
        elif incoming.fits(piece):
            incoming.take(piece)
        elif not piece.data:
            self._want(fetching.id, incoming, again=True)  # announced again
            return
        if incoming.whole:
            data = incoming.message()
            fetching.done.put(f"{fetching.name!r} is damaged" if data is None else data)
        else:
            self._want(fetching.id, incoming)

    def _ended(self, ended: Ended) -> None:
        if ended.id == self._id:  # the line itself
            self._out = f"another process is client {self.client} now"
            if ended.why is not Why.REPLACED:
                self._out = printable(ended.text)
            log.error("client %d ends: %s", self.client, self._out)
            self._serving = False
            self._queue.put(None)
        elif self._fetching is not None and ended.id == self._fetching.id:
            if ended.why is Why.REFUSED:
                self._fetching.done.put(printable(ended.text) or f"the server does not offer {self._fetching.name!r}")
            elif ended.why is Why.UNKNOWN:
                self._ask_file(self._fetching)
        elif ended.id in self._tasks:
            self._forget(ended.id)
            if ended.why is not Why.DONE:
                text = {Why.LATE: "it came late", Why.UNKNOWN: "the server does not know it any more"}
                reason = text.get(ended.why) or printable(ended.text)
                log.warning("client %d: ask %016x has ended without its reply: %s", self.client, ended.id, reason)

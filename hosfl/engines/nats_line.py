"""A client's side of a NATS broker: it answers, fetches files, and says that it is here. See `nats.py`."""

from __future__ import annotations

import contextlib
import logging
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from hosfl.engines.engine import EngineError
from hosfl.engines.frames import (
    MAX_ASKS,
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

SILENT = 3.0  # seconds without a ping, after which a client says that it is here: a server pings those of its run alone
FETCH_RETRY = 1.0  # seconds without an answer, after which a file is asked for again


@dataclass
class _Task:
    """An ask at the client: being received, then queued, then answered."""

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
        largest: int = MAX_MESSAGE,
    ) -> None:
        check_line(run, client)
        self.run, self.client, self.largest = run, client, largest
        self._up = f"hosfl.{run}.up.{client}.m"
        self._id, self._connections = secrets.randbits(64), 0
        self._server: Ping | None = None
        self._earlier_servers: tuple[int, ...] = ()  # servers that another took the place of
        self._heard = 0.0  # when the server's last ping was
        self._serving = self._closed = False
        self._refusal = ""  # why the server has no place for it
        self._tasks: dict[int, _Task] = {}
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._fetch_lock = threading.Lock()
        self._fetching: _Fetching | None = None
        self._log = ThrottledLog()
        subjects = [f"hosfl.{run}.down.{client}.m"]
        name = f"client {client} of run {run}"
        self._link = Link(urls, tls, name, subjects, self._receive, self._connected, self._tick)
        self._link.start()

    def fetch(self, name: str, deadline: float | None = None) -> bytes:
        """See `Line.fetch`. One after another, from any thread."""
        if not name or len(name.encode()) > 500:
            raise EngineError(f"a file's name has 1 to 500 bytes, not {len(name.encode())}")
        with self._fetch_lock:
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
        if self._refusal:
            raise EngineError(self._refusal)

    def _answered(self, answer: Callable[[bytes], bytes], message: bytes) -> Outgoing:
        """Run `answer`. Of an error only the type's name is sent, since its text may hold the client's data."""
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
            self._post(encode(Ended(self._fetching.id, EndReason.DONE)))
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
        self._request_again()

    def _request_again(self, stalled: float = 0.0) -> None:
        """Request again every transfer that has not moved for `stalled` seconds; 0: all, after a new connection."""
        now = time.monotonic()
        for id, task in self._tasks.items():
            if not task.incoming.whole and not task.queued and now - task.incoming.moved >= stalled:
                self._request_more(id, task.incoming, again=True)
        if self._fetching is not None:
            incoming = self._fetching.incoming
            if now - max(self._fetching.asked, incoming.moved if incoming else 0.0) >= stalled:
                self._ask_file(self._fetching)

    def _request_more(self, id: int, incoming: Incoming, again: bool = False) -> None:
        want = incoming.wanted(id, WINDOW, again)
        if want is not None:
            self._post(want)

    def _tick(self, since: float) -> None:
        if time.monotonic() - self._heard > SILENT:
            self._beat()
        self._request_again(STALLED)
        fetching = self._fetching
        if fetching is not None and not fetching.announced and time.monotonic() - fetching.asked > FETCH_RETRY:
            self._ask_file(fetching)

    def _receive(self, subject: bytes, data: bytes) -> None:
        try:
            frame = decode(data)
        except FrameError as error:
            self._log.warn("malformed", "client %d: bytes that are no message are dropped: %s", self.client, error)
            return
        if isinstance(frame, Ping):
            self._on_ping(frame)
        elif isinstance(frame, Piece):
            if self._fetching is not None and frame.id == self._fetching.id:
                self._on_file_piece(self._fetching, frame)
            else:
                self._on_piece(frame)
        elif isinstance(frame, Want):
            task = self._tasks.get(frame.id)
            if task is not None and task.reply is not None:
                if frame.length == 0:
                    self._post(task.reply.announcement(frame.id))
                elif frame.offset < len(task.reply.data):
                    end = min(len(task.reply.data), frame.offset + min(frame.length, WINDOW))
                    self._link.stream(self._up, frame.id, task.reply, frame.offset, end)
        elif isinstance(frame, Ended):
            self._on_ended(frame)

    def _on_ping(self, ping: Ping) -> None:
        before, self._server, self._heard = self._server, ping, time.monotonic()
        if before != ping:  # a new connection of the server's, or another server, which will say what it does not know
            self._request_again()
        if before is not None and before.engine != ping.engine:
            if ping.engine in self._earlier_servers:  # it has not ended, as one does that is started anew
                self._log.warn("servers", f"client %d: {TWO_SERVERS}", self.client, self.run, level=logging.ERROR)
                for engine in (before.engine, ping.engine):
                    self._post(encode(Ended(engine, EndReason.REPLACED)))
            self._earlier_servers = (*self._earlier_servers[-7:], before.engine)
        self._beat()

    def _forget(self, id: int) -> None:
        del self._tasks[id]
        self._link.stop(self._up, id)

    def _on_piece(self, piece: Piece) -> None:
        task = self._tasks.get(piece.id)
        if task is None:
            if len(self._tasks) >= MAX_ASKS:
                return
            task = self._tasks[piece.id] = _Task(start_incoming(piece, time.monotonic))
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
            self._request_more(piece.id, task.incoming)

    def _on_file_piece(self, fetching: _Fetching, piece: Piece) -> None:
        fetching.announced = True
        if piece.total > self.largest:
            fetching.done.put(f"{fetching.name!r} has {piece.total} bytes; the largest file is one of {self.largest}")
            return
        incoming = fetching.incoming
        if incoming is None or (incoming.total, incoming.crc) != (piece.total, piece.crc):
            incoming = fetching.incoming = start_incoming(piece, time.monotonic)
        elif incoming.fits(piece):
            incoming.take(piece)
        elif not piece.data:
            self._request_more(fetching.id, incoming, again=True)  # announced again
            return
        if incoming.whole:
            data = incoming.message()
            fetching.done.put(f"{fetching.name!r} is damaged" if data is None else data)
        else:
            self._request_more(fetching.id, incoming)

    def _on_ended(self, ended: Ended) -> None:
        if ended.id == self._id:  # the line itself
            self._refusal = f"another process is client {self.client} now"
            if ended.why is not EndReason.REPLACED:
                self._refusal = printable(ended.text)
            log.error("client %d ends: %s", self.client, self._refusal)
            self._serving = False
            self._queue.put(None)
        elif self._fetching is not None and ended.id == self._fetching.id:
            if ended.why is EndReason.REFUSED:
                self._fetching.done.put(printable(ended.text) or f"the server does not offer {self._fetching.name!r}")
            elif ended.why is EndReason.UNKNOWN:
                self._ask_file(self._fetching)
        elif ended.id in self._tasks:
            self._forget(ended.id)
            if ended.why is not EndReason.DONE:
                text = {EndReason.LATE: "it came late", EndReason.UNKNOWN: "the server does not know it any more"}
                reason = text.get(ended.why) or printable(ended.text)
                log.warning("client %d: ask %016x has ended without its reply: %s", self.client, ended.id, reason)

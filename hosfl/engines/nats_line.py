"""The client's side of the NATS engine: answers requests, fetches files, and sends signs of life. See `nats.py`."""

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
    MAX_REQUESTS,
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

# Seconds without a ping, after which a client sends a beat unasked: a server pings only the clients of its run.
PING_TIMEOUT = 3.0
FETCH_RETRY = 1.0  # seconds without an answer, after which a file is requested again


@dataclass
class _Request:
    """A request of the server: it is received, then queued, then answered."""

    incoming: Incoming
    queued: bool = False
    reply: Outgoing | None = None


@dataclass
class _Download:
    """A file that is being fetched. done: gets its bytes, or the reason of a failure as text."""

    id: int
    name: str
    done: SimpleQueue[bytes | str]
    requested_at: float = 0.0  # time of the last request
    announced: bool = False  # whether the server has announced it since
    incoming: Incoming | None = None


class NatsLine:
    """The client's side of the NATS engine.

    urls, run, tls: as for `NatsEngine`; the certificate is this client's. client: its number. largest: size of the
    largest request or file, bytes.

    Connects in the background. A client counts as present while it serves; it can fetch files before that.
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
        check_names(run, client)
        self.run, self.client, self.largest = run, client, largest
        self._up_subject = f"hosfl.{run}.up.{client}.m"
        self._id, self._connections = secrets.randbits(64), 0
        self._server: Ping | None = None
        self._earlier_servers: tuple[int, ...] = ()  # servers that another one has replaced
        self._last_ping = 0.0  # time of the server's last ping
        self._serving = self._closed = False
        self._refusal = ""  # why the server refuses this line
        self._requests: dict[int, _Request] = {}
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._fetch_lock = threading.Lock()
        self._download: _Download | None = None
        self._log = ThrottledLog()
        subjects = [f"hosfl.{run}.down.{client}.m"]
        name = f"client {client} of run {run}"
        self._link = Link(urls, tls, name, subjects, self._receive, self._connected, self._tick)
        self._link.start()

    def fetch(self, name: str, deadline: float | None = None) -> bytes:
        """See `Line.fetch`. May be called from any thread; one file is fetched at a time."""
        if not name or len(name.encode()) > 500:
            raise EngineError(f"a file's name has 1 to 500 bytes, not {len(name.encode())}")
        with self._fetch_lock:
            download = _Download(secrets.randbits(64), name, SimpleQueue())
            self._link.call(self._set_download, download)
            try:
                result = download.done.get(timeout=deadline)
            except Empty:
                raise EngineError(f"{name!r} has not come in {deadline:g} seconds") from None
            finally:
                with contextlib.suppress(EngineError):  # closed: nothing is fetched any more
                    self._link.call(self._set_download, None)
        if isinstance(result, str):
            raise EngineError(result)
        return result

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """See `Line.serve`."""
        self._link.call(self._set_serving, True)
        try:
            while (id := self._queue.get()) is not None:
                message = self._link.call(self._take_message, id)
                if message is not None:
                    self._link.call(self._reply, id, self._run_answer(answer, message))
        except EngineError:
            if not self._closed:
                raise
        finally:
            with contextlib.suppress(EngineError):  # closed
                self._link.call(self._set_serving, False)
        if self._refusal:
            raise EngineError(self._refusal)

    def _run_answer(self, answer: Callable[[bytes], bytes], message: bytes) -> Outgoing:
        """Return the reply. Of an error only the name of its class is sent: its text may quote the client's data."""
        try:
            return Outgoing(bytes(memoryview(answer(message))))
        except Exception as error:
            log.exception("client %d could not answer", self.client)
            return Outgoing(type(error).__name__[:100].encode(), failed=True)

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

    def _set_serving(self, serving: bool) -> None:
        """Tell the server that this client is present, or that it is not any more."""
        if self._serving and not serving:
            self._post(encode(Bye(self._id)))
        self._serving = serving
        if serving:
            self._send_beat()

    def _close(self) -> None:
        self._set_serving(False)
        if self._download is not None:
            self._download.done.put(f"{self._link.name} was closed")

    def _set_download(self, download: _Download | None) -> None:
        """Begin to fetch a file; None: end the download."""
        if download is None and self._download is not None:
            self._post(encode(Ended(self._download.id, EndReason.DONE)))
        self._download = download
        if download is not None:
            self._request_file(download)

    def _request_file(self, download: _Download) -> None:
        download.requested_at, download.announced = time.monotonic(), False
        self._post(encode(Fetch(download.id, download.name)))

    def _take_message(self, id: int) -> bytes | None:
        """Return a request's bytes; None if the request is over, or damaged: then it is answered with that reason."""
        request = self._requests.get(id)
        if request is None:
            return None
        message = request.incoming.take_message()
        if message is None:
            self._reply(id, Outgoing(b"the message is damaged", failed=True))
        return message

    def _reply(self, id: int, reply: Outgoing) -> None:
        request = self._requests.get(id)
        if request is None:
            log.warning("client %d: its reply to request %016x is not sent: the request is over", self.client, id)
            return
        request.reply = reply
        self._post(reply.announcement(id))

    def _post(self, frame: bytes) -> None:
        self._link.post(self._up_subject, frame)

    def _send_beat(self) -> None:
        if self._serving:
            requests = tuple((id, request.reply is not None) for id, request in self._requests.items())
            self._post(encode(Beat(self._id, self._connections, requests)))

    def _connected(self) -> None:
        self._connections += 1
        self._send_beat()
        self._request_again()

    def _request_again(self, stalled: float = 0.0) -> None:
        """Resume each transfer that has made no progress for `stalled` seconds; 0: all, after a new connection."""
        now = time.monotonic()
        for id, request in self._requests.items():
            if not request.incoming.complete and not request.queued and now - request.incoming.last_progress >= stalled:
                self._request_more(id, request.incoming, again=True)
        if self._download is not None:
            incoming = self._download.incoming
            if now - max(self._download.requested_at, incoming.last_progress if incoming else 0.0) >= stalled:
                self._request_file(self._download)

    def _request_more(self, id: int, incoming: Incoming, again: bool = False) -> None:
        """Request the next window of a message, if it is time to. again: also what was requested and has not come."""
        want = incoming.next_want(id, WINDOW, again)
        if want is not None:
            self._post(want)

    def _tick(self, since: float) -> None:
        """Send a beat if the server is silent, and resume stalled transfers."""
        if time.monotonic() - self._last_ping > PING_TIMEOUT:
            self._send_beat()
        self._request_again(STALLED)
        download = self._download
        if download is not None and not download.announced and time.monotonic() - download.requested_at > FETCH_RETRY:
            self._request_file(download)

    def _receive(self, subject: bytes, data: bytes) -> None:
        try:
            frame = decode(data)
        except FrameError as error:
            self._log.warn("malformed", "client %d: bytes that are no message are dropped: %s", self.client, error)
            return
        if isinstance(frame, Ping):
            self._on_ping(frame)
        elif isinstance(frame, Piece):
            if self._download is not None and frame.id == self._download.id:
                self._on_file_piece(self._download, frame)
            else:
                self._on_piece(frame)
        elif isinstance(frame, Want):
            request = self._requests.get(frame.id)
            if request is not None and request.reply is not None:
                if frame.length == 0:
                    self._post(request.reply.announcement(frame.id))
                elif frame.offset < len(request.reply.data):
                    end = min(len(request.reply.data), frame.offset + min(frame.length, WINDOW))
                    self._link.stream(self._up_subject, frame.id, request.reply, frame.offset, end)
        elif isinstance(frame, Ended):
            self._on_ended(frame)

    def _on_ping(self, ping: Ping) -> None:
        """Answer a ping by a beat, and notice another server, or a new connection of the same one."""
        before, self._server, self._last_ping = self._server, ping, time.monotonic()
        if (
            before != ping
        ):  # the server has a new connection, or is another one, which will refuse what it does not know
            self._request_again()
        if before is not None and before.engine != ping.engine:
            if ping.engine in self._earlier_servers:  # so it is still running: a restarted one has a new number
                self._log.warn("servers", f"client %d: {TWO_SERVERS}", self.client, self.run, level=logging.ERROR)
                for engine in (before.engine, ping.engine):
                    self._post(encode(Ended(engine, EndReason.REPLACED)))
            self._earlier_servers = (*self._earlier_servers[-7:], before.engine)
        self._send_beat()

    def _forget_request(self, id: int) -> None:
        del self._requests[id]
        self._link.stop(self._up_subject, id)

    def _on_piece(self, piece: Piece) -> None:
        request = self._requests.get(piece.id)
        if request is None:
            if len(self._requests) >= MAX_REQUESTS:
                return
            request = self._requests[piece.id] = _Request(start_incoming(piece, time.monotonic))
            if piece.total > self.largest:
                request.queued = True
                text = f"{piece.total} bytes, more than the largest message of {self.largest}"
                self._reply(piece.id, Outgoing(text.encode(), failed=True))
        elif not request.queued and request.incoming.fits(piece):
            request.incoming.add(piece)
        if request.queued:
            return
        if request.incoming.complete:
            request.queued = True
            self._queue.put(piece.id)
        else:
            self._request_more(piece.id, request.incoming)

    def _on_file_piece(self, download: _Download, piece: Piece) -> None:
        download.announced = True
        if piece.total > self.largest:
            download.done.put(f"{download.name!r} has {piece.total} bytes; the largest file is one of {self.largest}")
            return
        incoming = download.incoming
        if incoming is None or (incoming.total, incoming.crc) != (piece.total, piece.crc):
            incoming = download.incoming = start_incoming(piece, time.monotonic)
        elif incoming.fits(piece):
            incoming.add(piece)
        elif not piece.data:
            self._request_more(download.id, incoming, again=True)  # announced again
            return
        if incoming.complete:
            data = incoming.take_message()
            download.done.put(f"{download.name!r} is damaged" if data is None else data)
        else:
            self._request_more(download.id, incoming)

    def _on_ended(self, ended: Ended) -> None:
        if ended.id == self._id:  # the line itself
            self._refusal = f"another process is client {self.client} now"
            if ended.reason is not EndReason.REPLACED:
                self._refusal = printable(ended.text)
            log.error("client %d ends: %s", self.client, self._refusal)
            self._serving = False
            self._queue.put(None)
        elif self._download is not None and ended.id == self._download.id:
            if ended.reason is EndReason.REFUSED:
                self._download.done.put(printable(ended.text) or f"the server does not offer {self._download.name!r}")
            elif ended.reason is EndReason.UNKNOWN:
                self._request_file(self._download)
        elif ended.id in self._requests:
            self._forget_request(ended.id)
            if ended.reason is not EndReason.DONE:
                texts = {EndReason.LATE: "it came late", EndReason.UNKNOWN: "the server does not know it any more"}
                reason = texts.get(ended.reason) or printable(ended.text)
                log.warning("client %d: request %016x has ended without its reply: %s", self.client, ended.id, reason)

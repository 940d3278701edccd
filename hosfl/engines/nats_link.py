"""A connection to a NATS broker that never gives up, in a thread of its own.

nats-py connects and speaks; three things are done here instead. Its parser and its reading of headers can be stopped by
one message: a header that is not UTF-8, a reply subject with a vertical tab. It does without TLS where the broker, or
somebody in between, says so. And it keeps what it could not send for the next connection, where nobody waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Waited
from dataclasses import dataclass
from typing import Any, TypeVar

from nats import errors
from nats.aio.client import Client
from nats.protocol.parser import Parser

from hosfl.engines.engine import EngineError
from hosfl.engines.frames import LEAST, PIECE, SMALL, Outgoing

log = logging.getLogger("hosfl.engines.nats")
# nats-py's stream does not know that it is under TLS: asyncio says so at every connection's end, and nothing is wrong.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received" not in str(record.msg))
T = TypeVar("T")
Receive = Callable[[bytes, bytes], None]

TICK = 0.5  # seconds
FIRST, LONGEST = 0.1, 2.0  # seconds between attempts to connect
REFUSED = 30.0  # the longest where it is not let in: somebody has to renew its certificate first
ANSWERS = 10.0  # seconds in which a broker answers
AROUND = 256  # bytes of a frame that are no data, and more


class _Parser(Parser):
    """Cuts what the broker sends where the broker does, at blanks, and reads no headers."""

    def reset(self) -> None:
        super().reset()
        self.raw = bytearray()
        self.message: tuple[bytes, int, int] | None = None  # subject, bytes of headers, bytes in all

    async def parse(self, data: bytes = b"") -> None:
        raw = self.raw
        raw += data
        while True:
            if self.message is None:
                end = raw.find(b"\r\n")
                if end < 0:
                    return
                line = bytes(raw[:end])
                del raw[: end + 2]
                words = line.split(b" ")
                if words[0] == b"MSG":
                    self.message = words[1], 0, int(words[-1])
                elif words[0] == b"HMSG":
                    self.message = words[1], int(words[-2]), int(words[-1])
                else:
                    await super().parse(line + b"\r\n")
            else:
                subject, headers, size = self.message
                if len(raw) < size + 2:
                    return
                self.message = None
                data = bytes(raw[headers:size])
                del raw[: size + 2]
                self.nc.receive(subject, data)


class _Connection(Client):
    """One connection."""

    def __init__(self, receive: Receive, secure: bool) -> None:
        super().__init__()
        self._ps = _Parser(self)
        self.receive, self.secure = receive, secure

    def _connect_command(self) -> bytes:
        if self.secure and not self._server_info.get("tls_required"):
            raise errors.SecureConnWantedError
        return super()._connect_command()


@dataclass
class _Stream:
    """Bytes of a message that somebody asked for."""

    subject: str
    outgoing: Outgoing
    offset: int
    end: int


class Link:
    """A thread with a connection.

    urls: of brokers, such as "tls://host:4222". subjects: what is heard. receive(subject, data), connected() after
    every new connection and tick(since) every half second are called in the thread. At a tick everything that the
    broker had for us at `since`, of time.monotonic(), has been received. `post`, `stream` and `stop` are for the thread
    alone, `call` is for all others.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        tls: ssl.SSLContext | None,
        name: str,
        subjects: Sequence[str],
        receive: Receive,
        connected: Callable[[], None],
        tick: Callable[[float], None],
    ) -> None:
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        if not self.urls:
            raise EngineError("no broker is named: give one or more, such as tls://host:4222")
        if tls is None and any(url.startswith(("tls:", "wss:")) for url in self.urls):
            raise EngineError(f"{', '.join(self.urls)} takes certificates: give tls, as Member.context() makes it")
        self.tls = tls
        self.name, self.subjects = name, list(subjects)
        self._receive, self._connected, self._tick = receive, connected, tick
        self.up = False
        self._outbox: deque[tuple[str, bytes, str]] = deque()
        self._streams: dict[tuple[str, int], _Stream] = {}
        self._loop = asyncio.new_event_loop()
        self._wake, self._closing = asyncio.Event(), asyncio.Event()
        self._complained: dict[str, float] = {}  # of each text, when
        self._thread = threading.Thread(target=self._work, name=f"hosfl {name}", daemon=True)

    def start(self) -> None:
        """Connect, as soon as there is a broker."""
        self._thread.start()

    def close(self) -> None:
        """Send what is there to send, and end the thread."""
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._closing.set)
            except RuntimeError:
                return  # closed meanwhile
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(ANSWERS)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """A function's result, from the thread. Raises EngineError once the link is closed."""
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(function(*arguments))
            except BaseException as error:
                result.set_exception(error)

        try:
            if self._closing.is_set():
                raise RuntimeError
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:
            raise EngineError(f"{self.name} is closed") from None
        while True:
            try:
                return result.result(timeout=1)
            except Waited:
                if result.done() or self._thread.is_alive():
                    continue
                raise EngineError(f"{self.name} is closed") from None

    def post(self, subject: str, frame: bytes, reply: str = "") -> None:
        """Send a frame. Without a connection it is dropped: whoever gets a new one says what is missing."""
        if self.up:
            self._outbox.append((subject, frame, reply))
            self._wake.set()

    def stream(self, subject: str, id: int, outgoing: Outgoing, offset: int, end: int) -> None:
        """Send bytes of a message in pieces, in turn with all other streams."""
        if not self.up:
            return
        stream = self._streams.get((subject, id))
        if stream is not None and stream.outgoing is outgoing and stream.end == offset:
            stream.end = end
        else:
            self._streams[subject, id] = _Stream(subject, outgoing, offset, end)
        self._wake.set()

    def stop(self, subject: str, id: int) -> None:
        """End a stream."""
        self._streams.pop((subject, id), None)

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _run(self) -> None:
        delay = FIRST
        while not self._closing.is_set():
            connection, lost = _Connection(self._heard, self.tls is not None), asyncio.Event()
            try:
                await self._connect(connection, lost)
            except Exception as error:  # of sockets, of TLS, of nats-py and of its parser: whatever a broker may say
                self._complain(error)  # after what led to it, if nats-py has told
                await self._shut(connection)
                await self._nap(delay * random.uniform(0.5, 1))
                delay = min(2 * delay, REFUSED if "authorization" in str(error).lower() else LONGEST)
                continue
            delay = FIRST
            log.info("%s is connected", self.name)
            self._outbox.clear()
            self._streams.clear()
            self.up = True
            self._safely(self._connected)
            works = [asyncio.ensure_future(w) for w in (self._send(connection), self._beat(connection), lost.wait())]
            closing = asyncio.ensure_future(self._closing.wait())
            await asyncio.wait([*works, closing], return_when=asyncio.FIRST_COMPLETED)
            if self._closing.is_set() and not lost.is_set():
                await self._last_words(connection)
            self.up = False
            await self._shut(connection)
            for work in (*works, closing):
                work.cancel()
            for outcome in await asyncio.gather(*works, closing, return_exceptions=True):
                if isinstance(outcome, Exception):
                    self._complain(outcome)
            if not self._closing.is_set():
                log.warning("%s has lost its connection, and looks for another", self.name)
                await self._nap(FIRST * random.random())

    async def _connect(self, connection: _Connection, lost: asyncio.Event) -> None:
        async def error(error: Exception) -> None:
            if "permissions" in str(error):
                self._complain(error, "%s: the broker does not let it (%s), and it tries on: %s")
            elif not self.up:
                self._complain(error)

        async def closed() -> None:
            lost.set()

        await connection.connect(
            self.urls,
            name=self.name,
            tls=self.tls,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=FIRST,  # type: ignore[arg-type] # seconds, also in parts
            connect_timeout=5,
            ping_interval=2,
            max_outstanding_pings=4,
            pending_size=2 * PIECE,
            error_cb=error,
            closed_cb=closed,
        )
        if connection.max_payload < SMALL + AROUND:
            raise EngineError(f"its max_payload is {connection.max_payload} bytes; let it be 1 MB, as it is by default")
        for subject in self.subjects:
            await connection.subscribe(subject)
        await connection.flush(int(ANSWERS))

    async def _send(self, connection: _Connection) -> None:
        """All that goes out: frames first, then a piece of each stream in turn."""
        piece = min(PIECE, (connection.max_payload - AROUND) // LEAST * LEAST)
        while self.up:  # nats-py keeps a cancellation to itself
            await self._wake.wait()
            self._wake.clear()
            while self.up and (self._outbox or self._streams):
                if self._outbox:
                    subject, frame, reply = self._outbox.popleft()
                else:
                    key = next(iter(self._streams))
                    stream, reply = self._streams.pop(key), ""
                    subject, begin = stream.subject, stream.offset
                    stream.offset = min(stream.end, begin + piece)
                    frame = stream.outgoing.piece(key[1], begin, stream.offset)
                    if stream.offset < stream.end:
                        self._streams[key] = stream
                await connection.publish(subject, frame, reply)

    async def _beat(self, connection: _Connection) -> None:
        while connection.is_connected:
            since = time.monotonic()
            await connection.flush(int(ANSWERS))
            self._safely(self._tick, since)
            await asyncio.sleep(TICK)

    async def _last_words(self, connection: _Connection) -> None:
        """What is in the outbox, for a second at most."""
        self._streams.clear()
        for _ in range(100):
            if not self._outbox:
                break
            await asyncio.sleep(0.01)
        try:
            await asyncio.wait_for(connection.flush(), 1)
        except Exception as error:
            log.debug("%s: %s", self.name, error)

    async def _shut(self, connection: _Connection) -> None:
        try:
            await asyncio.wait_for(connection.close(), 2)
        except Exception as error:
            log.debug("%s: %s", self.name, error)

    async def _nap(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)

    def _heard(self, subject: bytes, data: bytes) -> None:
        self._safely(self._receive, subject, data)

    def _safely(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:
            log.exception("%s: a fault of hosfl's", self.name)

    def _complain(self, error: Exception, text: str = "%s has no broker at %s, and tries on: %s") -> None:
        """In the same words at most once in a minute."""
        now = time.monotonic()
        if now - self._complained.get(text, -math.inf) > 60:
            self._complained[text] = now
            log.warning(text, self.name, ", ".join(self.urls), _said(error))


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__

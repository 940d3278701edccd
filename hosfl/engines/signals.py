"""Stopping a client by Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from hosfl.engines.engine import Line

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal:
    """A `Line` that Ctrl-C or SIGTERM closes. A second signal has its default action, and ends the process.

    A client that serves finishes its current answer and saves its state. Before it serves there is nothing to save: the
    wait for the server, or the reading of data, is interrupted at once by KeyboardInterrupt.

    name: of the client, for the message. line: the underlying line; set inside the `with` block, since creating it may
    wait for a broker. signal: the number of the signal that came, or None.

    Python runs signal handlers only between operations, and a graph that a server offers may never return. So while the
    `with` block lasts a thread reads the wake-up file descriptor, and ends the process at the second signal.
    """

    line: Line | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.signal: int | None = None
        self._serving = False

    def __enter__(self) -> StopOnSignal:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        self._handlers = {number: signal.signal(number, self._handle_signal) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        if self.signal is None:  # otherwise the process is ending, and a second signal must end it at once
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._sender.close()

    def _watch(self) -> None:
        """End the process if a second signal comes before Python has handled the first."""
        count = 0
        with self._receiver:
            while number := self._receiver.recv(1):
                count += number[0] in SIGNALS
                if count > 1:
                    time.sleep(1)  # the second may be the first one, deferred: see `hosfl.interrupts`
                    if self.signal is None:
                        os._exit(128 + number[0])

    def fetch(self, name: str, deadline: float | None = None) -> bytes:
        """See `Line.fetch`."""
        assert self.line is not None
        return self.line.fetch(name, deadline)

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """See `Line.serve`. Returns at once if a signal has come."""
        assert self.line is not None
        self._serving = True
        if self.signal is None:  # otherwise the code that reads data has swallowed the KeyboardInterrupt
            self.line.serve(answer)

    def close(self) -> None:
        """Close the line, if it is set."""
        if self.line is not None:
            self.line.close()

    def _handle_signal(self, number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self.signal is not None:  # the second signal: `hosfl.interrupts` had reinstalled this handler
            signal.raise_signal(number)
        self.signal = number
        # Not by print or a log: the signal may have interrupted this thread in one of these.
        os.write(2, f"hosfl: {self.name} ends; once more ends it at once\n".encode())
        if not self._serving:
            raise KeyboardInterrupt
        threading.Thread(target=self.close).start()  # in a thread: this one may hold a lock that `close` needs

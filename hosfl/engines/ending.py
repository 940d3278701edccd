"""How Ctrl-C and SIGTERM end a client."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from hosfl.engines.engine import Line

ENDS = (signal.SIGINT, signal.SIGTERM)


class Ending:
    """A client's line that Ctrl-C or SIGTERM ends; the second one has its default action, and ends the process.

    A client that serves answers what it is at, and keeps its state. Before that nothing is at stake: the wait for the
    server, or the reading of data, ends at once, by KeyboardInterrupt. signal: which it was.

    line: is given afterwards, since it may wait for a broker from its first moment on.

    Python hears of a signal only when an operation has returned to it, and a graph that a server offers may be one
    without end. So a thread watches what the system has noted, while the block of `with` lasts.
    """

    line: Line | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.signal: int | None = None
        self._serves = False

    def __enter__(self) -> Ending:
        self._noted, self._notes = socket.socketpair()
        self._notes.setblocking(False)
        signal.set_wakeup_fd(self._notes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        self._before = {number: signal.signal(number, self._end) for number in ENDS}
        return self

    def __exit__(self, *error: object) -> None:
        if self.signal is None:  # else the process ends, and a second signal ends it at once
            for number, handler in self._before.items():
                signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._notes.close()

    def _watch(self) -> None:
        """End the process where a second signal comes before Python has heard of the first."""
        count = 0
        with self._noted:
            while note := self._noted.recv(1):
                count += note[0] in ENDS
                if count > 1:
                    time.sleep(1)  # the second may be the first one, put off: see `hosfl.interrupts`
                    if self.signal is None:
                        os._exit(128 + note[0])

    def fetch(self, name: str, deadline: float | None = None) -> bytes:
        assert self.line is not None
        return self.line.fetch(name, deadline)

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        assert self.line is not None
        self._serves = True
        if self.signal is None:  # else code that reads data has kept the interrupt to itself
            self.line.serve(answer)

    def close(self) -> None:
        if self.line is not None:
            self.line.close()

    def _end(self, number: int, frame: object) -> None:
        for one in ENDS:
            signal.signal(one, signal.SIG_DFL)
        if self.signal is not None:  # the second: a pass that Ctrl-C waits for has put this back
            signal.raise_signal(number)
        self.signal = number
        # Not by print or a log: the signal may have come while this thread was at one of these.
        os.write(2, f"hosfl: {self.name} ends; once more ends it at once\n".encode())
        if not self._serves:
            raise KeyboardInterrupt
        threading.Thread(target=self.close).start()  # what it waits for, this thread may hold

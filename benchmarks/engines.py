"""Seconds of an exchange over each engine: N bytes to each of four clients, and N bytes back from each.

    python -m benchmarks.engines [--out FILE] [--engine nats ...]

Clients are processes of their own on this machine. The NATS broker is a process too, without certificates. A row has
the median, the minimum and the maximum of several exchanges.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hosfl.engines.engine import Engine
from hosfl.runs.report import machine

RESULTS = Path(__file__).parent / "results"
CLIENTS, REPEATS = 4, 12
SIZES = {"1 KB": 1 << 10, "3 MB": 3 << 20, "16 MB": 16 << 20}


@contextlib.contextmanager
def over_nats() -> Iterator[Engine]:
    """Context manager that yields a NATS engine, with a broker and four clients that echo."""
    from hosfl.engines.nats_server import NatsEngine

    program = shutil.which("nats-server")
    if program is None:
        sys.exit("no nats-server on the path: https://docs.nats.io, or Debian's package of that name")
    with socket.socket() as probe, contextlib.ExitStack() as stack:
        probe.bind(("127.0.0.1", 0))
        url = f"nats://127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        log = Path(stack.enter_context(tempfile.TemporaryDirectory()), "log")
        serve = f"from hosfl.engines.nats_line import NatsLine; NatsLine({url!r}, 'bench', %d).serve(bytes)"
        commands = [[program, "-a", "127.0.0.1", "-p", url.rpartition(":")[2], "-l", str(log)]]
        commands += [[sys.executable, "-c", serve % number] for number in range(CLIENTS)]
        for command in commands:
            process = subprocess.Popen(command)
            stack.callback(process.wait)
            stack.callback(process.kill)
        engine = NatsEngine(url, "bench", CLIENTS)
        stack.callback(engine.close)
        yield engine


@contextlib.contextmanager
def over_ray() -> Iterator[Engine]:
    """Context manager that yields a Ray engine, with four clients that echo, each in an actor on this machine."""
    from hosfl.engines.ray import RayEngine

    engine = RayEngine(lambda: lambda client, data: data, CLIENTS, CLIENTS)
    yield engine
    engine.close()


ENGINES: dict[str, Callable[[], contextlib.AbstractContextManager[Engine]]] = {"nats": over_nats, "ray": over_ray}


def wait_for_clients(engine: Engine) -> None:
    """Wait until all clients are connected; exit after two minutes."""
    until = time.monotonic() + 120
    while len(engine.present()) < CLIENTS:
        if time.monotonic() > until:
            sys.exit(f"{len(engine.present())} of {CLIENTS} clients are here after two minutes")
        time.sleep(0.1)


def measure(engine: Engine) -> dict[str, Any]:
    """Return the seconds of an exchange, by size."""
    wait_for_clients(engine)
    rows = {}
    for name, size in SIZES.items():
        seconds = []
        for _ in range(2 + REPEATS):
            data = os.urandom(size)
            begin = time.perf_counter()
            replies = list(engine.ask(dict.fromkeys(range(CLIENTS), data), deadline=60))
            seconds.append(time.perf_counter() - begin)
            assert all(reply.data == data for reply in replies), [reply.reason for reply in replies]
        seconds = seconds[2:]  # the first two warm up
        rows[name] = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "engines.json")
    parser.add_argument("--engine", choices=ENGINES, nargs="*", default=list(ENGINES))
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "clients": CLIENTS, "engines": {}}
    for name in options.engine:
        with ENGINES[name]() as engine:
            result["engines"][name] = rows = measure(engine)
        for size, row in rows.items():
            spread = f"{1e3 * row['least']:.1f} to {1e3 * row['most']:.1f}"
            print(f"{name}, {size}: {1e3 * row['median']:.1f} ms ({spread})", flush=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""`hosfl status`: the state of a run with clients on other machines, from its status.json. Needs no torch."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from hosfl.files import read_small
from hosfl.terminal import printable

STALE = 15.0  # seconds since the file was written, after which the server may not be running


def read_status(folder: Path, now: float) -> list[str]:
    """Read the status that a server wrote last, as lines. Raises FileNotFoundError; ValueError naming the file."""
    path = folder / "status.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run with clients elsewhere: there is no {path.name}")
    try:
        return lines(json.loads(read_small(path)), now)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a run's status ({error!r}): the server's next round writes it anew") from None


def lines(status: dict[str, Any], now: float) -> list[str]:
    """Format a status as lines of text."""
    last, present = status["last"], status["here"]
    absent = sorted(set(range(status["clients"])) - set(present))
    silent = now - status["time"]
    text = [
        f"round {status['round']} of {status['rounds']}"
        + (f", and no word for {silent:.0f} s: is the server running?" if silent > STALE else ""),
        f"here: {_numbers(present)}; not here: {_numbers(absent)}",
    ]
    if "tried" in last:
        text.append(
            f"waiting: of round {status['round'] + 1} no cut could be learnt from, tried {last['tried']} times so far"
        )
        text += [f"  client {client}: {reason}" for client, reason in last["missing"].items()]
    elif "waiting for" in last:
        text.append(f"waiting until at least {last['waiting for']} are here")
    else:
        loss = "none" if last["loss"] is None else f"{last['loss']:.4f}"
        phases = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in last["seconds"].items())
        text.append(f"last round: loss {loss}; took part: {_numbers(last['took part'])}; {phases}")
        text += [f"  client {client}: {reason}" for client, reason in last["missing"].items()]
    text.append(f"{sum(status['bytes'].values()) / 1e6:.1f} MB; no answer {status['missing']} times")
    text += [f"refused: {reason}" for reason in status["refused"]]
    text += [f"complaint: {reason}" for reason in status["complaints"]]
    return [printable(line) for line in text]  # the file may hold anything


def _numbers(clients: list[int]) -> str:
    return ", ".join(map(str, clients[:50])) + (" ..." if len(clients) > 50 else "") if clients else "nobody"


def show(folder: Path, watch: bool) -> int:
    """Print the status, once or until interrupted."""
    while True:
        text = "\n".join(read_status(folder, time.time()))
        if not watch:
            print(text)
            return 0
        clear = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
        print(f"{clear}{folder}\n{text}", flush=True)
        time.sleep(1.0)

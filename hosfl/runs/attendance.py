"""A page and a figure, made from events.jsonl, of which clients took part in which rounds of a run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hosfl.extras import require
from hosfl.files import read_small, regular, write_atomically
from hosfl.references import short_name
from hosfl.runs.pages import document, html_image, html_table
from hosfl.runs.report import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The states of a client that was asked in a round, with their colours in the figure.
STATES = {
    "took part": "#3b7dbd",
    "gone": "#4d4d4d",
    "late": "#f0a30a",
    "failed": "#c0152f",
    "lost": "#b57edc",
    "left out": "#8c6d31",
}
NOT_ASKED = "#eeeeee"
ROUNDS, CLIENTS = 600, 150  # columns and rows of the figure's matrix, at most


@dataclass(frozen=True)
class Event:
    """A finished round.

    loss: NaN if nobody took part. seconds: by phase. bytes_sent: so far, by all clients and the server. clients: by
    state, see `STATES`. failures: the reason, by client that failed.
    """

    round: int
    time: datetime
    loss: float
    seconds: dict[str, float]
    bytes_sent: int
    clients: dict[str, NDArray[np.int32]]
    failures: dict[int, str]

    @classmethod
    def read(cls, line: bytes, rounds: int, clients: int) -> Event:
        """Parse a line of events.jsonl. Raises one of `DAMAGED` for a line that is not of this run."""
        values = json.loads(line)
        took_part = set(values["took part"])
        missing = {int(n): str(reason) for n, reason in values["missing"].items() if int(n) not in took_part}
        by_state: dict[str, set[int]] = {state: set() for state in STATES} | {"took part": took_part}
        for client, reason in missing.items():
            by_state[reason if reason in ("gone", "late", "lost") else "failed"].add(client)
        asked = set(values.get("asked", ()))  # earlier versions did not record it
        by_state["left out"] = asked - took_part - set(missing)
        if not all(type(c) is int and 0 <= c < clients for numbers in by_state.values() for c in numbers):
            raise ValueError("clients that the run has not")
        if not 1 <= values["round"] <= rounds:
            raise ValueError("a round that the run has not")
        return cls(
            round=int(values["round"]),
            time=datetime.fromtimestamp(values["time"], timezone.utc),
            loss=math.nan if values["loss"] is None else float(values["loss"]),
            seconds={str(phase): float(seconds) for phase, seconds in values["seconds"].items()},
            bytes_sent=int(values["bytes"]),
            clients={state: np.array(sorted(numbers), np.int32) for state, numbers in by_state.items()},
            failures={client: reason for client, reason in missing.items() if client in by_state["failed"]},
        )


LONGEST_LINE = 1 << 24  # bytes
DAMAGED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError)


def read_events(path: Path, rounds: int, clients: int) -> tuple[list[Event], int]:
    """Read an events.jsonl: (its rounds in order, the number of its damaged lines).

    If the run was resumed and ran rounds again, the later run of these rounds counts. An incomplete last line is not
    counted as damaged: it may be being written.
    """
    events: list[Event] = []
    damaged = 0
    with regular(path).open("rb") as file:
        for line in iter(partial(file.readline, LONGEST_LINE), b""):
            try:
                event = Event.read(line, rounds, clients)
            except DAMAGED:
                damaged += line.endswith(b"\n")
                continue
            while events and events[-1].round >= event.round:
                events.pop()
            events.append(event)
    return events, damaged


def write_attendance(folder: Path) -> Path:
    """Write report.html and clients.png into a run's folder. Returns the page's path.

    The run is one with clients on other machines. An unfinished run is shown up to its last round. Raises
    FileNotFoundError if the folder holds no such run, and ValueError naming a file that is damaged, or that has no
    round yet.
    """
    title, rounds, clients = _read_config(folder / "config.json")
    path = folder / "events.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run with clients elsewhere: there is no {path.name}")
    events, damaged = read_events(path, rounds, clients)
    if not events:
        raise ValueError(f"{path} has no round yet that can be read: run the report again after the first one")
    cell = plot(events, clients, folder / "clients.png", title)
    page = folder / "report.html"
    write_atomically(page, _page(title, rounds, clients, events, damaged, cell, folder / "clients.png").encode())
    return page


def _read_config(path: Path) -> tuple[str, int, int]:
    """Read (title, rounds, clients) from a run's config.json. This version need not know its other settings."""
    try:
        settings = json.loads(read_small(path))
        on = f" on {short_name(settings['task'])}" if settings["task"] else ""  # a task that is an object has no name
        title = f"Run: {short_name(settings['method'])}{on}, seed {settings['seed']}"
        return title, int(settings["rounds"]), int(settings["clients"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} holds no run: there is no {path.name}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a run's settings: {error!r}") from None


def plot(events: Sequence[Event], clients: int, path: Path, title: str) -> str:
    """Plot the clients' states by round, the training loss, and seconds by phase.

    If rounds or clients are many, a cell of the matrix stands for several. A client's colour in it is the mean over the
    rounds that asked it, and the cell's colour is the mean over its clients. The curves are means too. Returns the size
    of a cell in words, or "" for one client and one round.
    """
    first, last = events[0].round, events[-1].round
    wide, tall = -(-(last - first + 1) // ROUNDS), -(-clients // CLIENTS)
    columns = np.array([(event.round - first) // wide for event in events])
    edges = first - 0.5 + wide * np.arange((last - first) // wide + 2)
    height = 0.8 + 0.15 * min(clients, 40)  # inches
    figure: Figure = require("matplotlib.figure", path.name).Figure(figsize=(11, height + 5), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(3, 1, sharex=True, height_ratios=[height, 1.8, 1.8])
    _draw_clients(axes[0], events, columns, edges, clients, tall)
    losses = _means(columns, [event.loss for event in events], len(edges) - 1)
    axes[1].plot((edges[1:] + edges[:-1]) / 2, losses, color="#222222", lw=1.4, marker="." if len(edges) < 40 else None)
    axes[1].set_ylabel("training loss")
    axes[1].grid(alpha=0.3)
    _draw_seconds(axes[2], events, columns, edges)
    axes[2].set_xlabel("round")
    axes[2].set_xlim(first - 0.5, last + 0.5)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    locator = require("matplotlib.ticker", path.name).MaxNLocator
    for numbers in (axes[0].yaxis, axes[2].xaxis):
        numbers.set_major_locator(locator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    figure.suptitle(title, parse_math=False)
    save_figure(figure, path, 130)
    return "" if wide == tall == 1 else f"{tall} client{'s' * (tall > 1)} x {wide} round{'s' * (wide > 1)}"


def _draw_clients(
    axis: Axes,
    events: Sequence[Event],
    columns: NDArray[np.int64],
    edges: NDArray[np.floating],
    clients: int,
    tall: int,
) -> None:
    """Draw the matrix of states. columns: each event's; edges: of the columns, in rounds; tall: clients per row."""
    cells = _cells(events, columns, len(edges) - 1, clients, tall)
    extent = (edges[0], edges[-1], tall * len(cells) - 0.5, -0.5)
    axis.imshow(cells, extent=extent, aspect="auto", interpolation="nearest")
    if max(cells.shape) <= 60:
        axis.hlines(np.arange(1, clients) - 0.5, edges[0], edges[-1], "white", lw=1)
        axis.vlines(edges[1:-1], -0.5, clients - 0.5, "white", lw=1)
    axis.set_ylim(clients - 0.5, -0.5)
    axis.set_ylabel("client")
    patch = require("matplotlib.patches", "clients.png").Patch
    colors = {state: color for state, color in STATES.items() if any(event.clients[state].size for event in events)}
    colors["not asked"] = NOT_ASKED
    handles = [patch(facecolor=color, label=state) for state, color in colors.items()]
    axis.legend(handles=handles, **_legend_above(len(colors)))


def _draw_seconds(axis: Axes, events: Sequence[Event], columns: NDArray[np.int64], edges: NDArray[np.floating]) -> None:
    """Draw the mean seconds per round of every column, stacked by phase."""
    names = list(dict.fromkeys(phase for event in events for phase in event.seconds))
    colors = require("matplotlib", "clients.png").colormaps["viridis"](np.linspace(0.2, 0.9, len(names)))
    below: NDArray[np.float64] = np.zeros(len(edges) - 1)
    for name, color in zip(names, colors, strict=True):
        seconds = [event.seconds.get(name, 0.0) for event in events]
        above = below + np.nan_to_num(_means(columns, seconds, len(below)))
        axis.stairs(above, edges, baseline=below, fill=True, color=color, label=name)
        below = above
    axis.set_ylabel("seconds per round")
    if names:
        axis.legend(**_legend_above(len(names)))


def _legend_above(entries: int) -> dict[str, Any]:
    """Return the arguments that put a legend on one line above its axes."""
    position = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    return {**position, "ncols": entries, "frameon": False}


def _cells(
    events: Sequence[Event], columns: NDArray[np.int64], count: int, clients: int, tall: int
) -> NDArray[np.float64]:
    """Return the cells' colours, [rows, count, 3]. columns: each event's, below `count`; tall: clients per row."""
    rgba = require("matplotlib.colors", "clients.png").to_rgba_array([*STATES.values(), NOT_ASKED])
    palette, not_asked = rgba[:-1, :3], rgba[-1, :3]
    starts = np.arange(0, clients, tall)
    sizes = np.diff(starts, append=clients)[:, None]
    image = np.tile(not_asked, (len(starts), count, 1))
    for column, pairs in groupby(zip(columns, events, strict=True), lambda pair: pair[0]):
        counts = np.zeros((clients, len(STATES)))
        for _, event in pairs:
            for state, numbers in enumerate(event.clients.values()):
                counts[numbers, state] += 1
        asked = counts.sum(1, keepdims=True)
        colors = np.where(asked > 0, counts @ palette / np.maximum(asked, 1), not_asked)
        image[:, column] = np.add.reduceat(colors, starts) / sizes
    return image


def _means(columns: NDArray[np.int64], values: Sequence[float], count: int) -> NDArray[np.float64]:
    """Return the mean of each column's finite values, NaN for none. columns: each value's, below `count`."""
    array = np.array(values)
    finite = np.isfinite(array)
    sums = np.bincount(columns[finite], array[finite], count)
    counts = np.bincount(columns[finite], minlength=count)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _page(title: str, rounds: int, clients: int, events: Sequence[Event], damaged: int, cell: str, image: Path) -> str:
    last = events[-1]
    loss = "none: nobody took part" if math.isnan(last.loss) else f"{last.loss:.4f}"
    parts = [
        f"<p>Round {last.round} of {rounds}, {clients} clients; from {_time(events[0].time)} to {_time(last.time)}."
        f" Last training loss: {loss}. {last.bytes_sent / 1e6:.1f} MB on the wire.</p>"
    ]
    if damaged:
        parts.append(f"<p><strong>Lines of events.jsonl that cannot be read</strong> and do not count: {damaged}.</p>")
    text = (
        "A round asks some clients. Gone: not connected, or vanished meanwhile. Late: no answer by the deadline."
        " Failed: the client could not answer. Lost: a message did not arrive. Left out: its message was refused, it"
        " complained, or the round went on without it."
    )
    if cell:
        text += f" A cell is {cell}: its colour is the mean of its clients', and curves are means too."
    parts += ["<h2>Who took part when</h2>", html_image(image, text)]
    parts += ["<h2>Clients</h2>", _table(events, clients)]
    return document(title, parts)


def _table(events: Sequence[Event], clients: int) -> str:
    counts = {state: Counter[int]() for state in STATES}
    last_event: dict[int, Event] = {}  # by client, the last one in which it took part
    last_failure: dict[int, str] = {}
    for event in events:
        for state, numbers in event.clients.items():
            counts[state].update(numbers.tolist())
        last_event |= dict.fromkeys(event.clients["took part"].tolist(), event)
        last_failure |= event.failures
    rows = []
    for client in range(clients):
        last = last_event.get(client)
        took_part = "never" if last is None else f"round {last.round}, {_time(last.time)}"
        cells = [str(counts[state][client] or "") for state in STATES]
        rows.append([str(client), *cells, took_part, last_failure.get(client, "")])
    return html_table(["client", *STATES, "last took part", "last failure"], rows)


def _time(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")

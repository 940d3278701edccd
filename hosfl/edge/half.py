"""The client half under onnxruntime: numpy's arrays are its moving weights, and no torch is needed.

half-0.onnx ...     the half without weights in one piece or several, as `hosfl.edge.export` makes them
base.safetensors    its weights of round 0, the file that every client of a run has
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from safetensors import SafetensorError

from hosfl.edge.travel import assign_rounded
from hosfl.protocol.arrays import widened
from hosfl.protocol.weights import Weights
from hosfl_kernels import threads as threads_of_kernels

BASE = "base.safetensors"
PREFIX = "client."  # of the weights' names in a graph, where inputs and values have names as well
LAYOUT = "layout"  # what a graph's metadata call the digest of its base file's header
MIN_ONNXRUNTIME = 1, 24  # of onnxruntime's versions: older ones read any file that a graph names
MISMATCH = "graph and base are of two halves: fetch both of one run"
BFLOAT16 = 16  # by ONNX's number of it
CHECK_STEP = 1 / 64  # how far a check moves every weight: more than rounding hides, and little enough for any network

# By onnxruntime's names of them.
INTEGER_TYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")
INTEGERS = {f"tensor({name})": np.dtype(name) for name in INTEGER_TYPES}

Arrays = NDArray[Any] | Mapping[str, NDArray[Any]]
Run = Callable[[], list[NDArray[np.float32]]]


class HalfError(ValueError):
    """A graph or base file is not the half's, inputs do not fit, or the runtime does not see that weights moved."""


class Half:
    """The client half under onnxruntime: what moves is numpy arrays, changed in place and seen by the next pass.

    Args:
        folder: holds half-0.onnx and so on, and base.safetensors.
        moving: names of weights as in the half's state dict.
        pieces: how many graphs there are. Each goes on from what the one before makes, so that a pass may begin at any:
            see `at`.
        threads: of onnxruntime; 0: as many as the kernels use.
        running: names of running statistics, which may change as well.
        graphs: names of other files than half-0.onnx and so on.

    Attributes:
        tensors: the moving weights, in the order of `moving`: float32, or bfloat16 as its bits, uint16, which the graph
            makes wide.
        statistics: those of `running`, likewise.

    The moving ones are inputs of the graph with a value of their own, which onnxruntime reads anew in every pass; it
    would prepack or fold constants once, and go on with the old ones. Frozen ones are constants in the file.

    Raises:
        HalfError: a graph or file that is not the half's.
    """

    tensors: list[NDArray[Any]]

    def __init__(
        self,
        folder: Path,
        moving: Sequence[str],
        pieces: int = 1,
        threads: int = 0,
        running: Sequence[str] = (),
        graphs: Sequence[str] = (),
    ) -> None:
        names = graphs or [graph_name(number) for number in range(pieces)]
        self._graphs, self._file = [folder / name for name in names], folder / BASE
        self._moving, self._running, self._threads = list(moving), list(running), threads
        if len({*moving, *running}) < len(self._moving) + len(self._running):
            raise HalfError(f"a weight is named twice: {', '.join([*moving, *running])}")
        self.tensors, self.statistics = self.base(), self._stored(self._running)
        # Sessions do not own the memory that they read, so these values and the arrays must be kept.
        changing = [*self.tensors, *self.statistics]
        self._values = [ort_value(tensor) for tensor in changing]
        self._sessions = self._opened()
        self._reached = len(self._graphs)  # a piece
        self._between: NDArray[np.float32] = np.empty(0, np.float32)  # and its input

    @property
    def pieces(self) -> int:
        return len(self._graphs)

    @property
    def integers(self) -> dict[str, np.dtype[Any]]:
        """Of those of its inputs that are integers or truth values the dtype, by name."""
        types = {entry.name: entry.type for entry in self._sessions[0].get_inputs()}
        return {name: INTEGERS[type] for name, type in types.items() if type in INTEGERS}

    def base(self) -> list[NDArray[Any]]:
        """Read the trainable weights of round 0 from the base file. Raises HalfError."""
        return self._stored(self._moving)

    def _stored(self, names: Sequence[str]) -> list[NDArray[Any]]:
        found = []
        try:
            stored = Weights(self._file)
            for name in names:
                if name not in stored:
                    raise HalfError(f"{self._file} has no {name!r}, which moves; {MISMATCH}")
                if (dtype := stored.dtype(name)) not in ("F32", "BF16"):
                    raise HalfError(f"{name!r} moves and is {dtype}: float32 or bfloat16 is needed")
                found.append(stored[name])
        except (OSError, SafetensorError) as error:
            raise HalfError(f"{self._file} cannot be read: {error}; fetch it anew") from error
        return found

    def __call__(self, inputs: Arrays) -> NDArray[np.float32]:
        """The cut. inputs: an array, or arrays by name, as the half was exported for. Raises HalfError.

        What the first piece makes stays here, for `at`.
        """
        self._between = np.empty(0, np.float32)  # never the last pass's beside this one's
        self._reached, self._between = 1, self._run(self._sessions[0], inputs)
        return self._through(self._sessions[1:], inputs, self._between)

    def at(self, piece: int, inputs: Arrays) -> Callable[[], NDArray[np.float32]]:
        """What makes the cut from a piece on, of the weights as they are when it is called. inputs: see `input_of`."""
        between = self.input_of(piece, inputs)
        return lambda: self._through(self._sessions[piece:], inputs, between)

    def input_of(self, piece: int, inputs: Arrays) -> NDArray[np.float32] | None:
        """What a piece begins with; None: with the half's own inputs.

        inputs: of the last pass of the whole half. Pieces are asked for in order, with the weights as in that pass:
        what lies between runs. For an earlier one again the whole half does.
        """
        if not piece:
            return None
        if piece < self._reached:
            self(inputs)
        between = self._through(self._sessions[self._reached : piece], inputs, self._between)
        self._reached, self._between = piece, between
        return between

    def _through(
        self, sessions: Sequence[Any], inputs: Arrays, between: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """What these pieces make one after the other. between: the first one's input; None for the half's own."""
        for session in sessions:
            between = self._run(session, inputs, between)
        assert between is not None
        return between

    def _run(self, session: Any, inputs: Arrays, between: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        named = dict(inputs) if isinstance(inputs, Mapping) else {"input": inputs}
        takes = [entry.name for entry in session.get_inputs()]
        if between is not None:  # it comes first; of the half's own inputs a later piece takes those that it needs
            named = {name: named[name] for name in takes[1:] if name in named} | dict.fromkeys(takes[:1], between)
        if set(named) != set(takes):
            raise HalfError(f"the half takes {', '.join(takes)}, and was given {', '.join(named) or 'nothing'}")
        try:
            output: NDArray[np.float32] = session.run(None, named)[0]
        except Exception as error:  # onnxruntime's errors have no class in common
            raise HalfError(f"the half does not take these inputs: {error}{negative_input_hint(named)}") from error
        return output

    def check(self, inputs: Arrays) -> None:
        """Does this machine's onnxruntime see every move of a weight? Raises HalfError that names those it misses.

        Every moving weight is moved, which must give the bits of a session that was opened where they are then, and put
        back, which must give the bits of before. So weights that these inputs do not reach, such as an expert's that no
        token goes to, need no excuse: they change nothing in either. Costs four passes, and for the time of the check
        the memory of the moving weights.
        """
        check_updates_seen(
            [*self._moving, *self._running],
            [*self.tensors, *self.statistics],
            lambda: [self(inputs)],
            self._reopen,
            len(self._running),
        )

    def _reopen(self) -> None:
        del self._sessions  # never two at once, each with its copy of the frozen weights
        self._sessions = self._opened()

    def _opened(self) -> list[Any]:
        """Open a session for each piece over `tensors`, whose current values every pass reads."""
        sessions, may, moving = [], dict[str, None](), [*self._moving, *self._running]
        for graph in self._graphs:
            sessions.append(session := open_session(graph, self._file, moving, self._values, self._threads))
            may |= dict.fromkeys(entry.name.removeprefix(PREFIX) for entry in session.get_overridable_initializers())
        if still := sorted({*moving} - {*may}):
            raise HalfError(f"{still[0]!r} does not move in the half, where these do: {', '.join(may)[:500]}")
        return sessions


def ort_value(array: NDArray[Any]) -> Any:
    """An OrtValue that shares the memory of an array, which must outlive it. uint16 holds the bits of bfloat16."""
    if array.dtype == np.uint16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def open_session(graph: Path, base: Path, moving: Sequence[str], values: Sequence[Any], threads: int) -> Any:
    """A session of a graph whose weights are those of a base file, but for those that move: OrtValues, which it reads
    wherever they are then. Raises HalfError."""
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < MIN_ONNXRUNTIME:
        raise HalfError(
            f"onnxruntime {onnxruntime.__version__} reads any file that a graph names: 1.24 or later is needed"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # else it warns of every weight that is an input too, and prints errors twice
    # By default it uses all cores and binds threads to them, whatever OMP_NUM_THREADS and the system's limits say.
    options.intra_op_num_threads = threads or threads_of_kernels()
    # Its memory arena and its memory plans cost more memory than they save time.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    # Every piece has its own threads, which would spin while another piece's work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, value in zip(moving, values, strict=True):
        options.add_initializer(PREFIX + name, value)
    if not graph.is_file():
        raise HalfError(f"there is no {graph}")
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class in common
        raise HalfError(f"onnxruntime cannot open {graph} with {base}: {error}") from error
    if session.get_modelmeta().custom_metadata_map.get(LAYOUT) != layout_digest(base):
        raise HalfError(f"{graph} was not made for {base}; {MISMATCH}")
    if others := {output.type for output in session.get_outputs()} - {"tensor(float)"}:
        raise HalfError(f"{graph} makes {', '.join(sorted(others))}, and no half does: fetch it anew")
    return session


def negative_input_hint(named: Mapping[str, NDArray[Any]]) -> str:
    """A hint for an error of a pass with negative inputs, which a graph turns into large numbers."""
    wrong = [name for name, x in named.items() if x.dtype.kind == "i" and x.size and x.min() < 0]
    return f"; {', '.join(wrong)} has numbers below zero" if wrong else ""


def check_updates_seen(
    names: Sequence[str],
    tensors: Sequence[NDArray[Any]],
    run: Run,
    reopen: Callable[[], None],
    upwards: int = 0,
) -> None:
    """Raises HalfError, with the names, where sessions that are open miss moves that newly opened ones know.

    run: a pass of all sessions. reopen: opens them anew. upwards: how many, the last ones, move upwards alone: of a
    variance below zero all is NaN, behind which nothing is seen. See `Half.check`.
    """
    ways = [False] * (len(tensors) - upwards) + [True] * upwards
    before, kept = run(), [np.copy(tensor) for tensor in tensors]
    missed: list[str] = []
    try:
        for tensor, way in zip(tensors, ways, strict=True):
            _shift_weights(tensor, way)
        seen = run()
        reopen()
        if not (same := _same(seen, run())):  # with all of them moved: a factor of zeros would hide the other's move
            each = zip(names, tensors, ways, strict=True)
            missed = [name for name, tensor, way in each if _is_update_missed(tensor, way, run, reopen)]
    finally:
        for tensor, values in zip(tensors, kept, strict=True):
            tensor[...] = values
    if not (same and _same(run(), before)):
        what = f"goes on with old values of {', '.join(missed)}" if missed else "comes back to other numbers"
        raise HalfError(f"onnxruntime {onnxruntime.__version__} {what}: install another version")


def _is_update_missed(tensor: NDArray[Any], upwards: bool, run: Run, reopen: Callable[[], None]) -> bool:
    """Whether open sessions do not see that this tensor has moved."""
    reopen()
    run()
    kept = np.copy(tensor)
    _shift_weights(tensor, upwards)
    seen = run()
    reopen()
    misses = not _same(seen, run())
    tensor[...] = kept
    return misses


def graph_name(piece: int) -> str:
    """The file name of a piece's graph; pieces are counted from 0."""
    return f"half-{piece}.onnx"


def layout_digest(file: Path) -> str:
    """A digest of the layout of a safetensors file, since a graph refers to its weights by their offsets."""
    with file.open("rb") as stream:
        size = stream.read(8)
        return hashlib.sha256(size + stream.read(int.from_bytes(size, "little"))).hexdigest()


def _shift_weights(tensor: NDArray[Any], upwards: bool) -> None:
    """By turns up and down: a normalisation behind it takes a common shift away. upwards: by turns, and never down."""
    values = widened(tensor).reshape(-1)
    values[::2] += np.float32(CHECK_STEP)
    if not upwards:
        values[1::2] -= np.float32(CHECK_STEP)
    assign_rounded(tensor, values)


def _same(ones: Sequence[NDArray[np.float32]], others: Sequence[NDArray[np.float32]]) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(ones, others, strict=True))

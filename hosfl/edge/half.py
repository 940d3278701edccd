"""The client half under onnxruntime, without torch: its moving weights are numpy arrays.

half-0.onnx ...     the half without weights, in one piece or several, as `hosfl.edge.export` makes them
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
PREFIX = "client."  # begins the weights' names in a graph, where inputs and other values have names, too
LAYOUT = "layout"  # the key in a graph's metadata of the digest of its base file's header
MIN_ONNXRUNTIME = 1, 24  # the lowest version: older ones read any file that a graph names
MISMATCH = "graph and base are of two halves: fetch both of one run"
BFLOAT16 = 16  # ONNX's number of the type
CHECK_STEP = 1 / 64  # by how much a check shifts each weight: above rounding errors, and small enough for any network

INTEGER_TYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")
INTEGERS = {f"tensor({name})": np.dtype(name) for name in INTEGER_TYPES}  # dtypes by onnxruntime's names

Arrays = NDArray[Any] | Mapping[str, NDArray[Any]]
Run = Callable[[], list[NDArray[np.float32]]]


class HalfError(ValueError):
    """A graph or base file is not the half's, inputs do not fit, or onnxruntime does not see changes of weights."""


class Half:
    """The client half under onnxruntime. Its moving weights are numpy arrays; the next pass sees changes in place.

    Args:
        folder: holds half-0.onnx and so on, and base.safetensors.
        moving: names of the trainable weights, as in the half's state dict.
        pieces: the number of graphs. Each takes the output of the one before, so that a pass may begin at any of them:
            see `forward_from`.
        threads: onnxruntime's number of threads; 0: as many as the kernels use.
        running: names of running statistics, which may change, too.
        graphs: the graphs' file names, if they are not half-0.onnx and so on.

    Attributes:
        tensors: the trainable weights, in the order of `moving`: float32, or the bits of bfloat16 in uint16, which the
            graph converts to float32.
        statistics: the running statistics, in the order of `running`, likewise.

    These arrays are inputs of the graph, which onnxruntime reads in every pass. Constants would be prepacked or folded
    once, and later changes would not be seen. Frozen weights are constants in the base file.

    Raises:
        HalfError: onnxruntime cannot open a graph, or a file is not the half's.
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
        self.tensors, self.statistics = self.base(), self._read_base(self._running)
        # Sessions do not own the memory that they read, so these values and the arrays must be kept.
        changing = [*self.tensors, *self.statistics]
        self._values = [ort_value(tensor) for tensor in changing]
        self._sessions = self._open_sessions()
        self._hidden_piece = len(self._graphs)  # the piece whose input `_hidden` is
        self._hidden: NDArray[np.float32] = np.empty(0, np.float32)

    @property
    def pieces(self) -> int:
        """The number of pieces."""
        return len(self._graphs)

    @property
    def integers(self) -> dict[str, np.dtype[Any]]:
        """The dtypes, by name, of the inputs that are integers or booleans."""
        types = {argument.name: argument.type for argument in self._sessions[0].get_inputs()}
        return {name: INTEGERS[type] for name, type in types.items() if type in INTEGERS}

    def base(self) -> list[NDArray[Any]]:
        """Read the trainable weights of round 0 from the base file. Raises HalfError."""
        return self._read_base(self._moving)

    def _read_base(self, names: Sequence[str]) -> list[NDArray[Any]]:
        """Read weights from the base file. Raises HalfError for missing ones and for other dtypes."""
        arrays = []
        try:
            stored = Weights(self._file)
            for name in names:
                if name not in stored:
                    raise HalfError(f"{self._file} has no {name!r}, which moves; {MISMATCH}")
                if (dtype := stored.dtype(name)) not in ("F32", "BF16"):
                    raise HalfError(f"{name!r} moves and is {dtype}: float32 or bfloat16 is needed")
                arrays.append(stored[name])
        except (OSError, SafetensorError) as error:
            raise HalfError(f"{self._file} cannot be read: {error}; fetch it again") from error
        return arrays

    def __call__(self, inputs: Arrays) -> NDArray[np.float32]:
        """Compute the cut. inputs: an array, or arrays by name, as the half was exported for. Raises HalfError.

        Keeps the output of the first piece for `piece_input`.
        """
        self._hidden = np.empty(0, np.float32)  # frees the last pass's first
        self._hidden_piece, self._hidden = 1, self._run(self._sessions[0], inputs)
        return self._run_pieces(self._sessions[1:], inputs, self._hidden)

    def forward_from(self, piece: int, inputs: Arrays) -> Callable[[], NDArray[np.float32]]:
        """Return a function that computes the cut from a piece on, with the weights at the time of its call.

        piece, inputs: see `piece_input`.
        """
        hidden = self.piece_input(piece, inputs)
        return lambda: self._run_pieces(self._sessions[piece:], inputs, hidden)

    def piece_input(self, piece: int, inputs: Arrays) -> NDArray[np.float32] | None:
        """Compute the input of a piece: the output of the piece before. None for piece 0.

        inputs: those of the last pass of the whole half; the weights must be as in that pass. The result is kept, so
        that the next call for a later piece runs only the pieces in between. A call for an earlier piece runs the whole
        half again.
        """
        if not piece:
            return None
        if piece < self._hidden_piece:
            self(inputs)
        hidden = self._run_pieces(self._sessions[self._hidden_piece : piece], inputs, self._hidden)
        self._hidden_piece, self._hidden = piece, hidden
        return hidden

    def _run_pieces(
        self, sessions: Sequence[Any], inputs: Arrays, hidden: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Run pieces in order, and return the last one's output. hidden: the first one's input; None for piece 0."""
        for session in sessions:
            hidden = self._run(session, inputs, hidden)
        assert hidden is not None
        return hidden

    def _run(self, session: Any, inputs: Arrays, hidden: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Run one piece. Raises HalfError for inputs that it does not take."""
        named = dict(inputs) if isinstance(inputs, Mapping) else {"input": inputs}
        expected = [argument.name for argument in session.get_inputs()]
        if hidden is not None:  # a later piece takes it first, and then only some of the half's inputs
            named = {name: named[name] for name in expected[1:] if name in named} | dict.fromkeys(expected[:1], hidden)
        if set(named) != set(expected):
            raise HalfError(f"the half takes {', '.join(expected)}, and was given {', '.join(named) or 'nothing'}")
        try:
            output: NDArray[np.float32] = session.run(None, named)[0]
        except Exception as error:  # onnxruntime's errors have no class in common
            raise HalfError(f"the half does not take these inputs: {error}{negative_input_hint(named)}") from error
        return output

    def check(self, inputs: Arrays) -> None:
        """Check that this machine's onnxruntime sees every change of a weight.

        All moving weights are shifted: the open session must then give the same bits as one that is opened after the
        shift. They are restored: the session must then give the bits of before. Weights that do not influence the cut
        of these inputs, such as an expert's that no token is routed to, pass: they change neither session's output.

        Costs four passes and, meanwhile, a copy of the moving weights. Raises HalfError with the names of the weights
        whose change is not seen.
        """
        check_updates_seen(
            [*self._moving, *self._running],
            [*self.tensors, *self.statistics],
            lambda: [self(inputs)],
            self._reopen,
            len(self._running),
        )

    def _reopen(self) -> None:
        """Open all sessions again."""
        del self._sessions  # first: each session may have its own copy of frozen weights
        self._sessions = self._open_sessions()

    def _open_sessions(self) -> list[Any]:
        """Open a session for each piece. Each pass reads the current values of `tensors` and `statistics`.

        Raises HalfError if one of them is no input of any graph.
        """
        sessions, movable, moving = [], dict[str, None](), [*self._moving, *self._running]
        for graph in self._graphs:
            sessions.append(session := open_session(graph, self._file, moving, self._values, self._threads))
            movable |= dict.fromkeys(
                weight.name.removeprefix(PREFIX) for weight in session.get_overridable_initializers()
            )
        if fixed := sorted({*moving} - {*movable}):
            raise HalfError(f"{fixed[0]!r} does not move in the half, where these do: {', '.join(movable)[:500]}")
        return sessions


def ort_value(array: NDArray[Any]) -> Any:
    """Return an OrtValue that shares the memory of an array, which must outlive it. uint16 means bits of bfloat16."""
    if array.dtype == np.uint16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def open_session(graph: Path, base: Path, moving: Sequence[str], values: Sequence[Any], threads: int) -> Any:
    """Open a session of a graph. Its frozen weights are the base file's.

    moving, values: names of the moving weights and OrtValues of them, which every pass reads. threads: see `Half`.
    Raises HalfError for a graph that onnxruntime cannot open, or that was not made for the base file.
    """
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < MIN_ONNXRUNTIME:
        raise HalfError(
            f"onnxruntime {onnxruntime.__version__} reads any file that a graph names: 1.24 or later is needed"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # else it warns of every weight that is an input, and prints errors twice
    # By default it uses all cores and binds threads to them, whatever OMP_NUM_THREADS and the system's limits are.
    options.intra_op_num_threads = threads or threads_of_kernels()
    # The memory arena and memory patterns cost more memory than the time they save is worth.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    # Each session has its own threads, which would spin while another session runs.
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
        raise HalfError(f"{graph} makes {', '.join(sorted(others))}, and no half does: fetch it again")
    return session


def negative_input_hint(named: Mapping[str, NDArray[Any]]) -> str:
    """Return the end of an error message that names negative inputs, or "" if there are none.

    onnxruntime's own message does not show them: the graph replaces negative indices by large ones.
    """
    negative = [name for name, x in named.items() if x.dtype.kind == "i" and x.size and x.min() < 0]
    return f"; {', '.join(negative)} has numbers below zero" if negative else ""


def check_updates_seen(
    names: Sequence[str],
    tensors: Sequence[NDArray[Any]],
    run: Run,
    reopen: Callable[[], None],
    non_negative: int = 0,
) -> None:
    """Raise HalfError, with the tensors' names, if open sessions do not see changes of tensors: see `Half.check`.

    run: makes a pass of all sessions. reopen: opens them anew. non_negative: the number of tensors at the end that are
    only increased: a negative variance would make everything NaN, and hide other changes.
    """
    increase_only = [False] * (len(tensors) - non_negative) + [True] * non_negative
    before, saved = run(), [np.copy(tensor) for tensor in tensors]
    missed: list[str] = []
    try:
        for tensor, only in zip(tensors, increase_only, strict=True):
            _shift_weights(tensor, only)
        shifted = run()
        reopen()
        # All are shifted at once: a factor of zeros would hide the change of another tensor.
        if not (same := _is_same(shifted, run())):
            missed = [
                name
                for name, tensor, only in zip(names, tensors, increase_only, strict=True)
                if _is_update_missed(tensor, only, run, reopen)
            ]
    finally:
        for tensor, values in zip(tensors, saved, strict=True):
            tensor[...] = values
    if not (same and _is_same(run(), before)):
        fault = f"keeps using old values of {', '.join(missed)}" if missed else "does not restore its output"
        raise HalfError(f"onnxruntime {onnxruntime.__version__} {fault}: install another version")


def _is_update_missed(tensor: NDArray[Any], increase_only: bool, run: Run, reopen: Callable[[], None]) -> bool:
    """Whether open sessions do not see a change of this tensor."""
    reopen()
    run()
    saved = np.copy(tensor)
    _shift_weights(tensor, increase_only)
    shifted = run()
    reopen()
    is_missed = not _is_same(shifted, run())
    tensor[...] = saved
    return is_missed


def graph_name(piece: int) -> str:
    """The file name of a piece's graph. piece: counted from 0."""
    return f"half-{piece}.onnx"


def layout_digest(file: Path) -> str:
    """A digest of the layout of a safetensors file, since a graph refers to its weights by their offsets."""
    with file.open("rb") as stream:
        size = stream.read(8)
        return hashlib.sha256(size + stream.read(int.from_bytes(size, "little"))).hexdigest()


def _shift_weights(tensor: NDArray[Any], increase_only: bool) -> None:
    """Increase every second element and, unless `increase_only`, decrease the others.

    A normalisation after it would remove a shift that is the same for all elements.
    """
    values = widened(tensor).reshape(-1)
    values[::2] += np.float32(CHECK_STEP)
    if not increase_only:
        values[1::2] -= np.float32(CHECK_STEP)
    assign_rounded(tensor, values)


def _is_same(outputs: Sequence[NDArray[np.float32]], others: Sequence[NDArray[np.float32]]) -> bool:
    """Whether two lists of outputs are equal, element by element; NaN equals NaN."""
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(outputs, others, strict=True))

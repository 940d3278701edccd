"""A client without torch on its own machine. It fetches the run and the half, and checks both before it takes part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from hosfl.edge.client import EdgeClient
from hosfl.edge.data import Arrays, Batches, Samples, read_samples
from hosfl.edge.gradient import GRADIENT, Gradient
from hosfl.edge.half import BASE, Half, HalfError, graph_name
from hosfl.edge.running_statistics import STATISTICS, StatisticsEstimator
from hosfl.engines.engine import JoinError, Line
from hosfl.engines.joining import check_cut, check_labels, fetch_file, read_offer, take_part
from hosfl.protocol.arrays import Array
from hosfl.protocol.endpoint import Endpoint
from hosfl.protocol.header import Header, LogError, decode_header
from hosfl.protocol.provenance import header_digest
from hosfl.protocol.rebuild import base_digest
from hosfl.protocol.seeds import Purpose
from hosfl.protocol.terms import Run, run_of
from hosfl.protocol.weights import Weights
from hosfl.settings import Settings, decisive, differences
from hosfl.tasks.reading import DataError

HEADER = "header"  # the name of the file with the header of the run's log
ESTIMATORS = ("one-sided", "two-sided", "backward")


def join(line: Line, number: int, folder: Path, *, data: str, threads: int = 0) -> None:
    """Take part in a run until the line is closed: `hosfl.runs.join.join` with onnxruntime instead of torch.

    The server has to offer the client half as a graph: `hosfl serve --edge`. data: see `hosfl.edge.data.read_samples`.
    threads: onnxruntime's; 0: as many as the kernels use. Raises JoinError, DataError, ValueError and OSError.
    """
    if not data:
        raise ValueError("a client without torch needs data of its own: name them with --data")

    def make(offer: bytes) -> Endpoint[EdgeClient]:
        try:
            return make_client(offer, partial(fetch_file, line, needed=True), number, folder, data, threads)
        except HalfError as error:
            raise JoinError(str(error)) from error

    take_part(line, number, folder, make)


def make_client(
    offer: bytes,
    fetch: Callable[[str, str, Path], bytes],
    number: int,
    folder: Path,
    data: str,
    threads: int = 0,
) -> Endpoint[EdgeClient]:
    """Make a client of the run that a server offers, after checking the offer and the client's data.

    fetch: called with (name, SHA-256, path), fetches a file to the path and returns its bytes. Raises what `join`
    does, and HalfError.
    """
    raw_settings, run = read_offer(offer)
    if run["edge"] is None:
        raise JoinError("the server offers nothing to clients without torch: it has to be started with --edge")
    settings = _read_settings(raw_settings)
    samples = read_samples(data)
    check_labels(samples.labels, samples.tokens, run, data)
    fetch("base", run["base"], folder / BASE)
    terms, header = _read_terms(fetch(HEADER, run["edge"]["header"], folder / HEADER), run["log"], settings)
    _check_settings(header, raw_settings)
    _check_base(folder / BASE, header, run["edge"]["digest"])
    blocks = len(list(terms.parts()))
    graphs = _Graphs(run["edge"], fetch, [p.name for p in header.parameters], folder, threads)
    half = graphs.half(blocks)
    first = _check_samples(samples, half, run["cut"], data)
    gradient = None
    if settings.estimator == "backward":
        gradient = graphs.gradient(half)
        gradient.check(first, np.ones_like(half(first)), half.piece_input(half.pieces - blocks, first))
    per_token = run["labels"]["ignore_index"] is not None
    batches = Batches(samples, settings.batch, settings.seed, number, per_token, half.integers)
    statistics = None
    if settings.calibrate:
        calibration_batches = replace(batches, purpose=Purpose.CALIBRATION)
        statistics = graphs.statistics(half, partial(map, calibration_batches, range(settings.calibrate)))
    client = EdgeClient(
        number,
        half,
        terms,
        [p.stream for p in header.parameters],
        batches,
        lambda: _digested_arrays(folder / BASE, run["edge"]["digest"], header, half, run["edge"]["running"]),
        settings.dtype if settings.wire == "float32" else settings.wire,
        gradient,
        settings.microbatch,
        statistics,
    )
    return Endpoint(client, calibrates=settings.calibrate > 0, run=run["id"])


@dataclass(frozen=True)
class _Graphs:
    """The graphs of a run, fetched when they are needed.

    offer: the part of the server's offer that describes them. fetch: see `make_client`. moving: the names of the
    trainable weights.
    """

    offer: dict[str, Any]
    fetch: Callable[[str, str, Path], bytes]
    moving: list[str]
    folder: Path
    threads: int

    def half(self, blocks: int) -> Half:
        """Fetch and open the half. Raises JoinError if the number of pieces does not fit the number of blocks."""
        graphs = self.offer["graphs"]
        if len(graphs) not in (blocks, blocks + 1):  # the layers before the first block may be a piece, too
            raise JoinError(f"the server offers its half in {len(graphs)} pieces, and the run has {blocks} blocks")
        for piece, sha256 in enumerate(graphs):
            self.fetch(graph_name(piece), sha256, self.folder / graph_name(piece))
        return Half(self.folder, self.moving, len(graphs), self.threads, self.offer["running"])

    def gradient(self, half: Half) -> Gradient:
        """Fetch and open the gradient's graph. Raises JoinError if the server offers none."""
        if self.offer["gradient"] is None:
            raise JoinError("the run's clients backpropagate, and the server offers no gradient's graph")
        self.fetch(GRADIENT, self.offer["gradient"], self.folder / GRADIENT)
        running = self.offer["running"]
        return Gradient(self.folder, self.moving, half.tensors, self.threads, running, half.statistics)

    def statistics(self, half: Half, batches: Callable[[], Iterable[Samples]]) -> StatisticsEstimator:
        """Fetch the statistics' graph, and return the estimator. Raises JoinError if the server offers none."""
        running = self.offer["running"]
        if self.offer["statistics"] is None or not running:
            raise JoinError("the run's clients estimate running statistics, and the server offers no graph of them")
        self.fetch(STATISTICS, self.offer["statistics"], self.folder / STATISTICS)
        open_graph = partial(Half, self.folder, self.moving, threads=self.threads, running=running, graphs=[STATISTICS])
        return StatisticsEstimator(half.statistics, open_graph, batches)


def _read_settings(raw_settings: dict[str, Any]) -> Settings:
    """Return the run's settings. Raises JoinError for invalid ones, and for a run that needs clients with torch."""
    unknown = sorted(set(raw_settings) - set(Settings.names()))
    if unknown:
        raise JoinError(f"the run has settings that this version has not: {', '.join(unknown)}: update hosfl")
    try:
        settings = Settings(**raw_settings)
    except (TypeError, ValueError) as error:
        raise JoinError(f"the run's settings do not work here: {error}") from None
    if reason := unsupported_reason(settings):
        raise JoinError(f"{reason}: join with torch, without --runtime onnx")
    return settings


def unsupported_reason(settings: Settings) -> str:
    """Why clients without torch cannot take part in a run with these settings; "" if they can."""
    if settings.method != "ho":
        return f"clients without torch take part in method ho, and the run's is {settings.method!r}"
    if settings.estimator not in ESTIMATORS:
        return f"clients without torch take the estimator {', '.join(ESTIMATORS)}, not {settings.estimator}"
    return ""


def _read_terms(data: bytes, sha256: str, settings: Settings) -> tuple[Run, Header]:
    """Decode the header of the run's log, and return (terms of the run, header). Raises JoinError for another log's."""
    try:
        header, end = decode_header(data)
        if end != len(data) or header_digest(header) != sha256:
            raise JoinError("the server's header is not that of its log")
        return replace(run_of(header), estimator=settings.estimator), header
    except LogError as error:
        raise JoinError(f"the server's header is invalid: {error}") from None


def _check_settings(header: Header, raw_settings: dict[str, Any]) -> None:
    """Raise JoinError if the header's settings are not those of the offer.

    An offer leaves out settings of the server's machine, such as its device: see `hosfl.runs.serve.LOCAL`.
    """
    header_settings = {name: value for name, value in header.settings.items() if name in raw_settings}
    if different := differences(header_settings, decisive(raw_settings)):
        raise JoinError(f"the settings in the server's header are not those that it offers: {'; '.join(different)}")


def _check_base(path: Path, header: Header, digested_tensors: Sequence[str]) -> None:
    """Raise JoinError if the base file's weights are not the header's, or arrays of the digest are missing."""
    try:
        weights = Weights(path)  # reads them one by one: all at once would take as much memory as the session
    except SafetensorError as error:
        raise JoinError(f"the base half is no safetensors file: {error}") from None
    try:
        digest = base_digest(weights)
    except ValueError as error:  # an unsupported dtype
        raise JoinError(str(error)) from None
    if digest != header.base:
        raise JoinError("the server's base holds other weights than its log's header says")
    if missing := [name for name in digested_tensors if name not in weights]:
        raise JoinError(f"the server's base has no {missing[0]}, which is a part of its half's digest")


def _digested_arrays(
    path: Path, names: Sequence[str], header: Header, half: Half, running: Sequence[str]
) -> Iterator[Array]:
    """Yield the arrays in the half's digest. Frozen ones are read from the base file when they are needed."""
    changing = {p.name: tensor for p, tensor in zip(header.parameters, half.tensors, strict=True)}
    changing |= zip(running, half.statistics, strict=True)
    stored = Weights(path)
    for name in names:
        yield changing[name] if name in changing else stored[name]


def _check_samples(samples: Samples, half: Half, shape: list[int], source: str) -> Arrays:
    """Check that the half runs on this machine, and makes cuts of the samples that the server accepts.

    shape: the cut's, as the server tells it, without the batch. source: the samples' source, for error messages.
    Returns the inputs of the first two samples as the half takes them. Raises DataError if the samples do not fit,
    HalfError if onnxruntime does not see changes of weights.
    """
    try:
        samples.check_castable(half.integers)
        first = samples[:2].cast_for_half(half.integers)
        cut = half(first.inputs)
    except (DataError, HalfError) as error:
        raise DataError(f"{source}: {error}") from None
    check_cut(list(cut.shape[1:]), bool(np.isfinite(cut).all()), samples.tokens is not None, shape, source)
    half.check(first.inputs)
    return first.inputs

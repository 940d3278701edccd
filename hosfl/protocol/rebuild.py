"""Rebuilds the client half from its base weights and the log."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from hosfl.files import regular
from hosfl.protocol.arrays import Array, bits, copied, dtype_name
from hosfl.protocol.header import Header, LogError
from hosfl.protocol.log import Log
from hosfl.protocol.replica import Replica, to_records
from hosfl.protocol.terms import run_of
from hosfl.protocol.weights import read_weights


def base_digest(tensors: Mapping[str, Array]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and bits, by name."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        # In torch's notation of dtype and shape, which all logs have.
        sha.update(f"{name}\0torch.{dtype_name(tensor)}\0{tuple(tensor.shape)}\0".encode())
        sha.update(bits(tensor))
    return sha.hexdigest()


def rebuild(
    log: Path, base: Path, upto: int | None = None, load: Callable[[Path], dict[str, Array]] = read_weights
) -> tuple[dict[str, Array], Replica]:
    """Apply every committed round before `upto` (None: all) to the base weights, in one pass.

    load: reads the base file, as numpy arrays or torch tensors. Returns its tensors, with the trained ones as of that
    round, and the replica that has them. Raises LogError for a damaged log or one that no run can have written, for
    another base than the log's, for a wrong `upto`, and for weights whose digest is not the one in the log. Raises
    ValueError for a base file without weights.
    """
    opened = Log.read(log)
    run, header, records = run_of(opened.header), opened.header, opened.rounds
    upto = len(records) if upto is None else upto
    if not 0 <= upto <= len(records):
        raise LogError(f"{log} holds {len(records)} rounds; cannot rebuild round {upto}")
    try:
        tensors = load(regular(base))
    except SafetensorError as error:
        raise ValueError(f"{base} holds no weights: {error}") from error
    trained = _trained(tensors, header, base)
    tied = {other: p.name for p in header.parameters for other in p.tied}
    if run.lattice is not None:
        run.lattice.put(trained, run.factors)
        run.lattice.put([tensors[other] for other in tied], [p.factor for p in header.parameters for _ in p.tied])
    if base_digest(tensors) != header.base:
        raise LogError(f"{base} is not the base model of {log}: its digest is not the one in the log's header")
    start = [copied(t) for t in trained]
    replica = Replica(trained, [p.stream for p in header.parameters], run, lambda: start)
    # In parts that end at rounds with a digest, so that a difference is found where it begins.
    stops = sorted({*(r for r in opened.digests if r <= upto), upto})
    for stop in stops:
        try:
            replica.apply(to_records(records[replica.applied : stop], run, replica.applied))
        except (ArithmeticError, ValueError) as error:
            raise LogError(f"{log} holds rounds that no run has made: {error}") from error
        if stop in opened.digests and opened.digests[stop] != replica.digest():
            raise LogError(f"after round {stop} the weights are not those of the run: the digests differ")
    return tensors | {other: copied(tensors[name]) for other, name in tied.items()}, replica


def _trained(tensors: Mapping[str, Array], header: Header, base: Path) -> list[Array]:
    for p in header.parameters:
        for name in (p.name, *p.tied):
            if name not in tensors:
                raise LogError(f"{base} has no tensor {name!r}, which the log trains")
            shape, dtype = tuple(tensors[name].shape), dtype_name(tensors[name])
            if (shape, dtype) != (tuple(p.shape), p.dtype):
                raise LogError(f"{name!r} is {dtype} {shape} in {base}, and {p.dtype} {tuple(p.shape)} in the log")
    return [tensors[p.name] for p in header.parameters]

"""A log becomes weights again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hosfl.protocol.log import Header, Log, LogError
from hosfl.protocol.replica import Replica, to_records
from hosfl.protocol.terms import run_of


def base_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and bits, by name."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def rebuild(log: Path, base: Path, upto: int | None = None) -> tuple[dict[str, Tensor], Replica]:
    """The client half of a log: base weights, and every committed round before `upto` (default: all) in one pass.

    Returns the base file's tensors, the trained ones brought up to date, and the replica that did it. Raises LogError
    for a damaged log or one that no run can have written, for a base that is not the one the log was made from, and for
    a wrong `upto`; and for weights whose digest is not what the log says.
    """
    opened = Log.read(log)
    run, header, records = run_of(opened.header), opened.header, opened.rounds
    upto = len(records) if upto is None else upto
    if not 0 <= upto <= len(records):
        raise LogError(f"{log} holds {len(records)} rounds; cannot rebuild round {upto}")
    tensors = load_file(base)
    trained = _trained(tensors, header, base)
    tied = {other: p.name for p in header.parameters for other in p.tied}
    if run.lattice is not None:
        run.lattice.put(trained, run.factors)
        run.lattice.put([tensors[other] for other in tied], [p.factor for p in header.parameters for _ in p.tied])
    if base_digest(tensors) != header.base:
        raise LogError(f"{base} is not the base model of {log}: its digest is not the one in the log's header")
    start = [t.clone() for t in trained]
    replica = Replica(trained, [p.stream for p in header.parameters], run, lambda: start)
    # In parts that end where a digest is known, so that a difference is found where it began.
    stops = sorted({*(r for r in opened.digests if r <= upto), upto})
    for stop in stops:
        try:
            replica.apply(to_records(records[replica.applied : stop], run, replica.applied))
        except (ArithmeticError, ValueError) as error:
            raise LogError(f"{log} holds rounds that no run has made: {error}") from error
        if opened.digests.get(stop, replica.digest()) != replica.digest():
            raise LogError(f"after round {stop} the weights are not those of the run: the digests differ")
    return tensors | {other: tensors[name].clone() for other, name in tied.items()}, replica


def _trained(tensors: Mapping[str, Tensor], header: Header, base: Path) -> list[Tensor]:
    for p in header.parameters:
        for name in (p.name, *p.tied):
            if name not in tensors:
                raise LogError(f"{base} has no tensor {name!r}, which the log trains")
            shape, dtype = tuple(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch.")
            if (shape, dtype) != (tuple(p.shape), p.dtype):
                raise LogError(f"{name!r} is {dtype} {shape} in {base}, and {p.dtype} {tuple(p.shape)} in the log")
    return [tensors[p.name] for p in header.parameters]

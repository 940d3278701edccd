"""A run's folder: what is written as the run goes, so that a killed run resumes and a log becomes weights again.

config.json                 the settings
base.safetensors            the client half of round 0
hosfl.log                   the client half of every later round
provenance.json             what the run was made of, against which everything that is put together is checked
lock                        of the process that is at work
snapshot-*.safetensors      the server, every so many rounds
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hosfl.methods.ledger import to_records
from hosfl.probing.probe import trainable
from hosfl.protocol.lattice import Lattice
from hosfl.protocol.log import (
    EXPONENTS,
    Header,
    Log,
    LogError,
    Parameter,
    check_integer,
    check_number,
    locked,
    sync_folder,
)
from hosfl.protocol.replica import Pool, Replica, Rule, Run
from hosfl.runs.config import Config, decisive, differences
from hosfl_kernels import SGD, AdamW


def write_atomically(path: Path, data: bytes) -> None:
    """All of it or nothing, whatever happens in between; a file that was there keeps its mode.

    A link stays, and what it points at is written. What is no regular file, as /dev/null or a pipe, is written into.

    Raises OSError: IsADirectoryError for a folder, FileNotFoundError where there is no folder to write in, ....
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "this is a folder: name a file in it", str(path))
    if mode is not None and not stat.S_ISREG(mode):
        with path.open("wb") as file:
            file.write(data)
        return
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no folder to write this file in", str(path))
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a writer that was killed
    try:
        with temporary.open("xb") as file:
            if mode is not None:
                temporary.chmod(stat.S_IMODE(mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_module(module: nn.Module, path: Path) -> None:
    """A module's state dict as safetensors; tied tensors are written once per name."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    write_atomically(path, save(tensors))


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has not: infinite ones and NaN."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """A JSON file that every reader reads, whole or not at all: null for numbers that are not finite."""
    write_atomically(path, (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


def save_config(config: Config, folder: Path) -> None:
    write_json(folder / "config.json", asdict(config))


RUN_FILES = ("config.json", "hosfl.log", "summary.json", "metrics.jsonl")


def check_free(folder: Path) -> None:
    """Raises FileExistsError for a folder that holds a run, or what is left of one."""
    for name in (*RUN_FILES, *(path.name for path in folder.glob("snapshot-*.safetensors"))):
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder} holds another run ({name}): resume it, choose another folder or delete what is in it"
            )


class FolderLock:
    """The folder of a run, or of a study, for one process: no other takes it up until this one closes it or ends.

    Raises RunFolderError where another process has it.
    """

    def __init__(self, folder: Path, of: str = "run") -> None:
        self.path = folder / "lock"
        self.file = self.path.open("a")
        if not locked(self.file):
            self.file.close()
            raise RunFolderError(f"another process is at work on the {of} in {folder}: wait for it, or stop it")

    def check(self) -> None:
        """Raises RunFolderError where the folder was removed or replaced under the run."""
        try:
            there = os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            raise RunFolderError(f"{self.path.parent} was removed or replaced while the run went on: the run ends here")

    def close(self) -> None:
        self.file.close()


class RunFolderError(ValueError):
    """A run's folder that another process has, or that is no longer there."""


def load_config(folder: Path) -> Config:
    """The settings of the run in a folder. Raises FileNotFoundError, or ValueError naming what is wrong."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path.name}")
    try:
        return Config(**json.loads(path.read_bytes()))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a run's settings: {error}") from None


def base_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and bits, by name."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def header_of(run: Run, base: nn.Module, settings: dict[str, Any]) -> Header:
    """The log header of a run whose client half starts as `base`, already on its lattice."""
    names: dict[int, list[str]] = {}
    for name, p in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    parameters, streams = trainable(base)
    return Header(
        seed=run.seed,
        directions=run.directions,
        dist=run.dist,
        mu=run.mu,
        quantum=run.lattice.quantum if run.lattice else None,
        rule=_describe(run.rule),
        pool=asdict(run.pool) if run.pool else None,
        parameters=tuple(
            Parameter(
                names[id(p)][0],
                stream,
                tuple(p.shape),
                str(p.dtype).removeprefix("torch."),
                factor,
                tuple(names[id(p)][1:]),
            )
            for p, stream, factor in zip(parameters, streams, run.factors, strict=True)
        ),
        base=base_digest(base.state_dict()),
        settings=settings,
    )


def header_digest(header: Header) -> str:
    """SHA-256 of a log's header, without the settings that the bits do not depend on."""
    return hashlib.sha256(repr(replace(header, settings=decisive(header.settings))).encode()).hexdigest()


def open_log(folder: Path, header: Header) -> Log:
    """The log of a run: the one in its folder, which must have this header, or a new one, there whole or not at all.

    Raises LogError for another run's, which says what differs.
    """
    path = folder / "hosfl.log"
    if not path.exists():
        temporary = path.with_name("hosfl.log.tmp")
        temporary.unlink(missing_ok=True)
        Log.create(temporary, header).close()
        temporary.replace(path)
        sync_folder(folder)
    log = Log.open(path)
    if header_digest(log.header) != header_digest(header):
        log.close()
        found = differences(decisive(log.header.settings), header.settings) or [
            "the model's first weights or their lattice were others"
        ]
        raise LogError(f"{path} is the log of another run: {'; '.join(found)}")
    return log


def _describe(rule: Rule | None) -> dict[str, Any]:
    if rule is None:
        return {"name": "moves"}
    if isinstance(rule, SGD):
        return {"name": "sgd", "momentum": rule.momentum, "weight_decay": rule.weight_decay}
    b1, b2 = rule.betas
    return {"name": "adamw", "beta1": b1, "beta2": b2, "eps": rule.eps, "weight_decay": rule.weight_decay}


def _rule(described: Mapping[str, Any]) -> Rule | None:
    constants = dict(described)
    name = constants.pop("name")
    for constant, value in constants.items():
        check_number(value, f"the rule's {constant}")
    match name:
        case "moves":
            return None
        case "sgd":
            return SGD(**constants)
        case "adamw":
            return AdamW(betas=(constants.pop("beta1"), constants.pop("beta2")), **constants)
        case other:
            raise ValueError(f"unknown update rule {other!r}")


def run_of(header: Header) -> Run:
    """The run that a header describes. Raises LogError for one that this version does not know."""
    try:
        run = Run(
            seed=header.seed,
            directions=header.directions,
            dist=header.dist,
            mu=header.mu,
            factors=tuple(p.factor for p in header.parameters),
            lattice=None if header.quantum is None else Lattice(header.quantum),
            rule=_rule(header.rule),
            pool=None if header.pool is None else Pool(**header.pool),
        )
        if run.lattice is not None:
            check_integer(run.lattice.exponent, "the quantum's exponent", *EXPONENTS)
            run.lattice.nearest(run.mu)
    except (ArithmeticError, TypeError, ValueError, KeyError) as error:
        raise LogError(f"the log's header makes no run: {error}") from error
    if run.lattice is not None and (run.dist != "rademacher" or any(p.dtype != "float32" for p in header.parameters)):
        raise LogError("the log's header makes no run: on a lattice are float32 weights and rademacher directions")
    return run


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

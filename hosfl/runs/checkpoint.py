"""The files of a run's folder from which a run is resumed, and weights are rebuilt.

config.json                 the settings
base.safetensors            the client half of round 0
hosfl.log                   the rounds, from which the client half of every later round can be rebuilt
provenance.json             digests of settings, data and model, which a resumed run must share
lock                        locked by the process that runs it
id.json                     the run's id, in hexadecimal digits
epoch.json                  for methods without a log: how often the run was resumed
snapshot-*.safetensors      the server's state, every `snapshot_every` rounds
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from hosfl.files import read_small, sync_folder, write_atomically, write_json
from hosfl.probing.probe import trainable
from hosfl.protocol.header import Header, Parameter
from hosfl.protocol.provenance import new_id, read_id
from hosfl.protocol.rebuild import base_digest
from hosfl.protocol.rebuild import rebuild as rebuilt
from hosfl.protocol.records import LAST_EPOCH
from hosfl.protocol.replica import Replica
from hosfl.protocol.terms import Run, described
from hosfl.runs.config import Config
from hosfl.settings import Settings


def module_bytes(module: nn.Module) -> bytes:
    """Encode a module's state dict as safetensors; tied tensors are written once per name."""
    return save({k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()})


def save_module(module: nn.Module, path: Path) -> None:
    """Write `module_bytes` to a file."""
    write_atomically(path, module_bytes(module))


def save_config(config: Settings, folder: Path) -> None:
    """Write a run's settings."""
    write_json(folder / "config.json", asdict(config))


RUN_FILES = ("config.json", "hosfl.log", "summary.json", "metrics.jsonl")


def check_free(folder: Path) -> None:
    """Raises FileExistsError for a folder that holds a run, or files of one."""
    for name in (*RUN_FILES, *(path.name for path in folder.glob("snapshot-*.safetensors"))):
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder} holds another run ({name}): resume it, choose another folder or delete what is in it"
            )


def load_config(folder: Path) -> Config:
    """Read the settings of the run in a folder. Raises FileNotFoundError, or ValueError naming what is wrong."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path.name}")
    try:
        return Config(**json.loads(read_small(path)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a run's settings: {error}") from None


def save_id(id: bytes, folder: Path) -> None:
    """Write a new run's id."""
    write_json(folder / "id.json", id.hex())
    sync_folder(folder)


def load_id(folder: Path) -> bytes:
    """Read the id of the run in a folder. A run of an earlier version, without an id, gets a new one.

    Raises ValueError naming the file if it holds no id.
    """
    path = folder / "id.json"
    if not path.exists():
        save_id(new_id(), folder)
    try:
        return read_id(json.loads(read_small(path)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a run's id: {error}") from None


def next_epoch(folder: Path) -> int:
    """Begin the next epoch of the run in a folder, 1, 2, ..., and return it; it is on disk when this returns.

    It is for methods without a log: a log records the epochs itself. Raises ValueError naming the file if it holds no
    epoch.
    """
    path = folder / "epoch.json"
    try:
        last = json.loads(read_small(path)) if path.exists() else 0
        if type(last) is not int or not 0 <= last < LAST_EPOCH:
            raise ValueError(f"a whole number below {LAST_EPOCH} is needed")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a run's epoch: {error}") from None
    write_json(path, last + 1)
    sync_folder(folder)
    return last + 1


def make_header(run: Run, base: nn.Module, settings: dict[str, Any]) -> Header:
    """Make the log header of a run whose client half starts as `base`, already on its lattice."""
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
        rule=described(run.rule),
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
        blocks=tuple(asdict(block) for block in run.blocks),
    )


def rebuild(log: Path, base: Path, upto: int | None = None) -> tuple[dict[str, Tensor], Replica]:
    """Rebuild the client half of any round from a run's log and its initial weights, in one pass over the weights.

        run = Path("runs/own")
        tensors, replica = hosfl.rebuild(run / "hosfl.log", run / "base.safetensors", upto=50)

    Args:
        log: a run's hosfl.log.
        base: its base.safetensors.
        upto: how many rounds to apply; None: all that are committed.

    Returns all tensors of the base file by name, the trained ones as of that round, and the `Replica` that has them.
    `hosfl.protocol.rebuild` is the same without torch.

    Raises:
        LogError: the log is damaged, or of other base weights, or has fewer rounds.
        ValueError: the base file holds no weights.
        OSError: a file cannot be read.
    """
    return rebuilt(log, base, upto, load_file)

"""Kill a training process (SIGKILL), resume it, again and again until it ends: nothing is lost, torn or different.

    python tests/test_kill.py 200

Half of the kills come at random moments, half right before a change of a file: whatever lies between two changes that
follow each other at once is met as well. A process that has imported everything forks a child for every attempt, so
that an attempt costs no start of an interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hosfl import cli, commands
from hosfl.protocol.log import Log
from hosfl.protocol.records import EpochRecord, RoundRecord
from hosfl.runs import snapshot
from hosfl.runs.checkpoint import load_config, rebuild
from hosfl.runs.report import Evaluation

ROUNDS = 12
TRAIN = f"--rounds {ROUNDS} --clients 4 --sampled 2 --batch 8 --directions 2 --snapshot-every 3 --evaluate-every 2"
RULES = (
    "--rule normalized --digest-every 4",
    "--rule adamw --dtype bfloat16 --digest-every 3",
    "--rule adamw --directions-from pool --pool-size 8 --pool-rounds 5 --digest-every 5",
)
RATES = "--server-rate 0.06 --client-rate 0.01"
FILE_CHANGES = {"write", "truncate"}  # methods of a file
FOLDER_CHANGES = {"fsync", "mkdir", "rename", "replace", "unlink", "remove"}  # functions of os
IMPORTED_LATE = ("torch._dynamo", "sklearn.datasets", "sklearn.model_selection", "matplotlib.backends.backend_agg")


# --- one attempt, in a child --------------------------------------------------------------------------------------


def attempt(arguments: list[str], errors: Path, seconds: float | None = None, point: int = 0) -> tuple[int, int]:
    """`hosfl train` in a child that is killed after so many seconds, or kills itself before its point-th change of a
    file. Returns its exit code, -9 if it was killed, and the number of rounds that it said were done."""
    reads, writes = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reads)
        os._exit(_train(arguments, errors, writes, point))
    os.close(writes)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if seconds is not None and time.monotonic() - begin >= seconds:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    with open(reads, "rb") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(ended[1]), max(said, default=0)


def _train(arguments: list[str], errors: Path, acknowledge: int, point: int) -> int:
    out = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)

    @contextmanager
    def bar(title: str, rounds: int) -> Iterator[Any]:
        yield lambda done, *rest: os.write(acknowledge, bytes([done]))

    commands._bar = bar
    if point:
        sys.setprofile(_Fuse(point))
    try:
        return cli.main(["train", *arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush(), sys.stderr.flush()


class _Fuse:
    """A profiler that kills the process right before the n-th call that changes a file."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or not _changes(called):
            return
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def _changes(called: Any) -> bool:
    name, owner = called.__name__, getattr(called, "__self__", None)
    if name in FILE_CHANGES:
        return isinstance(owner, (io.FileIO, io.BufferedWriter, io.TextIOWrapper)) and owner.fileno() > 2
    return name == "serialize_file" or (name in FOLDER_CHANGES and isinstance(owner, ModuleType))


# --- what must hold -----------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One run in a folder, from nothing to its end."""

    folder: Path
    settings: list[str]
    log: bytes = b""  # what the log was when the last attempt had ended
    found: Counter[str] = field(default_factory=Counter)  # what the kills left behind

    def attempt(self, **how: Any) -> int:
        resume = (self.folder / "config.json").exists()
        where = ["--resume", str(self.folder)] if resume else [*self.settings, "--out", str(self.folder)]
        errors = self.folder.with_suffix(".errors")
        code, done = attempt(where, errors, **how)
        assert code in (0, -signal.SIGKILL), f"exit code {code}:\n{errors.read_text()}"
        self.found[f"{'resumed' if resume else 'started'}, {'killed' if code else 'ended'}"] += 1
        self.check_files(done)
        return code

    def check_files(self, done: int) -> None:
        """What an attempt leaves behind, however it ended: whole files, and every record that was ever committed."""
        path = self.folder / "hosfl.log"
        if path.exists():
            log = Log.read(path)
            self.found["torn log"] += bool(log.torn)
            content = path.read_bytes()[: log.nbytes]
            assert content.startswith(self.log), "committed records are gone"
            self.log = content
            assert len(log.rounds) >= done, f"{done} rounds were acknowledged, {len(log.rounds)} are in the log"
            self.found["without a round"] += not log.rounds
        else:
            assert not self.log
            assert not done
            self.found["without a log"] += 1
        for file in self.folder.glob("snapshot-*.safetensors"):
            assert snapshot.load(file).round % 3 == 0
        for file in self.folder.glob("*.safetensors"):
            load_file(file)
        if (self.folder / "config.json").exists():
            load_config(self.folder)
        if (self.folder / "summary.json").exists():
            json.loads((self.folder / "summary.json").read_text())
            # Written last: a folder with a summary is complete.
            for name in ("client.safetensors", "server.safetensors", "curves.png"):
                assert (self.folder / name).stat().st_size > 0
        self.found["with temporary files"] += any(self.folder.glob("*.tmp"))

    def outcome(self) -> dict[str, Any]:
        """What the run came to, once it has ended."""
        log = Log.read(self.folder / "hosfl.log")
        tensors, _ = rebuild(log.path, self.folder / "base.safetensors")
        client = load_file(self.folder / "client.safetensors")
        assert tensors.keys() == client.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), client[name].reshape(-1).view(torch.uint8)), name
        summary = json.loads((self.folder / "summary.json").read_text())
        assert summary["replicas"]["equal"]
        assert (summary["rounds"], summary["interrupted"], summary["failure"]) == (ROUNDS, False, None)
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        evaluations = [Evaluation.read(line)[0] for line in lines]
        assert not list(self.folder.glob("*.tmp"))
        self.found["epochs"] += sum(isinstance(r, EpochRecord) for r in log.records)
        self.found["void rounds"] += sum(isinstance(r, RoundRecord) for r in log.records) - ROUNDS
        return {
            "records": [(r.round, r.rate, r.participants, r.coefficients.tobytes()) for r in log.rounds],
            "client": (self.folder / "client.safetensors").read_bytes(),
            "server": (self.folder / "server.safetensors").read_bytes(),
            "digest": summary["replicas"]["digest"],
            "metrics": [(e.round, e.accuracy, e.loss) for e in evaluations],
        }


def kill(kills: int, seed: int, folder: Path) -> Counter[str]:
    """Kill so many attempts, over as many runs as that takes; every run must come to what it comes to undisturbed."""
    chance, found = random.Random(seed), Counter[str]()
    undisturbed: dict[str, dict[str, Any]] = {}
    longest: dict[str, float] = {}
    while found["kills"] < kills:
        rule = RULES[found["runs"] % len(RULES)]
        settings = f"{TRAIN} {RATES} {rule}".split()
        if rule not in undisturbed:
            begin, calm = time.monotonic(), Trial(folder / f"undisturbed-{len(undisturbed)}", settings)
            assert calm.attempt() == 0
            longest[rule], undisturbed[rule] = time.monotonic() - begin, calm.outcome()
        trial = Trial(folder / f"run-{found['runs']}", settings)
        ended = False
        while not ended:
            how: dict[str, Any] = {}
            if found["kills"] < kills:
                # Every third early, while files are being created.
                early, at_point = chance.random() < 1 / 3, chance.random() < 0.5
                moment = chance.uniform(0, longest[rule] * (0.3 if early else 1.1))
                how = {"point": chance.randint(1, 25 if early else 120)} if at_point else {"seconds": moment}
            ended = trial.attempt(**how) == 0
            found["kills"] += not ended
            found["kills at points"] += not ended and "point" in how
        come_to = trial.outcome()
        for what, expected in undisturbed[rule].items():
            assert come_to[what] == expected, f"{what} differ from the undisturbed run's: {trial.folder}, {settings}"
        found += trial.found
        found["runs"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = kill(options.kills, options.seed, Path(folder))
    print(json.dumps(found | {"seconds": round(time.monotonic() - begin)}))


def run(*arguments: str) -> Counter[str]:
    """This file in a process of its own: one that forks should have no threads."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Counter(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_kills() -> None:
    found = run("10")
    assert found["kills"] == 10
    assert 0 < found["kills at points"] < 10


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(1800)
def test_two_hundred_kills() -> None:
    found = run("200")
    assert found["kills"] == 200
    assert min(found[left] for left in ("without a log", "without a round", "with temporary files", "void rounds")) > 0


if __name__ == "__main__":
    main()

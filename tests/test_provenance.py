"""What runs were made of: whatever is put together from two of them is refused. And a failure is a failure."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hosfl.cli import main
from hosfl.files import FolderLock, RunFolderError
from hosfl.protocol.header import LogError
from hosfl.protocol.log import CHAIN, FRAME, Log
from hosfl.protocol.provenance import ProvenanceError
from hosfl.protocol.records import RoundRecord, encode_record
from hosfl.protocol.terms import Diverged
from hosfl.runs.checkpoint import load_config
from hosfl.runs.config import Config, with_shared
from hosfl.runs.trainer import train

ROUNDS = 9
QUICK = {"rounds": ROUNDS, "clients": 4, "sampled": 2, "batch": 8, "directions": 2, "snapshot_every": 3}
METHODS = {
    "pool": {"pool_size": 8, "digest_every": 4},
    "adamw": {"rule": "adamw", "dtype": "bfloat16", "directions_from": "fresh"},
    "first-order": {"method": "first-order"},
    "splitfed": {"method": "splitfed", "local_steps": 2},
    "frozen": {"method": "frozen"},
}
RATES = {"server_rate": 0.06, "client_rate": 0.01}


class Killed(BaseException):
    """As SIGKILL: nothing is written after it."""


def config(kind, **settings):
    return Config(**with_shared(METHODS[kind] | settings, QUICK | RATES))


def killing(at):
    def progress(done, *rest):
        if done == at:
            raise Killed

    return progress


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By kind: a whole run, another one of seed 1, and one that was killed after round 7."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in METHODS:
        train(config(kind), folder / kind / "whole")
        train(config(kind, seed=1), folder / kind / "other")
        with pytest.raises(Killed):
            train(config(kind), folder / kind / "killed", killing(7))
    return folder


@pytest.fixture
def killed(request, runs, tmp_path):
    """A copy of the killed run of a kind."""

    def copy(kind):
        shutil.copytree(runs / kind / "killed", tmp_path / "run")
        return tmp_path / "run"

    return copy


def same_bits(one, other):
    for half in ("client.safetensors", "server.safetensors"):
        a, b = load_file(one / half), load_file(other / half)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a if a[name].dim())


def edit(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("kind", METHODS)
def test_edited_settings_are_refused_by_name(runs, killed, kind):
    run = killed(kind)
    edit(run, seed=1)
    with pytest.raises(ProvenanceError, match=r"provenance\.json is of another run: seed was 0, is 1"):
        train(load_config(run), run, resume=True)
    edit(run, seed=0, keep=1, evaluate_every=2, snapshot_every=4)  # the bits do not depend on these
    train(load_config(run), run, resume=True)
    same_bits(run, runs / kind / "whole")


@pytest.mark.parametrize("kind", METHODS)
def test_snapshots_of_another_run_are_refused(runs, killed, kind):
    run, other = killed(kind), runs / kind / "other"
    shutil.copy(other / "snapshot-00000006.safetensors", run)
    with pytest.raises(ProvenanceError, match=r"snapshot-00000006\.safetensors is of another run: seed was 1, is 0"):
        train(load_config(run), run, resume=True)


@pytest.mark.parametrize("kind", METHODS)
def test_metrics_of_another_run_are_refused(runs, killed, kind):
    run = killed(kind)
    shutil.copy(runs / kind / "other" / "metrics.jsonl", run)
    with pytest.raises(ProvenanceError, match=r"metrics\.jsonl has evaluations of another run"):
        train(load_config(run), run, resume=True)


def test_a_log_of_another_run_is_refused_by_what_differs(runs, killed):
    run = killed("pool")
    shutil.copy(runs / "pool" / "other" / "hosfl.log", run)
    with pytest.raises(LogError, match=r"is the log of another run: seed was 1, is 0"):
        train(load_config(run), run, resume=True)


@pytest.mark.timeout(60)  # it would be waited for
@pytest.mark.parametrize(
    "name", ["config.json", "provenance.json", "id.json", "lock", "metrics.jsonl", "base.safetensors"]
)
def test_a_pipe_in_place_of_a_file_is_named(killed, name):
    run = killed("pool")
    settings = load_config(run)
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(OSError, match=f"{name}'$"):
        train(settings, run, resume=True)


@pytest.mark.timeout(60)
def test_a_snapshot_that_is_a_pipe_is_passed_over(runs, killed):
    run = killed("pool")
    (run / "snapshot-00000006.safetensors").unlink()
    os.mkfifo(run / "snapshot-00000006.safetensors")
    with pytest.warns(UserWarning, match=r"snapshot-00000006.*no regular file"):
        train(load_config(run), run, resume=True)
    same_bits(run, runs / "pool" / "whole")


def test_a_log_that_is_gone_is_asked_for(killed):
    run = killed("pool")
    (run / "hosfl.log").unlink()
    with pytest.raises(LogError, match="put it back"):
        train(load_config(run), run, resume=True)


@pytest.mark.parametrize("left", [7, 6, 5, 3, 2])
def test_a_log_that_lost_its_end_falls_back_to_a_snapshot_that_it_covers(runs, killed, left):
    run = killed("pool")
    log = Log.read(run / "hosfl.log")
    (run / "hosfl.log").write_bytes((run / "hosfl.log").read_bytes()[: len_of(log, left)])
    kept = len(Log.read(run / "hosfl.log").rounds)
    assert kept == left <= len(log.rounds)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(load_config(run), run, resume=True)
    lost = [str(w.message) for w in caught if "lost its end" in str(w.message)]
    assert bool(lost) == (kept < 6)
    assert (run / "snapshot-00000006.safetensors.void").exists() == (kept < 6)
    same_bits(run, runs / "pool" / "whole")


def len_of(log, rounds):
    """Bytes of its first so many rounds, and some of the next one."""
    sizes = [FRAME.size + CHAIN + len(encode_record(record)) for record in log.records]
    end = log.nbytes - sum(sizes)
    for size, record in zip(sizes, log.records, strict=True):
        if isinstance(record, RoundRecord) and record.round == rounds:
            return end + 3
        end += size
    return end


@pytest.mark.parametrize("how", ["gone", "replaced", "cut", "overwritten", "folder"])
def test_a_log_that_changes_while_the_run_goes_on_ends_it(runs, tmp_path, how):
    out, kind = tmp_path / "run", "pool"

    def change(done, *rest):
        log = out / "hosfl.log"
        if done != 4:
            return
        if how == "gone":
            log.unlink()
        elif how == "replaced":
            shutil.copy(log, tmp_path / "copy")
            os.replace(tmp_path / "copy", log)
        elif how == "cut":
            os.truncate(log, log.stat().st_size - 5)
        elif how == "overwritten":
            with log.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last[0] ^ 1]))
        else:
            out.rename(tmp_path / "elsewhere")

    if how == "overwritten":
        with pytest.raises(LogError, match="overwritten"), Log.open(tmp_path_log(runs, tmp_path)) as log:
            data = bytearray(log.path.read_bytes())
            data[-1] ^= 1
            log.path.write_bytes(data)
            log.check_file()
        return
    match = {"gone": "is gone", "replaced": "was replaced", "cut": "something else changed it", "folder": "removed or"}
    with pytest.raises((LogError, RunFolderError), match=match[how]):
        train(config(kind), out, change)
    assert not (out / "snapshot-00000006.safetensors").exists()


def tmp_path_log(runs, folder):
    return Path(shutil.copy(runs / "pool" / "killed" / "hosfl.log", folder / "hosfl.log"))


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_locks_its_folder(killed, kind):
    run = killed(kind)
    lock = FolderLock(run)
    with pytest.raises(RunFolderError, match="another process is at work"):
        train(load_config(run), run, resume=True)
    lock.close()
    train(load_config(run), run, resume=True)


def test_data_may_lie_elsewhere_and_must_be_the_same(tmp_path, monkeypatch):
    from hosfl.tasks.data import Dataset
    from hosfl.tasks.digits import digits_task

    def task(config):
        found = digits_task(Config())
        shift = float(Path(config.data).read_text())
        parts = {name: getattr(found, name) for name in ("train", "validation", "test")}
        return replace(found, **{name: Dataset(p.inputs + shift, p.labels) for name, p in parts.items()})

    monkeypatch.setattr("hosfl.tasks.digits.digits_task", task)
    for name, shift in (("here", "0"), ("moved", "0"), ("changed", "1")):
        (tmp_path / name).write_text(shift)
    made = config("first-order", data=str(tmp_path / "here"))
    with pytest.raises(Killed):
        train(made, tmp_path / "run", killing(4))
    (tmp_path / "here").write_text("1")
    with pytest.raises(ProvenanceError, match="the data were others"):
        train(made, tmp_path / "run", resume=True)
    assert main(["train", "--resume", str(tmp_path / "run"), "--data", str(tmp_path / "moved")]) == 0
    assert load_config(tmp_path / "run").data == str(tmp_path / "moved")
    made_of = json.loads((tmp_path / "run" / "summary.json").read_text())["provenance"]
    assert made_of == json.loads((tmp_path / "run" / "provenance.json").read_text())


def test_a_loss_that_is_not_finite_is_a_failure(tmp_path, capsys):
    arguments = "train --rounds 20 --clients 4 --sampled 2 --batch 8 --server-rate 1e30 --evaluate-every 5"
    assert main([*arguments.split(), "--out", str(tmp_path / "run")]) == 1
    assert "hosfl: the run diverged: the loss after round 5 is not finite" in capsys.readouterr().err
    for name in ("summary.json", "config.json", "provenance.json"):
        found = json.loads((tmp_path / "run" / name).read_text(), parse_constant=pytest.fail)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "not finite" in summary["failure"]
    assert summary["loss"] is None
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert found[0]["training_loss"] is None
    with pytest.raises(Diverged):
        train(config("pool", server_rate=1e30))


def test_a_start_that_fails_leaves_the_folder_free(tmp_path, monkeypatch):
    from hosfl.runs import trainer

    def fails(*args):
        raise RuntimeError("no such operation")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Federation, "round", fails)
        with pytest.raises(RuntimeError, match="no such operation"):
            train(config("pool"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"too few|fewer clients|are needed"):
        train(config("pool", clients=4000, sampled=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(config("pool"), tmp_path / "run")


def test_a_start_that_finds_another_run_at_the_last_moment_leaves_it_alone(tmp_path, monkeypatch):
    from hosfl.runs import trainer

    made = trainer.assemble

    def slowly(config, **more):  # meanwhile another process runs there, and ends
        monkeypatch.setattr(trainer, "assemble", made)
        train(config, tmp_path / "run")
        return made(config, **more)

    monkeypatch.setattr(trainer, "assemble", slowly)
    with pytest.raises(FileExistsError, match="another run"):
        train(config("pool"), tmp_path / "run")
    assert len(Log.read(tmp_path / "run" / "hosfl.log").rounds) == ROUNDS
    assert (tmp_path / "run" / "summary.json").exists()


def test_odd_command_lines_get_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["train", "--out", ""],
        ["train", "--resume", ""],
        ["compare", "--out", "c", "--rounds", "3", "--seeds", "0", "0"],
        ["compare", "--out", "c", "--rounds", "3", "--methods", "ho", "ho"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "empty" in (said := capsys.readouterr().err) or "twice" in said
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_is_no_error(runs):
    command = [sys.executable, "-m", "hosfl.cli", "log", "show", str(runs / "pool" / "whole" / "hosfl.log")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


# --- histories ------------------------------------------------------------------------------------------------------


def edited(run, other, chance):
    name, value = chance.choice([("seed", 1), ("batch", 7), ("server_rate", 0.05), ("evaluate_on", "validation")])
    edit(run, **{name: value})
    return name


def harmless(run, other, chance):
    edit(run, **dict([chance.choice([("keep", 2), ("evaluate_every", 3), ("snapshot_every", 2)])]))


def swapped(run, other, chance):
    names = sorted(p.name for p in other.iterdir() if p.name.startswith(("snapshot", "hosfl", "metrics", "provenance")))
    name = chance.choice(names)
    shutil.copy(other / name, run / name)
    return name


def damaged(run, other, chance):
    found = sorted(run.glob("snapshot-*.safetensors"))
    if found:
        os.truncate(found[-1], found[-1].stat().st_size // 2)


def cut(run, other, chance):
    log = run / "hosfl.log"
    if log.exists():
        os.truncate(log, max(log.stat().st_size - chance.randrange(1, 150), 0))
        return "hosfl.log"


def removed(run, other, chance):
    found = sorted(p for p in run.iterdir() if p.name.startswith(("snapshot", "hosfl.log", "base", "provenance")))
    if found:
        path = chance.choice(found)
        path.unlink()
        return path.name


CHANGES = (edited, harmless, swapped, damaged, cut, removed)


def history(number, runs, folder):
    """A run that is killed, changed and resumed until it ends or is refused. What it came to."""
    chance = random.Random(number)
    kind = chance.choice([*METHODS])
    run, changed = folder / str(number), []
    for attempt in itertools.count():
        resume = attempt > 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given = load_config(run) if resume else config(kind)
                train(given, run, killing(chance.randrange(1, 12)), resume=resume)
        except Killed:
            if attempt < 3 and chance.random() < 0.7:
                changed.append(chance.choice(CHANGES)(run, runs / kind / "other", chance))
            continue
        except (ValueError, OSError) as error:
            names = [name for name in changed if name and (name in str(error) or of_the_run(name, str(error)))]
            return "refused" if names else pytest.fail(f"{number}, {kind}, {changed}: {error}")
        same_bits(run, runs / kind / "whole")
        return "changed" if changed else "undisturbed"


def of_the_run(change, error):
    """Of two files that do not belong together either may be named."""
    files = ("hosfl.log", "snapshot-", "provenance.json", "metrics.jsonl")
    return change.startswith(files) and any(file in error for file in files)


@pytest.mark.parametrize(
    "first", [0, pytest.param(25, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_random_histories_end_in_the_same_bits_or_name_the_change(runs, tmp_path, first):
    count = {0: 25, 25: 75, 100: 100}[first]
    found = [history(number, runs, tmp_path) for number in range(first, first + count)]
    assert {"refused", "changed"} <= set(found), found

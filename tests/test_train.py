"""`hosfl train` and `hosfl compare` as a user runs them."""

import errno
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import REPLAYED

from hosfl import Config, LatticeError, Log, rebuild, train
from hosfl.cli import main, parser
from hosfl.commands import resume_command
from hosfl.methods import METHODS
from hosfl.protocol.records import EpochRecord
from hosfl.protocol.terms import Diverged
from hosfl.runs import trainer
from hosfl.runs.assemble import assemble
from hosfl.runs.checkpoint import load_id, next_epoch
from hosfl.runs.config import with_shared
from hosfl.runs.trainer import restore, save_snapshot
from hosfl.studies import compare as comparison
from hosfl.tasks import make_task

CLIENT_RATE = {"splitfed": 0.2, "hosl": 0.2, "mu-splitfed": 0.4}  # where none is tuned
QUICK = {"rounds": 12, "evaluate_every": 5, "batch": 16, "directions": 2}


@pytest.mark.learning
@pytest.mark.parametrize("method", METHODS)
def test_a_run_and_its_files(tmp_path, method, seed, below):
    seen = []
    rates = {"server_rate": 0.03, "client_rate": CLIENT_RATE.get(method)}
    config = Config(**with_shared({"method": method, "seed": seed, **rates}, {**QUICK, "directions": 10}))
    summary = train(config, tmp_path / "run", lambda *state: seen.append(state))
    assert [s[0] for s in seen] == list(range(1, 13))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 5, 10, 12]
    below(lines[-1]["loss"] / lines[0]["loss"], 1)
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved["accuracy"] == summary.accuracy == lines[-1]["accuracy"]
    assert saved["config"]["method"] == method
    assert saved["replicas"]["equal"] is True
    assert saved["replicas"]["clients"] == 11
    assert saved["machine"]["torch"] == version("torch")
    assert saved["peak_memory"]["resident"] > 1e6
    assert saved["interrupted"] is False
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = make_task(Config()).halves(0)
    model.client.load_state_dict(load_file(tmp_path / "run" / "client.safetensors"))
    model.server.load_state_dict(load_file(tmp_path / "run" / "server.safetensors"))


def test_bytes_are_those_of_the_protocol():
    config = {"rounds": 10, "batch": 4, "directions": 3, "clients": 4, "sampled": 4}
    client = make_task(Config()).halves(0).client
    d = 4 * sum(p.numel() for p in client.parameters() if p.requires_grad)
    cut = client(torch.zeros(1, 1, 8, 8)).numel() * 4
    visits = 10 * 4
    ho = train(Config(method="ho", **config)).bytes
    assert ho["cut up"] == ho["multiplier down"] == visits * 4 * cut
    assert ho["labels up"] == visits * 4 * 4
    assert ho["scalars up"] == visits * 3 * 4
    assert ho["scalars down"] == (visits - 4) * 3 * 4  # the first round has no record to send
    first = train(Config(**with_shared({"method": "first-order"}, config))).bytes
    assert first["gradient up"] == visits * d
    assert first["weights down"] == (visits - 4) * d
    frozen = train(Config(**with_shared({"method": "frozen"}, config))).bytes
    assert set(frozen) == {"framing up", "cut up", "labels up", "framing down"}
    assert frozen["framing down"] == visits * (20 + 16 + 4)  # an invitation, the run that it is of, and its length


def test_a_seed_is_a_run():
    one, two = (train(Config(**QUICK, seed=3)) for _ in range(2))
    other = train(Config(**QUICK, seed=4))
    assert one.replicas.digest == two.replicas.digest != other.replicas.digest
    assert (one.loss, one.accuracy) == (two.loss, two.accuracy)


RATES = {"server_rate": 0.03, "client_rate": 0.01}
KINDS = {
    "gaussian": {"dist": "gaussian"},
    "rms": {"direction_scale": "rms", "aggregation": "median"},
    "momentum": {"rule": "momentum", "aggregation": "trimmed"},
    "adamw": {"rule": "adamw", "dist": "gaussian", "direction_scale": "rms", "clip": 1.0},
    "adamw bfloat16": {"rule": "adamw", "dtype": "bfloat16"},
    "pool": {"rule": "adamw", "directions_from": "pool", "pool_size": 6, "pool_rounds": 5, "direction_scale": "rms"},
    "pool bfloat16": {"rule": "momentum", "directions_from": "pool", "pool_size": 6, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_keeps_the_clients_equal_and_its_log_is_the_half(tmp_path, kind):
    summary = train(Config(**QUICK, **RATES, **KINDS[kind], digest_every=4), tmp_path)
    assert summary.replicas.equal
    assert summary.refused == []
    tensors, replica = rebuild(tmp_path / "hosfl.log", tmp_path / "base.safetensors")
    saved = load_file(tmp_path / "client.safetensors")
    assert replica.applied == 12
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)
    base = load_file(tmp_path / "base.safetensors")
    trained = Log.read(tmp_path / "hosfl.log").header.parameters
    assert {p.name for p in trained} == {name for name in saved if not torch.equal(base[name], saved[name])}
    if KINDS[kind].get("direction_scale") == "rms":
        assert len({p.factor for p in trained}) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("estimator", ["two-sided", "forward", "backward"])
def test_other_estimators_replay(estimator, dtype):
    summary = train(Config(estimator=estimator, dtype=dtype, **QUICK))
    paper = train(Config(dtype=dtype, **QUICK))
    assert summary.replicas.equal
    assert summary.replicas.digest != paper.replicas.digest
    assert summary.loss == pytest.approx(paper.loss, rel=0.1)


def test_methods_share_data_and_batches():
    # With a client rate of zero (as good as), all three methods are the frozen client.
    rates = {"client_rate": 1e-30, "server_rate": 0.1, "server_decay": 0.0}
    losses = {m: train(Config(**with_shared({"method": m}, rates | QUICK))).loss for m in ("first-order", "frozen")}
    assert losses["first-order"] == pytest.approx(losses["frozen"], rel=1e-5)


def test_a_diverging_run_says_so_and_keeps_what_was_done(tmp_path):
    with pytest.raises(LatticeError, match="rate"):
        train(Config(client_rate=1e6, **QUICK), tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "rate" in saved["failure"]
    assert saved["rounds"] < 12
    assert main(["train", "--client-rate", "1e6", "--rounds", "5"]) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rounds": 2**32}, "rounds must be at most 4294967295, got 4294967296"),
        ({"sampled": 11}, "cannot sample 11 of 10"),
        ({"mu": 0.0}, "mu must be positive"),
        ({"mu": math.inf}, "mu must be positive and finite"),
        ({"seed": -1}, "seed must be"),
        ({"method": "sgd"}, "ho, first-order, frozen"),
        ({"dist": "normal"}, "rademacher, gaussian"),
        ({"clients": 500, "sampled": 1}, "fewer clients"),
    ],
)
def test_settings_that_cannot_work(setting, message):
    with pytest.raises(ValueError, match=message):
        train(Config(**setting))


def test_command_line(tmp_path, capsys):
    arguments = ["--rounds", "3", "--batch", "8", "--directions", "1"]
    assert main(["train", *arguments, "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr()
    assert "test accuracy" in shown.out
    assert "ho  3/3  loss " in shown.err  # off a terminal progress is lines, one per evaluation
    with pytest.raises(SystemExit, match="2"):
        main(["train", *arguments, "--out", str(tmp_path / "a")])
    assert "holds another run" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--sampled", "11"])
    assert "cannot sample 11 of 10" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--device", "abacus"])
    assert "abacus" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "perturbed forward passes" in capsys.readouterr().out


def test_compare(tmp_path, capsys):
    assert main(["compare", "--rounds", "8", "--batch", "16", "--seeds", "0", "1", "--out", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    for words in (
        "accuracy gap recovered",
        "bytes, scalars up",
        "samples, server backward",
        "client answer, ms",
        "per client and round",
        "first-order (2 seeds)",
    ):
        assert words in out
    table = json.loads((tmp_path / "c" / "table.json").read_text())
    assert table["methods"]["first-order"]["accuracy_gap_recovered"] == 1
    assert table["methods"]["frozen"]["loss_gap_recovered"] == 0
    assert table["methods"]["ho"]["seeds"] == [0, 1]
    assert (tmp_path / "c" / "curves.png").exists()
    assert (tmp_path / "c" / "ho-1" / "summary.json").exists()


def test_ctrl_c_ends_after_the_round_and_saves(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "hosfl.cli", "train", "--rounds", "100000", "--evaluate-every", "5", "--out", out]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    metrics, deadline = out / "metrics.jsonl", time.time() + 120
    while time.time() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    saved = json.loads((out / "summary.json").read_text())
    assert saved["interrupted"] is True
    assert 10 <= saved["rounds"] < 100000
    assert json.loads(metrics.read_text().splitlines()[-1])["round"] == saved["rounds"]
    assert saved["replicas"]["equal"] is True
    assert f"after {saved['rounds']} rounds".encode() in output
    assert errors.decode().splitlines()[-1] == f"interrupted; to resume: hosfl train --resume {out}"
    assert b"Traceback" not in errors


def test_ctrl_c_while_the_command_line_is_imported(tmp_path):
    """At every module that it imports, from the first on: one line, and no traceback."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == os.environ['AT']:\n"
        "            sys.meta_path.remove(Interrupting)\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Interrupting)\n"
    )
    for module in ("hosfl.interrupts", "hosfl.cli", "argparse", "hosfl.settings"):
        done = subprocess.run(
            [sys.executable, "-m", "hosfl", "train", "--rounds", "1"],
            env={**os.environ, "AT": module, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "hosfl: interrupted\n"), module


@pytest.fixture
def handler():
    """A command that Ctrl-C ends lets no second one through; here more commands follow."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_options_are_read(handler, monkeypatch, capsys):
    monkeypatch.setattr("hosfl.cli.parser", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "hosfl: interrupted\n"


def test_ctrl_c_while_torch_is_imported(handler, monkeypatch, capsys):
    """What is imported is imported whole, and nothing begins: nothing is lost."""
    imported = []

    def command(name):
        signal.raise_signal(signal.SIGINT)
        imported.append(name)
        return pytest.fail

    monkeypatch.setattr("hosfl.cli._command", command)
    assert main(["train"]) == 130
    assert imported == ["train"]
    assert capsys.readouterr().err == "hosfl: interrupted\n"


@pytest.mark.parametrize(("words", "lost"), [(["train"], True), (["status", "DIR", "--watch"], False)])
def test_ctrl_c_in_a_command(handler, monkeypatch, capsys, words, lost):
    """One that does not answer it with what it has."""
    monkeypatch.setattr("hosfl.cli._command", lambda name: interrupt)
    assert main(words) == 130
    more = "; what came after the last snapshot or result is lost" if lost else ""
    assert capsys.readouterr().err == f"hosfl: interrupted{more}\n"


def test_a_run_that_fails_leaves_the_table_of_those_before_it(tmp_path, capsys, caplog, monkeypatch):
    def train(config, *args, original=trainer.train):
        if config.seed == 5:
            raise Diverged("far away")
        return original(config, *args)

    monkeypatch.setattr(comparison, "train", train)
    words = ["compare", "--rounds", "2", "--batch", "8", "--methods", "frozen", "--seeds"]
    assert main([*words, "3", "4", "5", "6", "--out", str(tmp_path / "c")]) == 1
    assert "the run diverged: far away" in capsys.readouterr().err
    assert re.search(r"frozen-5 ended in an error; .*table.json has the 2 runs before it", caplog.text)
    table = json.loads((tmp_path / "c" / "table.json").read_text())
    assert (table["interrupted"], table["methods"]["frozen"]["seeds"]) == (True, [3, 4])
    assert main([*words, "5", "--out", str(tmp_path / "d")]) == 1  # it is the first
    assert not (tmp_path / "d" / "table.json").exists()


@pytest.mark.parametrize(("place", "done"), [("assemble", 0), ("evaluate", 0), ("check_learnt", 1)])
def test_ctrl_c_ends_a_comparison(tmp_path, capsys, monkeypatch, place, done):
    """Before its first run's first round; and after its last one, when that run counts and no other begins."""
    original = getattr(trainer, place)

    def interrupting(*args, **more):
        monkeypatch.setattr(trainer, place, original)
        signal.raise_signal(signal.SIGINT)
        return original(*args, **more)

    monkeypatch.setattr(trainer, place, interrupting)
    out = tmp_path / "c"
    assert main(["compare", "--rounds", "2", "--batch", "8", "--seeds", "0", "--out", str(out)]) == 130
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith(f"interrupted after {done} of 3 runs; ")
    assert ("test accuracy" in shown.out) == bool(done)
    assert json.loads((out / "table.json").read_text())["interrupted"]
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--rounds", "2", "--seeds", "0", "--out", str(out)])
    assert f"{out} holds a comparison already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--rounds", "0"], "hosfl: rounds must be at least 1, got 0"),
        (["train", "--out", "file", "--rounds", "1"], "hosfl: file is a file, and a folder is needed: name another"),
        (
            ["train", "--rounds", "many"],
            "hosfl train: argument --rounds: invalid int value: 'many'; see hosfl train --help",
        ),
        (["train", "--no-such"], "hosfl train: unrecognized arguments: --no-such; see hosfl train --help"),
        (["log", "show", "a", "b"], "hosfl log show: unrecognized arguments: b; see hosfl log show --help"),
        (["log", "show", "nowhere"], "hosfl: nowhere: No such file or directory"),
        (["study", "nowhere.yaml", "--out", "x"], "hosfl: nowhere.yaml: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    assert (status, capsys.readouterr().err) == (2, says + "\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_memory_is_said_in_one_line(monkeypatch, capsys):
    def read(path):
        raise MemoryError

    monkeypatch.setattr(Log, "read", read)
    assert main(["log", "verify", "some.log"]) == 1
    assert capsys.readouterr().err.startswith("hosfl: there is not enough memory: ")


@pytest.mark.parametrize("name", ["base.safetensors", "config.json", "hosfl.log", "metrics.jsonl"])
def test_a_disk_that_fails_is_said_with_the_file(name, tmp_path, monkeypatch, capsys):
    """The system's error of a sync names none. And all that a resumed run reads is synced."""
    sync, path = os.fsync, tmp_path / "run" / name

    def fails(descriptor):
        if any(p.exists() and os.path.samestat(p.stat(), os.fstat(descriptor)) for p in (path, Path(f"{path}.tmp"))):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    small = ["--rounds", "1", "--clients", "1", "--sampled", "1", "--batch", "4", "--directions", "1"]
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["train", *small, "--out", str(path.parent)]))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hosfl: {path}")
    assert said.endswith(": No space left on device\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("told", ["\x1b[2J\x1b]0;mine\x07\r\u202eof\tit", "x" * 100_000], ids=["escapes", "long"])
def test_what_an_error_quotes_does_nothing_to_a_terminal(monkeypatch, capsys, told):
    """It may be what a server or a file says."""

    def command(options):
        warnings.warn(told, stacklevel=1)
        raise ValueError(told)

    monkeypatch.setattr("hosfl.cli._command", lambda name: command)
    with pytest.raises(SystemExit):
        main(["status", "run"])
    warned, said, rest = capsys.readouterr().err.split("\n")
    assert warned == said
    assert said.startswith("hosfl: ")
    assert said.isprintable()
    assert len(said) < 3000
    assert not rest


class Killed(BaseException):
    """What ends a run in the middle, as a kill would."""


def stop(at, how):
    def progress(done, *_):
        if done == at:
            how()

    return progress


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)


def kill():
    raise Killed


def metrics(folder):
    """Without what a resumed run moves and waits more: its clients start from their base."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("bytes", "moved", "seconds")} for line in lines]


RESUMED = {
    "ho": {},
    "adamw": KINDS["adamw"],
    "pool": {**KINDS["pool"], "pool_rounds": 7},
    "pool bfloat16": KINDS["pool bfloat16"],
    "first-order": {"method": "first-order", "rule": "momentum"},
    "splitfed": {"method": "splitfed", "rule": "adamw", "local_steps": 2},
    "hosl": {"method": "hosl"},
    "mu-splitfed": {"method": "mu-splitfed", "local_steps": 2},
    "frozen": {"method": "frozen"},
    "several cuts in a pass": {"server_batch": 256},
}


@pytest.fixture(scope="module", params=RESUMED)
def whole(request, tmp_path_factory):
    """A run that never stopped: its settings, summary and folder."""
    shared = QUICK | RATES | {"rounds": 15, "snapshot_every": 4, "digest_every": 6}
    config = Config(**with_shared(RESUMED[request.param], shared))
    folder = tmp_path_factory.mktemp("whole")
    return config, train(config, folder), folder


def same_files(one, other, *names):
    for name in ("client.safetensors", "server.safetensors", "base.safetensors", *names):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics(one) == metrics(other)


def test_a_run_stopped_at_a_snapshot_and_resumed_is_the_run_that_never_stopped(tmp_path, whole):
    config, expected, folder = whole
    assert train(config, tmp_path / "run", stop(10, interrupt)).interrupted
    seen = []
    summary = train(config, tmp_path / "run", lambda *state: seen.append(state[0]), resume=True)
    assert seen == [11, 12, 13, 14, 15]
    assert (summary.rounds, summary.interrupted, summary.loss) == (15, False, expected.loss)
    assert summary.replicas == expected.replicas
    assert summary.passes == expected.passes
    same_files(tmp_path / "run", folder)
    if config.method in REPLAYED:  # no round is void, and a new epoch begins
        logs = [Log.read(of / "hosfl.log") for of in (tmp_path / "run", folder)]
        one, other = ([replace(r, epoch=0, coefficients=r.coefficients.tolist()) for r in log.rounds] for log in logs)
        assert one == other
        assert (logs[0].epochs, logs[1].epochs) == ([(1, 10)], [])
    if config.rule == "normalized" and config.method == "ho":  # a finished run has nothing left to do
        again = train(config, tmp_path / "run", resume=True)
        assert (again.rounds, again.loss) == (15, expected.loss)
        same_files(tmp_path / "run", folder)


def test_a_run_killed_between_snapshots_voids_what_came_after_the_last(tmp_path, whole):
    config, expected, folder = whole
    run = tmp_path / "run"
    for at in (3, 11):  # before the first snapshot, and between two
        with pytest.raises(Killed):
            train(config, run, stop(at, kill), resume=run.exists())
    assert train(config, run, resume=True).loss == expected.loss
    same_files(run, folder)
    if config.method not in REPLAYED:
        return
    log = Log.read(run / "hosfl.log")
    assert [r for r in log.records if isinstance(r, EpochRecord)] == [EpochRecord(1, 0), EpochRecord(2, 8)]
    assert [r.epoch for r in log.rounds] == [1] * 8 + [2] * 7
    tensors, _ = rebuild(run / "hosfl.log", run / "base.safetensors")
    saved = load_file(run / "client.safetensors")
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)


@pytest.mark.parametrize("method", ["first-order", "splitfed"])
def test_clients_that_live_on_follow_every_start_of_the_server(tmp_path, method):
    """Weights that travel whole, and no round is lost: before the first snapshot, and from one snapshot twice."""
    config = Config(method=method, clients=3, sampled=2, rounds=8, batch=4, server_rate=0.03, client_rate=0.2)
    never_stopped, clients = assemble(config)[0], {}
    for round in range(8):
        never_stopped.round(round)
    for start, begin, end in [(0, 0, 5), (1, 0, 3), (2, 0, 4), (3, 4, 7), (4, 4, 6), (5, 4, 8)]:
        federation, _ = assemble(config)
        federation.clients = clients
        assert (restore(federation, tmp_path) if start else 0) == begin
        for round in range(begin, end):
            federation.round(round)
            assert federation.took_part == federation.asked
            if start == 2 and round == 3:
                save_snapshot(federation, tmp_path, 4)
    for (name, one), other in zip(
        never_stopped.server.state()[0].items(), federation.server.state()[0].values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_folder_s_id(tmp_path):
    first = load_id(tmp_path)  # of a run before there were any
    assert len(first) == 8
    assert load_id(tmp_path) == first
    for damage in ("", "{", "[" * 100_000, "7", '"00"', json.dumps("g" * 16)):
        (tmp_path / "id.json").write_text(damage)
        with pytest.raises(ValueError, match=r"id\.json is not a run's id"):
            load_id(tmp_path)


@pytest.mark.parametrize("damage", ["", "1.5", "true", "-1", "65535", '{"epoch": 1}', "[" * 100_000])
def test_an_epoch_that_cannot_be_one_is_named(tmp_path, damage):
    assert [next_epoch(tmp_path) for _ in range(3)] == [1, 2, 3]
    (tmp_path / "epoch.json").write_text(damage)
    with pytest.raises(ValueError, match=r"epoch\.json is not a run's epoch"):
        next_epoch(tmp_path)


def test_a_step_that_leads_off_the_lattice_is_said_to(tmp_path, capsys):
    assert "lower mu" in fails(capsys, 2, "train", "--mu", "1e30", "--out", tmp_path / "run")
    assert not any(tmp_path.glob("run/*"))


def test_resuming_needs_a_run_and_its_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        train(Config(**QUICK), tmp_path, resume=True)
    train(Config(**QUICK), tmp_path / "run")
    with pytest.raises(ValueError, match="not the settings"):
        train(Config(**QUICK, seed=1), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="needs its folder"):
        train(Config(**QUICK), resume=True)
    with pytest.raises(FileExistsError, match="another run"):
        train(Config(**QUICK), tmp_path / "run")


def fails(capsys, status, *arguments):
    """The error of a command that ends with this status."""
    code = None
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (status, "")
    return captured.err


def test_resume_on_the_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    assert "holds no run" in fails(capsys, 2, "train", "--resume", tmp_path)
    assert "holds no run" in fails(capsys, 2, "train", "--resume", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    train(Config(**QUICK), run, stop(7, interrupt))
    assert json.loads((run / "summary.json").read_text())["rounds"] == 7
    others = (["--rounds", "12"], ["--rounds", "400"], ["--server-batch", "0"])  # of which two are defaults
    for more in (["--seed", "1"], ["--out", tmp_path / "other"], ["--preset", "paper"], *others):
        said = fails(capsys, 2, "train", "--resume", run, *more, "--keep", "9")
        assert f"its own settings: leave out {more[0]};" in said
    for keep in (10, 3):  # the rest, then a finished run; 3 is the default, and counts
        assert main(["train", "--resume", str(run), "--keep", str(keep)]) == 0
        assert "after 12 rounds" in capsys.readouterr().out
        assert json.loads((run / "config.json").read_text())["keep"] == keep
    (run / "config.json").write_text("{}}")
    assert "config.json is not a run's settings" in fails(capsys, 2, "train", "--resume", run)
    (run / "config.json").write_text('{"knobs": 3}')
    assert "knobs" in fails(capsys, 2, "train", "--resume", run)


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["train", "--rounds", "9", "--preset", "paper", "--out", "r"], ["train", "--resume", "r"]),
        (["train", "--resume", "r", "--keep", "5"], ["train", "--resume", "r"]),  # which config.json keeps
        (
            ["train", "--out", "r", "--engine", "ray", "--actors", "2", "--actor-gpus", "0.5", "--tensorboard"],
            ["train", "--resume", "r", "--tensorboard", "--engine", "ray", "--actors", "2", "--actor-gpus", "0.5"],
        ),
        (
            ["serve", "my fed/server", "--out", "r", "--deadline", "60", "--enough", "2", "--least", "3", "--edge"],
            ["serve", "my fed/server", "--resume", "r", "--edge", "--enough", "2", "--least", "3"],
        ),
        (
            ["serve", "s", "--resume", "r", "--broker", "nats.conf", "--deadline", "5"],
            ["serve", "s", "--resume", "r", "--broker", "nats.conf", "--deadline", "5.0"],
        ),
    ],
)
def test_the_command_that_goes_on_has_what_no_file_of_the_run_keeps(words, again):
    options = parser().parse_args(words)
    assert resume_command(options, Path("r")) == shlex.join(["hosfl", *again])
    assert resume_command(parser().parse_args(again), Path("r")) == shlex.join(["hosfl", *again])  # stopped once more


def test_rebuild_and_log_on_the_command_line(tmp_path, capsys):
    config = Config(**QUICK, digest_every=4, snapshot_every=5)
    with pytest.raises(Killed):
        train(config, tmp_path, stop(7, kill))
    train(config, tmp_path, resume=True)
    log, base, out = tmp_path / "hosfl.log", tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    assert main(["rebuild", str(log), "--base", str(base), "--out", str(out)]) == 0
    assert "after 12 rounds" in capsys.readouterr().out
    expected, made = load_file(tmp_path / "client.safetensors"), load_file(out)
    assert all(torch.equal(expected[name], made[name]) for name in expected)
    assert main(["rebuild", str(log), "--base", str(base), "--out", str(out), "--upto", "0"]) == 0
    capsys.readouterr()
    assert all(torch.equal(tensor, load_file(base)[name]) for name, tensor in load_file(out).items())
    written = out.read_bytes()
    arguments = ["rebuild", log, "--base", base, "--out", out]
    assert "holds 12 rounds" in fails(capsys, 1, *arguments, "--upto", 13)
    assert "holds 12 rounds" in fails(capsys, 1, *arguments, "--upto", -1)
    assert "not the base" in fails(capsys, 1, "rebuild", log, "--base", tmp_path / "client.safetensors", "--out", out)
    assert "hosfl: " in fails(capsys, 2, "rebuild", log, "--base", log, "--out", out)
    os.mkfifo(tmp_path / "pipe")  # it would be waited for
    assert "no regular file" in fails(capsys, 2, "rebuild", log, "--base", tmp_path / "pipe", "--out", out)
    assert "hosfl: " in fails(capsys, 2, "rebuild", log, "--base", tmp_path / "no.safetensors", "--out", out)
    assert "hosfl: " in fails(capsys, 2, "rebuild", tmp_path / "no.log", "--base", base, "--out", out)
    assert "hosfl: " in fails(capsys, 2, *arguments[:-1], tmp_path / "no" / "out.safetensors")
    assert out.read_bytes() == written
    for read in (log, base):
        held = read.read_bytes()
        assert f"{read} is what the client half is rebuilt from" in fails(capsys, 2, *arguments[:-1], read)
        assert read.read_bytes() == held

    assert main(["log", "verify", str(log)]) == 0
    last = capsys.readouterr().out
    assert "12 rounds of 2 directions, 2 void" in last
    assert main(["log", "show", str(log)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] + "\n" == last
    assert shown[0].startswith("round 0 epoch 0 rate ")
    assert "epoch 1: rounds from 5 on are void" in shown
    assert sum(line.startswith("round ") for line in shown) == 14
    digest = Log.read(log).digests[12].hex()
    assert f"digest after 12 rounds: {digest}" in shown
    data = log.read_bytes()
    log.write_bytes(data[:-10])
    assert main(["log", "verify", str(log)]) == 0
    assert "a torn tail of" in capsys.readouterr().out
    log.write_bytes(data[:1500] + b"x" + data[1501:])
    for action in ("show", "verify"):
        assert "damaged" in fails(capsys, 1, "log", action, log)
        assert "hosfl: " in fails(capsys, 2, "log", action, tmp_path / "no.log")
        assert "hosfl: " in fails(capsys, 2, "log", action, tmp_path)


def test_the_paper_s_preset(tmp_path):
    arguments = ["train", "--rounds", "2", "--batch", "8", "--server-rate", "0.01", "--client-rate", "0.001"]
    assert main([*arguments, "--preset", "paper", "--out", str(tmp_path / "a")]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    paper = {"directions_from": "fresh", "dist": "gaussian", "rule": "adamw", "aggregation": "uniform"}
    assert paper.items() <= config.items()
    assert (config["schedule"], config["direction_scale"], config["rounds"]) == ("constant", "unit", 2)
    beside = ["--rule", "sgd", "--aggregation", "weighted"]
    assert main([*arguments, *beside, "--preset", "paper", "--out", str(tmp_path / "b")]) == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["rule"], config["aggregation"], config["dist"]) == ("sgd", "weighted", "gaussian")
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--preset", "mine"])

"""`hosfl train` and `hosfl compare` as a user runs them."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from hosfl import Config, LatticeError, train
from hosfl.cli import main
from hosfl.tasks import TASKS

QUICK = {"rounds": 12, "evaluate_every": 5, "batch": 16, "directions": 2}


@pytest.mark.parametrize("method", ["ho", "first-order", "frozen"])
def test_a_run_and_its_files(tmp_path, method):
    seen = []
    config = Config(method=method, server_rate=0.03, **QUICK)
    summary = train(config, tmp_path / "run", lambda *state: seen.append(state))
    assert [s[0] for s in seen] == list(range(1, 13))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 5, 10, 12]
    assert lines[-1]["loss"] < lines[0]["loss"]
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved["accuracy"] == summary.accuracy == lines[-1]["accuracy"]
    assert saved["config"]["method"] == method
    assert saved["replicas"]["equal"] is True
    assert saved["replicas"]["clients"] == 11
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["peak_memory"]["resident"] > 1e6
    assert saved["interrupted"] is False
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = TASKS["digits"]().model(0)
    model.client.load_state_dict(load_file(tmp_path / "run" / "client.safetensors"))
    model.server.load_state_dict(load_file(tmp_path / "run" / "server.safetensors"))


def test_bytes_are_those_of_the_protocol():
    config = {"rounds": 10, "batch": 4, "directions": 3, "clients": 4, "sampled": 4}
    client = TASKS["digits"]().model(0).client
    d = 4 * sum(p.numel() for p in client.parameters())
    cut = client(torch.zeros(1, 1, 8, 8)).numel() * 4
    visits = 10 * 4
    ho = train(Config(method="ho", **config)).bytes
    assert ho["cut up"] == ho["multiplier down"] == visits * 4 * cut
    assert ho["labels up"] == visits * 4 * 4
    assert ho["scalars up"] == visits * 3 * 4
    assert ho["scalars down"] == (visits - 4) * 3 * 4  # the first round has no record to send
    first = train(Config(method="first-order", **config)).bytes
    assert first["gradient up"] == visits * d
    assert first["weights down"] == (visits - 4) * d
    frozen = train(Config(method="frozen", **config)).bytes
    assert set(frozen) == {"framing up", "cut up", "labels up"}


def test_a_seed_is_a_run():
    one, two = (train(Config(**QUICK, seed=3)) for _ in range(2))
    other = train(Config(**QUICK, seed=4))
    assert one.replicas.digest == two.replicas.digest != other.replicas.digest
    assert (one.loss, one.accuracy) == (two.loss, two.accuracy)


def test_gaussian_directions_keep_the_clients_equal():
    assert train(Config(**QUICK, dist="gaussian")).replicas.equal


def test_methods_share_data_and_batches():
    # With a client rate of zero (as good as), all three methods are the frozen client.
    losses = {
        m: train(Config(method=m, client_rate=1e-30, server_rate=0.1, **QUICK)).loss for m in ("first-order", "frozen")
    }
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
    assert "test accuracy" in capsys.readouterr().out
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
    for words in ("accuracy gap recovered", "bytes, scalars up", "client answer, ms", "first-order (2 seeds)"):
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
    assert b"Traceback" not in errors

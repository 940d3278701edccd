"""`hosfl study` and `hosfl report`: equal tuning, the same files however it was stopped, numbers that are the runs'."""

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from hosfl import Config
from hosfl.cli import main
from hosfl.files import try_lock, write_json
from hosfl.protocol.terms import Diverged
from hosfl.runs.report import logarithmic
from hosfl.runs.trainer import train as train_once
from hosfl.studies import page as study_report
from hosfl.studies.folder import claim_folder
from hosfl.studies.jobs import run_job
from hosfl.studies.page import at_ends, number, report
from hosfl.studies.run import ProvenanceCheck, run_study
from hosfl.studies.study import Job, Study, choices, load_study, read_study, slug
from hosfl.studies.table import best_trials, study_table
from hosfl.studies.yaml12 import parse_yaml
from hosfl.tasks.task import Task

FILE = """
base: {batch: 8, clients: 4, sampled: 2, directions: 1, evaluate_every: 1}
rounds: 3
tuning_seeds: [0, 1]
seeds: [2, 3]
methods:
  ho, fresh: {settings: {directions_from: fresh}, grid: {client_rate: [1e-1, 0.2]}}
  first-order: {settings: {method: first-order}, grid: {client_rate: [1, 2.0]}}
"""
FROZEN = "  frozen: {settings: {method: frozen}, grid: {server_rate: [0.05, 0.1]}}\n"
MEASURED = ("seconds", "forward_seconds", "answer_seconds", "machine", "jobs")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    assert run_study(read_study(FILE + FROZEN), folder)
    return folder


def contents(folder, *leave_out):
    """Every run's file, without what a clock says."""
    found = {}
    for path in sorted(folder.glob("*/*/*.json")):
        run = json.loads(path.read_text())
        for evaluation in run["evaluations"]:
            del evaluation["seconds"]
        found[str(path.relative_to(folder))] = {k: v for k, v in run.items() if k not in MEASURED}
    return {name: run for name, run in found.items() if not name.split("/")[1].startswith(leave_out or "-")}


def test_tuning_sees_validation_data_only_and_the_best_trial_is_reported(whole):
    runs = contents(whole)
    phases = {"tuning": 3 * 2 * 2, "runs": 3 * 2}
    assert {p: sum(name.startswith(p) for name in runs) for p in phases} == phases
    for name, run in runs.items():
        tuning = name.startswith("tuning")
        assert run["config"]["evaluate_on"] == ("validation" if tuning else "test")
        assert run["config"]["seed"] in ((0, 1) if tuning else (2, 3))
        assert [e["round"] for e in run["evaluations"]] == ([3] if tuning else [1, 2, 3])
    for method in ("ho, fresh", "first-order", "frozen"):
        trials = {}
        for run in runs.values():
            if run["method"] == method and run["phase"] == "tuning":
                trials.setdefault(run["trial"], []).append((run["accuracy"], -run["loss"]))
        merit = {n: tuple(sum(v) / 2 for v in zip(*values, strict=True)) for n, values in trials.items()}
        chosen = max(merit, key=merit.get)
        assert {r["trial"] for r in runs.values() if r["method"] == method and r["phase"] == "runs"} == {chosen}
        assert chosen == best_trials(load_study(whole / "study.yaml"), whole)[method]


def test_the_table(whole):
    rows = json.loads((whole / "table.json").read_text())["methods"]
    accuracies = [json.loads((whole / f"runs/ho-fresh/{s}.json").read_text())["accuracy"] for s in (2, 3)]
    row = rows["ho, fresh"]
    assert row["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert row["accuracy_error"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2)
    low, high = rows["frozen"]["loss"], rows["first-order"]["loss"]
    assert row["loss_gap_recovered"] == pytest.approx((row["loss"] - low) / (high - low))
    assert (rows["frozen"]["loss_gap_recovered"], rows["first-order"]["loss_gap_recovered"]) == (0, 1)
    assert row["bytes_per_client_round"]["labels up"] == 8 * 4
    assert rows["first-order"]["loss_gap_in_equal_seconds"] == 1
    assert "curves" not in row
    assert "multiplier down" not in rows["frozen"]["bytes_per_client_round"]


def test_the_table_says_how_many_runs_were_made_at_a_time(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "study")

    def jobs():
        return {name: row["jobs"] for name, row in study_table(study, tmp_path / "study")["methods"].items()}

    study = read_study(FILE + FROZEN)
    assert jobs() == {"ho, fresh": [1], "first-order": [1], "frozen": [1]}
    path = tmp_path / "study/runs/frozen/2.json"
    path.unlink()
    assert run_study(study, tmp_path / "study", 2)
    assert jobs()["frozen"] == [1, 2]
    for path in (tmp_path / "study/runs").glob("*/*.json"):  # as before results said it
        run = json.loads(path.read_text())
        del run["jobs"]
        path.write_text(json.dumps(run))
    assert run_study(study, tmp_path / "study")
    assert {json.dumps(n) for n in jobs().values()} == {"[]"}
    path.write_text(json.dumps({**run, "jobs": "two"}))
    with pytest.raises(ValueError, match=r"its jobs cannot be 'two'"):
        jobs()


@pytest.mark.parametrize(("first", "share"), [(1, 0.4), (1.5, 0.2), (1.6, None)])  # 6 is between 8 and 4
def test_equal_seconds_are_those_of_first_order(tmp_path, whole, first, share):
    """Losses of 8, 4 and 2, the 8 after `first` seconds, where frozen ends at 10 and first-order at 0 after 1.5."""
    shutil.copytree(whole, tmp_path / "study")
    seconds, losses = {"frozen": 1, "first-order": 0.5, "ho-fresh": first}, {"frozen": 10, "first-order": 0}
    for path in (tmp_path / "study").glob("runs/*/*.json"):
        run = json.loads(path.read_text())
        for n, evaluation in enumerate(run["evaluations"]):
            evaluation["seconds"] = seconds[path.parent.name] * (n + 1)
            evaluation["loss"] = losses.get(path.parent.name, 8 / 2**n)
        path.write_text(json.dumps({**run, "loss": run["evaluations"][-1]["loss"]}))
    rows = study_table(load_study(tmp_path / "study" / "study.yaml"), tmp_path / "study")["methods"]
    assert rows["ho, fresh"]["loss_gap_in_equal_seconds"] == (share and pytest.approx(share))
    assert rows["ho, fresh"]["loss_gap_recovered"] == pytest.approx(0.8)
    assert [rows[m]["loss_gap_in_equal_seconds"] for m in ("frozen", "first-order")] == [0, 1]
    assert rows["frozen"]["accuracy_gap_in_equal_seconds"] is not None


@pytest.mark.parametrize("there", [False, True])
def test_a_study_whose_first_run_cannot_start_leaves_nothing(tmp_path, whole, there):
    if there:
        (tmp_path / "study").mkdir()
    wrong = FILE.replace("base: {", "base: {trains: nothing, ")
    with pytest.raises(ValueError, match="leaves nothing that moves"):
        run_study(read_study(wrong), tmp_path / "study")
    assert not list(tmp_path.iterdir())
    shutil.copytree(whole, tmp_path / "study")  # what was there stays
    shutil.rmtree(tmp_path / "study/tuning")
    with pytest.raises(ValueError, match="another study"):
        run_study(read_study(wrong), tmp_path / "study")
    assert (tmp_path / "study/study.yaml").exists()


def test_what_cannot_work_is_found_before_any_run(tmp_path):
    untuned = "  splitfed: {settings: {method: splitfed, rule: momentum}, grid: {client_rate: [1, 2]}}\n"
    with pytest.raises(ValueError, match="no rates are tuned for splitfed momentum"):
        run_study(read_study(FILE + untuned), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("after", [3, 10])
def test_stopped_anywhere_and_resumed_it_leaves_the_same_files(tmp_path, whole, monkeypatch, after):
    ran = []

    def some(job):
        if len(ran) == after:
            raise KeyboardInterrupt
        ran.append(job.file)
        return run_job(job)

    study = read_study(FILE)
    monkeypatch.setattr("hosfl.studies.jobs.run_job", some)
    assert not run_study(study, tmp_path / "study")
    assert len(contents(tmp_path / "study")) == after
    assert not (tmp_path / "study" / "table.json").exists()
    after = -1  # the rest
    states = []
    assert run_study(study, tmp_path / "study", progress=states.append)
    assert len(ran) == len(set(ran)) == 12
    assert contents(tmp_path / "study") == contents(whole, "frozen")
    assert (states[-1].done, states[-1].runs, states[-1].seconds_left) == (12, 12, 0)
    assert states[0].last_result == ""
    assert re.fullmatch(
        r"first-order, trial \d, seed 3: accuracy 0\.\d{4}, loss \d\.\d{4}, \d+ s", states[-1].last_result
    )
    # What the first part took is known: there is an estimate from the start.
    assert states[0].seconds_left > states[-2].seconds_left > 0


def test_a_study_that_is_done_has_nothing_left_to_do(tmp_path, whole, monkeypatch):
    shutil.copytree(whole, tmp_path / "study")
    monkeypatch.setattr("hosfl.studies.jobs.run_job", None)
    assert run_study(read_study(FILE + FROZEN + "# a remark"), tmp_path / "study")


def start(file, out, jobs):
    """`hosfl study` in a process of its own."""
    command = [sys.executable, "-m", "hosfl.cli", "study", str(file), "--out", str(out), "--jobs", str(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_and_gone_on_with_two_workers(tmp_path, whole, file):
    out = tmp_path / "out"
    process = start(file, out, 1)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and len(contents(out)) < 2:
        time.sleep(0.02)
    process.kill()
    _, lines = process.communicate()
    held = contents(out)
    assert 0 < len(held) < 12
    assert f"tuning  {len(held) - 1}/12  " in lines  # the line of the last one may not have been there yet
    assert main(["study", str(file), "--out", str(out), "--jobs", "2"]) == 0
    assert contents(out) == contents(whole, "frozen")
    assert (out / "report.html").exists()
    assert not list(out.glob("**/*.tmp"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_study(tmp_path, file, stop):
    file.write_text(FILE.replace("rounds: 3", "rounds: 100000"))
    process = start(file, tmp_path / "out", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.time() + 120
    while time.time() < deadline and len(children.read_text().split()) < 3:  # two workers, and their resources' tracker
        time.sleep(0.1)
    time.sleep(10)  # in the middle of a run
    workers = children.read_text().split()
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if stop == signal.SIGINT else -9)
    assert "Traceback" not in errors
    time.sleep(3)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert not contents(tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_while_workers_start(tmp_path, file):
    """A terminal sends it to all of them, and they import torch for seconds before they could say what it does."""
    process = start(file, tmp_path / "out", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.time() + 120
    while time.time() < deadline and len(workers := children.read_text().split()) < 3:
        time.sleep(0.01)
    time.sleep(0.5)
    for worker in workers:
        os.kill(int(worker), signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_another_study_is_refused_by_what_differs(tmp_path, whole, capsys):
    file = tmp_path / "other.yaml"
    file.write_text((FILE + FROZEN).replace("[1e-1, 0.2]", "[1e-1, 0.3]").replace("seeds: [2, 3]", "seeds: [2, 4]"))
    before = contents(whole)
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(file), "--out", str(whole)])
    errors = " ".join(capsys.readouterr().err.split())
    assert "methods.ho, fresh.grid.client_rate was [0.1, 0.2], is [0.1, 0.3]" in errors
    assert "seeds was [2, 3], is [2, 4]" in errors
    assert "tuning_seeds was" not in errors
    assert contents(whole) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no study, and is not empty"):
        run_study(read_study(FILE), tmp_path / "full")


@pytest.mark.skipif(sys.platform == "win32", reason="no lock")
def test_two_processes_do_not_run_one_study(tmp_path, whole, file, capsys):
    shutil.copytree(whole, tmp_path / "study")
    file.write_text(FILE + FROZEN)
    before = contents(tmp_path / "study")
    with (tmp_path / "study" / "lock").open("a") as lock:
        assert try_lock(lock)
        with pytest.raises(SystemExit, match="2"):
            main(["study", str(file), "--out", str(tmp_path / "study")])
        assert "another process is at work on the study in" in capsys.readouterr().err
    assert contents(tmp_path / "study") == before
    assert main(["study", str(file), "--out", str(tmp_path / "study")]) == 0


def test_a_study_gains_a_method(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "study")
    before, saw = contents(tmp_path / "study"), (tmp_path / "study" / "table.json").read_text()
    more = FROZEN.replace("frozen:", "frozen, too:")
    assert more != FROZEN
    assert run_study(read_study(FILE + FROZEN + more), tmp_path / "study")
    assert {k: v for k, v in contents(tmp_path / "study").items() if k in before} == before
    assert (tmp_path / "study" / "table.json").read_text() != saw
    rows = json.loads((tmp_path / "study" / "table.json").read_text())["methods"]
    assert list(rows)[-1] == "frozen, too"
    assert rows["frozen, too"]["accuracy"] == rows["frozen"]["accuracy"]
    with pytest.raises(ValueError, match="another study"):  # and loses none
        run_study(read_study(FILE + FROZEN), tmp_path / "study")


def test_of_several_frozen_clients_the_control_is_the_one_called_so(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "study")
    before = json.loads((tmp_path / "study" / "table.json").read_text())["methods"]
    more = FROZEN.replace("frozen:", "frozen, slow:").replace("[0.05, 0.1]", "[0.001, 0.002]")
    assert run_study(read_study(FILE + FROZEN + more), tmp_path / "study")
    rows = json.loads((tmp_path / "study" / "table.json").read_text())["methods"]
    assert rows["frozen, slow"]["loss"] != rows["frozen"]["loss"]
    for method, row in before.items():
        assert rows[method]["loss_gap_recovered"] == row["loss_gap_recovered"] is not None


def test_a_run_of_other_settings_is_not_taken(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "study")
    path = tmp_path / "study/runs/frozen/2.json"
    run = json.loads(path.read_text())
    run["config"]["mu"] = 0.5  # as another version's default might be
    path.write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"2\.json is of another run \(mu was 0.5, is 0.001\)"):
        run_study(read_study(FILE + FROZEN), tmp_path / "study")


def change(path, edit):
    """A JSON file with something changed by a function."""
    held = json.loads(path.read_text())
    edit(held)
    path.write_text(json.dumps(held))


def test_only_the_jobs_files_are_read(tmp_path, whole, monkeypatch):
    folder = tmp_path / "study"
    shutil.copytree(whole, folder)
    for name in ("runs/frozen/._2.json", "runs/frozen/notes.json", "runs/frozen/2 (1).json", "tuning/frozen/.DS_Store"):
        (folder / name).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        \xb0")
    (folder / "runs/old/2.json").parent.mkdir()
    (folder / "runs/old/2.json").write_text("{}")
    (folder / "runs/frozen/3.json").unlink()
    ran = []
    monkeypatch.setattr("hosfl.studies.jobs.run_job", lambda job: ran.append(job.file) or run_job(job))
    assert "17 of 18 runs are done" in report(folder).read_text()
    assert run_study(read_study(FILE + FROZEN), folder)
    assert ran == ["runs/frozen/3.json"]
    assert (folder / "table.json").read_text() != (whole / "table.json").read_text()  # seconds
    assert "Not finished" not in report(folder).read_text()


def test_a_folder_that_a_file_manager_has_seen_is_empty(tmp_path, monkeypatch):
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    monkeypatch.setattr("hosfl.studies.jobs.run_job", lambda job: None)
    assert not run_study(read_study(FILE), tmp_path)  # interrupted, and not refused


MEMORY = {
    "machine": dict.fromkeys(("processor", "cores", "gpu", "threads", "system", "python")),
    "device": "cpu",
    "bound": 1.1,
    "halves": {"digits": {"what": "", "batch": 1, "ways": {"inference": {"peak_extra": 1, "cut": 1, "of_bound": 1}}}},
}
DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "AppleDouble": lambda data: b"\0\5\26\7\0\2\0\0Mac OS X        \xb0",
    "not UTF-8": lambda data: b'{"\xe9": 1}',
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "NaN": lambda data: re.sub(rb'(loss|bound)": [0-9.]+', rb'\1": NaN', data),
    "a list": lambda data: b"[]",
    "text": lambda data: b'"a"',
    "nothing in it": lambda data: b"{}",
    "nested": lambda data: b"[" * 100_000,
    "a key gone": lambda data: data.replace(b'"seconds"', b'"minutes"').replace(b'"peak_extra"', b'"peak"'),
    "another type": lambda data: re.sub(rb'(loss|bound)": [0-9.]+', rb'\1": "low"', data),
}
OTHERS = {
    "another seed's": ("runs/frozen/3.json", "seed was 3, is 2"),
    "another method's": ("runs/first-order/2.json", "method was 'first-order', is 'frozen'"),
    "another phase's": ("tuning/frozen/0-1.json", "phase was 'tuning', is 'runs'; .*seed was 1, is 2"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", ["tuning/frozen/1-0.json", "runs/frozen/2.json", "client-memory.json"])
def test_a_damaged_file_is_named(tmp_path, whole, monkeypatch, place, damage):
    shutil.copytree(whole, tmp_path / "study")
    study = read_study(FILE + FROZEN + "memory: [digits]\n")
    (tmp_path / "study/study.yaml").write_text(study.text)
    (tmp_path / "study/client-memory.json").write_text(json.dumps(MEMORY))
    path = tmp_path / "study" / place
    good = path.read_bytes()
    path.write_bytes(DAMAGES[damage](good))
    assert path.read_bytes() != good
    monkeypatch.setattr("hosfl.studies.jobs.run_job", None)
    for take in (lambda: run_study(study, tmp_path / "study"), lambda: report(tmp_path / "study")):
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is .*\): delete it, and it is made again"):
            take()
    path.write_bytes(good)
    assert run_study(study, tmp_path / "study")


@pytest.mark.timeout(30)  # it would be waited for
@pytest.mark.parametrize("place", ["tuning/frozen/1-0.json", "study.yaml", "lock"])
def test_a_pipe_in_a_studys_folder_is_named(tmp_path, whole, monkeypatch, place):
    shutil.copytree(whole, tmp_path / "study")
    (tmp_path / "study" / place).unlink()
    os.mkfifo(tmp_path / "study" / place)
    monkeypatch.setattr("hosfl.studies.jobs.run_job", None)
    with pytest.raises(OSError, match=f"{place}'$"):
        run_study(read_study(FILE + FROZEN), tmp_path / "study")


@pytest.mark.parametrize("other", OTHERS)
def test_another_runs_file_is_named(tmp_path, whole, other):
    shutil.copytree(whole, tmp_path / "study")
    name, differs = OTHERS[other]
    shutil.copy(whole / name, tmp_path / "study/runs/frozen/2.json")
    for take in (lambda: run_study(read_study(FILE + FROZEN), tmp_path / "study"), lambda: report(tmp_path / "study")):
        with pytest.raises(ValueError, match=rf"frozen/2\.json is of another run \(.*{differs}.*delete it"):
            take()
    (tmp_path / "study/runs/frozen/2.json").unlink()  # as it says
    assert run_study(read_study(FILE + FROZEN), tmp_path / "study")
    assert contents(tmp_path / "study") == contents(whole)


def test_another_trials_file_is_named(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "study")
    change(tmp_path / "study/runs/frozen/2.json", lambda run: run.update(trial=1 - run["trial"]))
    with pytest.raises(ValueError, match=r"frozen/2\.json is of another run \(trial was [01], is [01]\)"):
        run_study(read_study(FILE + FROZEN), tmp_path / "study")


@pytest.mark.parametrize("held", ["", "rounds: [", "- a", "methods: {}", FILE + "more: 1", "\0"])
def test_a_damaged_copy_of_the_studys_file_is_named(tmp_path, whole, held):
    shutil.copytree(whole, tmp_path / "study")
    (tmp_path / "study/study.yaml").write_text(held)
    with pytest.raises(ValueError, match=r"study/study\.yaml: (?s:.*)copy that over it"):
        run_study(read_study(FILE + FROZEN), tmp_path / "study")
    with pytest.raises(ValueError, match=r"study/study\.yaml: "):
        report(tmp_path / "study")
    (tmp_path / "study/study.yaml").write_text(FILE + FROZEN)  # as it says
    assert run_study(read_study(FILE + FROZEN), tmp_path / "study")


def test_what_no_bit_depends_on_may_change(tmp_path, whole, monkeypatch):
    shutil.copytree(whole, tmp_path / "study")
    text = (FILE + FROZEN).replace("evaluate_every: 1", "evaluate_every: 3, keep: 1, snapshot_every: 7")
    (tmp_path / "study/runs/frozen/3.json").unlink()
    assert run_study(read_study(text), tmp_path / "study")
    assert (tmp_path / "study/study.yaml").read_text() == text
    evaluated = [json.loads((tmp_path / f"study/runs/frozen/{n}.json").read_text())["evaluations"] for n in (2, 3)]
    assert [len(e) for e in evaluated] == [3, 1]
    figures = []
    monkeypatch.setattr(study_report, "save_figure", lambda figure, path, dpi: figures.append(figure))
    monkeypatch.setattr(study_report, "html_image", lambda path, caption: "")
    report(tmp_path / "study")
    means = [sum(e[-1]["accuracy"] for e in evaluated) / 2, sum(e[-1]["loss"] for e in evaluated) / 2]
    for axis, reached in ((figures[0].axes[0], means[0]), (figures[0].axes[3], means[1])):
        line = axis.get_lines()[2]
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([3], [pytest.approx(reached)])


def test_where_the_data_lie_may_change_and_nothing_else(tmp_path):
    text = FILE.replace("base: {", "base: {task: sst2, data: /a, model: /b, at: '2', ")
    claim_folder(read_study(text), tmp_path)
    moved = text.replace("/a", "/c").replace("/b", "/d")
    claim_folder(read_study(moved), tmp_path)
    assert (tmp_path / "study.yaml").read_text() == moved
    with pytest.raises(ValueError, match=r"what differs: base\.at was '2', is '1'\. Choose"):
        claim_folder(read_study(moved.replace("at: '2'", "at: '1'")), tmp_path)


def made_of(folder, **digests):
    """Write into every result what it was made of; returns the results' paths."""
    paths = sorted(folder.glob("*/*/*.json"))
    for path in paths:
        change(path, lambda run: run["provenance"].update(digests))
    return paths


def test_other_data_between_two_sessions_are_refused(tmp_path, whole, monkeypatch):
    shutil.copytree(whole, tmp_path / "study")
    path, study = made_of(tmp_path / "study", data="a" * 64)[0], read_study(FILE + FROZEN)
    monkeypatch.setattr("hosfl.studies.jobs.run_job", None)
    monkeypatch.setattr(Task, "digest", lambda task: "a" * 64)
    assert run_study(study, tmp_path / "study")
    change(path, lambda run: run["provenance"].update(data="b" * 64))
    with pytest.raises(
        ValueError, match=rf"\.json was made of other data than the study's now \(digest {'b' * 16}, now a"
    ):
        run_study(study, tmp_path / "study")
    path.unlink()
    with monkeypatch.context() as patch:
        changed = {"provenance": {"settings": {}, "data": "c" * 64, "model": "", "log": ""}}
        patch.setattr("hosfl.studies.jobs.run_job", lambda job: run_job(job) | changed)
        with pytest.raises(ValueError, match="made of other data than the study's now"):  # they change as it goes
            run_study(study, tmp_path / "study")
    assert not path.exists()


def test_runs_that_begin_alike_have_one_model(tmp_path, whole, monkeypatch):
    shutil.copytree(whole, tmp_path / "study")
    made_of(tmp_path / "study", data="", model="a" * 64)
    study = read_study(FILE + FROZEN)
    monkeypatch.setattr("hosfl.studies.jobs.run_job", None)
    for seed, digest in ((2, "a"), (3, "b")):  # each seed its own
        for path in (tmp_path / "study").glob(f"runs/*/{seed}.json"):
            change(path, lambda run, digest=digest: run["provenance"].update(model=digest * 64))
    assert run_study(study, tmp_path / "study")
    change(tmp_path / "study/runs/frozen/3.json", lambda run: run["provenance"].update(model="c" * 64))
    with pytest.raises(ValueError, match=r"frozen/3\.json was made of another model than .*runs/ho-fresh/3\.json"):
        run_study(study, tmp_path / "study")


def test_a_process_s_first_run_may_have_rounds_in_which_the_server_learns_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("hosfl.studies.jobs._warm", [])  # so that a run of one round goes first
    study = read_study(FILE.replace("directions_from: fresh", "directions_from: fresh, server_first: 2") + FROZEN)
    assert run_study(study, tmp_path / "study")


def test_calibrated_runs_begin_with_statistics_of_their_own(tmp_path):
    """Running statistics are part of what a run begins with, and clients that are not calibrated keep the base's."""
    contents = ProvenanceCheck(defaultdict(str))

    def check(model, name, **settings):
        result = {"provenance": {"data": "", "model": model * 64}}
        contents.check(Job("runs", name, 0, Config(**settings)), result, tmp_path)

    check("a", "plain")
    check("b", "calibrated", calibrate=8)
    check("c", "uniform", calibrate=8, aggregation="uniform")  # so is the mean of the clients' statistics
    check("d", "fewer batches", calibrate=4)
    check("a", "plain too", aggregation="uniform")
    with pytest.raises(ValueError, match=r"other/0\.json was made of another model than .*runs/calibrated/0\.json"):
        check("a", "other", calibrate=8)


def test_results_that_do_not_say_what_they_were_made_of_are_taken(tmp_path, whole, monkeypatch):
    shutil.copytree(whole, tmp_path / "study")
    for path in (tmp_path / "study").glob("*/*/*.json"):
        change(path, lambda run: run.pop("provenance"))
    monkeypatch.setattr("hosfl.studies.jobs.run_job", None)
    with pytest.warns(UserWarning, match="does not say of what data") as warned:
        assert run_study(read_study(FILE + FROZEN), tmp_path / "study")
    assert len(warned) == 1


def test_every_result_says_what_it_was_made_of(whole, tmp_path):
    for path in whole.glob("*/*/*.json"):
        run = json.loads(path.read_text())
        config = {k: v for k, v in run["config"].items() if k in run["provenance"]["settings"]}
        assert config == run["provenance"]["settings"]
        assert config.keys() >= {"seed", "rounds", "method", "task"}
        assert not {"data", "keep"} & config.keys()
    assert run_study(read_study(FILE.replace("[1e-1, 0.2]", "[1e6, 0.2]")), tmp_path / "diverges")
    failed = json.loads((tmp_path / "diverges/tuning/ho-fresh/0-0.json").read_text())
    assert failed["failure"]
    assert failed["provenance"]["settings"]["client_rate"] == 1e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_worker_that_the_system_kills(tmp_path, whole, file, monkeypatch, capsys):
    others, killed = set(multiprocessing.active_children()), []

    def killing(study, out, jobs, progress):
        def tell(state):
            progress(state)
            if state.last_result and not killed:
                killed.extend(set(multiprocessing.active_children()) - others)
                os.kill(killed[0].pid, signal.SIGKILL)

        return run_study(study, out, jobs, tell)

    monkeypatch.setattr("hosfl.commands.run_study", killing)
    assert main(["study", str(file), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 2
    *told, last = capsys.readouterr().err.splitlines()
    assert last.startswith("hosfl: the system killed one of the study's processes, most likely for lack of memory: the")
    held = contents(tmp_path / "out")
    assert 0 < len(held) == len(told) < 12  # every run that was done is written, and has its line
    monkeypatch.undo()
    assert main(["study", str(file), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 0
    assert contents(tmp_path / "out") == contents(whole, "frozen")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1, 2.0]", "[1, 2.0, 4]", r"not equally many trials \(ho, fresh 2, first-order 3\).*unequal: why"),
        ("rounds: 3", "rounds: three", "^rounds: a whole number is needed, got 'three'"),
        ("rounds: 3", "", "^rounds is missing"),
        ("rounds: 3", "rounds: 0", "^methods.ho, fresh: rounds must be at least 1"),
        ("rounds: 3", "rounds: 3\nround: 4", "^round: unknown"),
        ("batch: 8", "bach: 8", "^base.bach: no such setting"),
        ("batch: 8", "batch: eight", "^base.batch: a whole number is needed, got 'eight'"),
        ("batch: 8", "batch: true", "^base.batch: a whole number is needed, got True"),
        (
            "batch: 8",
            "local_steps: 8",
            "^base: local_steps = 8 would do nothing with method 'ho' or with method 'first",
        ),
        ("method: first-order", "method: first-order, mu: 1", "^methods.first-order: mu = 1.0 would do nothing with"),
        ("batch: 8", "seed: 8", "^base.seed: the study makes that itself"),
        ("batch: 8", "batch: 8, batch: 9", "^'batch' is there twice"),
        ("sampled: 2", "sampled: 5", "^methods.ho, fresh: cannot sample 5 of 4"),
        ("from: fresh", "from: old", r"^methods.ho, fresh.settings.directions_from: one of fresh"),
        ("method: first-order", "evaluate_on: test", "^methods.first-order.settings.evaluate_on: the study makes"),
        ("[1, 2.0]", "2.0", "^methods.first-order.grid.client_rate: a list is needed, got 2.0"),
        *(
            (
                "client_rate: [1, 2.0]",
                f"{name}: [{values}]",
                f"^methods.first-order.grid.{name}: its trials would all be the same run: put one value into settings",
            )
            for name, values in {
                "evaluate_every": "1, 2",
                "keep": "1, 2",
                "device": "cpu, cuda",
                "data": "a, b",
            }.items()
        ),
        ("[1, 2.0]", "[1, 1.0]", "^methods.first-order.grid.client_rate: one value or more"),
        ("[1, 2.0]", "[1, big]", "^methods.first-order.grid.client_rate: a number or nothing is needed, got 'big'"),
        ("[1, 2.0]", "[1, -1]", "^methods.first-order: client_rate must be positive"),
        ("  first-order:", "  ho fresh:", "^methods.ho fresh: its folder would be that of 'ho, fresh'"),
        ("seeds: [2, 3]", "seeds: [2, 2]", "^seeds: one seed or more is needed, each once"),
        ("rounds: 3", "rounds: 3\nmemory: [gpt]", "^memory: 'gpt' is none of digits, minilm"),
        ("rounds: 3", "rounds: 3\nmemory: {}", "^memory: a list is needed, got {}"),
        ("rounds: 3", "rounds: 3\nunequal: false", "^unequal: text is needed, got False"),
        ("{method: first-order}", "[]", r"^methods.first-order.settings: a mapping is needed, got \[\]"),
        ("{client_rate: [1, 2.0]}", "0", "^methods.first-order.grid: a mapping is needed, got 0"),
        ("{settings: {method: first-order}, grid: {client_rate: [1, 2.0]}}", "''", "^methods.first-order: a mapping"),
    ],
)
def test_files_that_cannot_work(old, new, message):
    assert FILE.count(old) >= 1
    with pytest.raises(ValueError, match=message):
        read_study(FILE[: FILE.rindex(old)] + new + FILE[FILE.rindex(old) + len(old) :])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-3", 0.001), ("1E5", 1e5), ("+.5", 0.5), ("1.", 1.0), ("-.inf", -float("inf")), ("010", 10), ("-08", -8)],
        *[("0o17", 15), ("0x1F", 31), ("1_000", "1_000"), ("12:30", "12:30"), ("0b1", "0b1"), ("-0x1", "-0x1")],
        *[("yes", "yes"), ("No", "No"), ("on", "on"), ("off", "off"), ("2020-01-01", "2020-01-01"), ("=", "=")],
        *[("true", True), ("FALSE", False), ("tRue", "tRue"), ("~", None), ("Null", None), ("", None), ("'1'", "1")],
        *[("!!str 5", "5"), ("!!float 5", 5.0), ("[1, a]", [1, "a"]), ("'\\n'", "\\n"), ('"\\u00e9"', "é")],
    ],
)
def test_values_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(f"key: {text}\n")["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{<<: *b, x: 3}", {"x": 3, "y": 2}),
        ("{x: 3, <<: *b}", {"x": 3, "y": 2}),
        ("{<<: [*b, *c]}", {"x": 1, "y": 2, "z": 6}),
        ("{<<: [*c, *b], z: 7}", {"x": 5, "y": 2, "z": 7}),
        ("{<<: {<<: *c, x: 8}}", {"x": 8, "z": 6}),
        ("{'<<': 1}", {"<<": 1}),
    ],
)
def test_merge_keys(text, value):
    assert parse_yaml(f"b: &b {{x: 1, y: 2}}\nc: &c {{x: 5, z: 6}}\na: {text}")["a"] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &b {x: 1}\nc: {x: 3, <<: *b, x: 4}", "'x' is there twice, the second time in line 2, column 19"),
        ("a: &b {x: 1}\nc: {<<: *b, <<: *b}", "'<<' is there twice"),
        ("1: a\n1.0: b", "1.0 is there twice"),
        ("a: {<<: 5}", "<< merges a mapping, or a list of them, and got 5 in line 1"),
        ("a: {<<: [[]]}", "<< merges a mapping"),
        ("a: &a [*a]", "an alias stands for what it is in itself"),
        ("a: &a {<<: *a}", "an alias stands for what it is in itself"),
        ("[" * 3000, "nested too deeply"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefg", "bcdefgh", strict=True)),
            "more than 100000 values",
        ),
        ("? [1]\n: 2", "a key must be one word or number in line 1, column 3"),
        ("a: !!python/object:os.system x", "no use for the tag 'tag:yaml.org,2002:python/object:os.system' in line 1"),
        ("a: !!int x", "'x' is no int in line 1, column 4"),
        ('a: "\\ud800"', "is no str in line 1"),
        ("a: *b", "not YAML: found undefined alias"),
        ("a: \0", "not YAML: unacceptable character"),
        ("a\n---\nb", "not YAML: expected a single document"),
        ("#" * (2**20 + 1), "more than 1048576 characters: too large"),
    ],
)
def test_yaml_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_yaml(text)


def test_a_studys_file_as_editors_save_it(tmp_path):
    (tmp_path / "s.yaml").write_bytes(
        b"\xef\xbb\xbf" + FILE.replace("ho, fresh", "Größe").replace("\n", "\r\n").encode()
    )
    assert list(load_study(tmp_path / "s.yaml").trials) == ["Größe", "first-order"]
    assert load_study(tmp_path / "s.yaml").text.startswith("\r\nbase: ")  # what a copy holds and the page shows
    (tmp_path / "s.yaml").write_bytes(FILE.replace("ho, fresh", "Größe").encode("latin-1"))
    with pytest.raises(ValueError, match=r"s\.yaml: line 7 is not UTF-8, at byte 134: save the file"):
        load_study(tmp_path / "s.yaml")


@st.composite
def damaged(draw):
    """A study's file in which some bytes are others."""
    data = bytearray(FILE.encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=6) | st.sampled_from(TOKENS))
    return bytes(data)


TOKENS = [
    t.encode()
    for t in ("<<: ", "*a", "&a ", "!!int ", "!x ", "? ", "[", "{", "}", ": ", "- ", "\t", "1e999", "null", '"')
]


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | damaged() | st.lists(st.sampled_from(TOKENS)).map(b"".join))
def test_any_bytes_are_a_study_or_an_error_that_names_the_file(tmp_path, data):
    path = tmp_path / "study.yaml"
    path.write_bytes(data)
    try:
        found = load_study(path)
    except ValueError as error:
        found = str(error)
    assert isinstance(found, Study) or found.startswith(f"{path}: ")


def test_too_many_trials():
    grid = ", ".join(f"{name}: [{', '.join(map(str, range(1, 31)))}]" for name in ("mu", "clip", "alpha"))
    with pytest.raises(ValueError, match=r"methods\.first-order\.grid: 27000 trials, 10000 at most"):
        read_study(FILE.replace("client_rate: [1, 2.0]", grid))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *[("ho, fresh", "ho-fresh"), ("HO__2 (b)", "ho-2-b"), ("a/b", "a-b"), ("../x", "x"), ("_$x$", "x")],
        *[
            ("方法", "方法"),
            ("Große", "grosse"),
            ("हिन्दी", "हिन्दी"),
            ("метод Ж", "метод-ж"),
            ("e\u0301", "é"),
            ("x²", "x²"),
        ],
    ],
)
def test_a_methods_folder(name, folder):
    assert slug(name) == unicodedata.normalize("NFC", folder)
    assert name in read_study(FILE.replace("ho, fresh", json.dumps(name, ensure_ascii=False))).trials


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("Große", "GROSSE", "its folder would be that of 'Große'"),
        ("é", "e\u0301", "its folder would be that of 'é'"),
        ("方" * 86, "b", "its folder's name would have 258 bytes, 255 at most: shorten it"),
        ("🎉!", "b", "a method's name needs letters or digits"),
    ],
)
def test_names_that_make_no_folder(first, second, message):
    with pytest.raises(ValueError, match=message):
        read_study(
            FILE.replace("ho, fresh", json.dumps(first, ensure_ascii=False)).replace("first-order:", f'"{second}":', 1)
        )


def test_names_come_out_as_they_are(tmp_path, monkeypatch):
    names = ["方法", "$x_1$", "_low", "<b>&amp;", "שלום (1)", "failed", "y" * 200]
    methods = "".join(f"  {json.dumps(name, ensure_ascii=False)}: {{settings: {{method: frozen}}}}\n" for name in names)
    figures, save = [], study_report.save_figure
    monkeypatch.setattr(study_report, "save_figure", lambda figure, *to: figures.append(figure) or save(figure, *to))
    assert run_study(
        read_study(FILE.partition("  ho, fresh")[0].replace("directions: 1, ", "") + methods), tmp_path / "study"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = report(tmp_path / "study").read_text()
    texts = figures[0].legends[0].get_texts()
    assert [text.get_text().replace("\n", "") for text in texts] == names
    assert not any(text.get_parse_math() for text in texts)
    assert "<td>&lt;b&gt;&amp;amp;</td>" in page
    assert "<td>failed</td>" in page  # a name is no failure
    assert all((tmp_path / "study/runs" / slug(name) / "2.json").exists() for name in names)


def test_unequal_trials_need_a_reason(tmp_path):
    text = FILE.replace("[1, 2.0]", "[1, 2.0, 4]") + "unequal: the control may have more\n"
    study = read_study(text)
    assert {m: len(t) for m, t in study.trials.items()} == {"ho, fresh": 2, "first-order": 3}
    assert study.trials["ho, fresh"][0]["client_rate"] == 0.1


def test_file_errors_name_the_file(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("rounds: [")
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.endswith("but found '<stream end>' in line 1, column 10\n")
    (tmp_path / "bad.yaml").write_text(FILE.replace("[2, 3]", "[1, 2, 3]"))  # whose rates were chosen on seeds 0 and 1
    with pytest.raises(
        ValueError, match=r"bad\.yaml: seeds: 1 is tuned on too, in tuning_seeds: results need seeds of"
    ):
        load_study(tmp_path / "bad.yaml")
    assert not (tmp_path / "out").exists()
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no study" in capsys.readouterr().err


def test_a_diverged_trial_loses_and_is_kept(tmp_path):
    text = FILE.replace("[1e-1, 0.2]", "[1e6, 0.2]").replace("[1, 2.0]", "[2.0, 1.0]")
    study = read_study(text)
    assert run_study(study, tmp_path)
    found = study_table(study, tmp_path)
    lost = found["trials"][0]
    assert lost["choice"] == {"client_rate": 1e6}
    assert (lost["accuracy"], lost["loss"], len(lost["failures"])) == (None, None, 2)
    assert found["methods"]["ho, fresh"]["trial"] == 1
    page = report(tmp_path).read_text()
    assert "failed 2 of 2" in page


@pytest.mark.parametrize("ends", [(0.07, 0.9), (3.7, 4.2), (1e-3, 1e3)])
def test_a_logarithmic_axis_has_plain_numbers(ends):
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], ends)
    logarithmic(axis)
    figure.savefig(io.BytesIO())
    low, high = axis.get_ylim()
    ticks = [*axis.yaxis.get_major_ticks(), *axis.yaxis.get_minor_ticks()]
    shown = [t.label1.get_text() for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]
    assert 2 <= len(shown) <= 12
    assert all(re.fullmatch(r"[\d.]+", text) for text in shown), shown


def test_files_hold_null_for_what_is_not_finite(tmp_path):
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / "b.json", {"loss": float("nan"), "each": [1.5, -float("inf")], "of": ({"x": 2},)})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"loss": None, "each": [1.5, None], "of": [{"x": 2}]}
    study = read_study(FILE.replace("client_rate: [1, 2.0]", "server_rate: [1e30, 2.0]"))
    assert run_study(study, tmp_path / "study")
    run = json.loads((tmp_path / "study/tuning/first-order/0-0.json").read_text())
    assert run.get("loss") is None
    assert "finite" in run["failure"]
    texts = [path.read_text() for path in (tmp_path / "study").glob("**/*.json")]
    assert not re.search(r"^[^\"]*(\"[^\"]*\": *)?-?(NaN|Infinity)", "".join(texts), re.M)
    assert study_table(study, tmp_path / "study")["methods"]["first-order"]["trial"] == 1


MINE = """
import torch
from torch import nn

from hosfl import Task


class Error:
    higher_is_better = False

    def __call__(self, outputs, labels):
        return (outputs.squeeze(-1) - labels).abs().mean()


def make(says: str = "task"):
    x = torch.randn(160, 6)
    data = {"train": (x[:80], x[:80].sum(1)), "validation": (x[80:120], x[80:120].sum(1))}
    error = Error()
    scored = {"metrics": {"mean error": error if says == "metric" else lambda outputs, y: error(outputs, y)}}
    return Task(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), at=1, **data,
        test=(x[120:], x[120:].sum(1)), loss=lambda outputs, y: nn.functional.mse_loss(outputs.squeeze(-1), y),
        **({} if says == "score" else scored),
        lower_is_better=("mean error",) if says == "task" else (),
    )
"""
ERRORS = """
base: {task: TASK, options: {says: task}, clients: 2, sampled: 2, partition: iid, method: first-order, client_rate: 0.1}
rounds: 20
tuning_seeds: [0]
seeds: [1]
methods:
  mine: {grid: {server_rate: [1e-6, 0.05]}}
"""


@pytest.mark.parametrize(("says", "chosen"), [("task", 1), ("metric", 1), ("nobody", 0)])
def test_the_least_error_is_chosen_where_the_task_or_its_metric_says_so(says, chosen, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    text = ERRORS.replace("TASK", f"{tmp_path / 'mine.py'}:make").replace("says: task", f"says: {says}")
    assert run_study(read_study(text), tmp_path / "study")
    found = json.loads((tmp_path / "study/table.json").read_text())
    errors = [trial["accuracy"] for trial in found["trials"]]
    assert errors[0] > errors[1]
    assert found["methods"]["mine"]["trial"] == chosen
    assert (found["metric"], found["lower_is_better"]) == ("mean error", bool(chosen))
    assert ("The lower the mean error, the better." in report(tmp_path / "study").read_text()) == bool(chosen)


def test_results_from_before_tasks_said_what_is_better(whole, tmp_path):
    """Of them the perplexity is better when lower, and nothing else."""
    for name in ("perplexity", "accuracy"):
        folder = tmp_path / name
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("runs"))
        for path in folder.glob("*/*/*.json"):
            run = json.loads(path.read_text())
            assert run.pop("lower_is_better") == []
            path.write_text(json.dumps(run | {"scores": {name: run["accuracy"]}}))
        study = load_study(folder / "study.yaml")
        assert study_table(study, folder)["lower_is_better"] == (name == "perplexity")
        means = [t["accuracy"] for t in study_table(study, folder)["trials"] if t["method"] == "frozen"]
        assert best_trials(study, folder)["frozen"] == means.index((min if name == "perplexity" else max)(means))


@pytest.mark.parametrize("better", ["score", "mean error"])
def test_a_failed_run_loses_whatever_the_score(better, tmp_path, monkeypatch):
    """Also where scores are below 0, as the negative loss is: there 0 would be the best."""
    (tmp_path / "mine.py").write_text(MINE)
    text = ERRORS.replace("TASK", f"{tmp_path / 'mine.py'}:make").replace("tuning_seeds: [0]", "tuning_seeds: [0, 2]")
    text = text.replace("1e-6, 0.05", "0.05, 1e-6, 1e-7")
    if better == "score":  # the task has no metrics, then
        text = text.replace("says: task", "says: score")
    study, real = read_study(text), train_once

    def train(config, *more):
        if (config.server_rate, config.seed) in ((0.05, 2), (1e-6, 0)) and config.evaluate_on == "validation":
            raise Diverged("gone")
        return real(config, *more)

    monkeypatch.setattr("hosfl.studies.jobs.train", train)
    assert run_study(study, tmp_path / "study")
    found = json.loads((tmp_path / "study/table.json").read_text())
    assert found["metric"] == better
    assert [trial["accuracies"].count(None) for trial in found["trials"]] == [1, 1, 0]
    assert [trial["accuracy"] is None for trial in found["trials"]] == [True, True, False]
    assert found["methods"]["mine"]["trial"] == 2
    del study.trials["mine"][2]  # where each has a failure, the one that worked better does
    assert best_trials(study, tmp_path / "study")["mine"] == 0


def test_a_metric_that_is_not_finite_is_a_failure(tmp_path):
    """It was null in the run's file, which no study took up again."""
    (tmp_path / "mine.py").write_text(MINE.replace(".abs().mean()", ".abs().mean() / 0 * 0"))
    study = read_study(ERRORS.replace("TASK", f"{tmp_path / 'mine.py'}:make"))
    for _ in range(2):
        assert run_study(study, tmp_path / "study")
    found = study_table(study, tmp_path / "study")
    assert found["methods"]["mine"]["trial"] is None
    assert [trial["failures"] for trial in found["trials"]] == [["the mean error after round 20 is not finite"]] * 2
    assert "failed 1 of 1: the mean error" in report(tmp_path / "study").read_text()


def test_every_trial_of_a_method_diverges(tmp_path):
    study = read_study(FILE.replace("[1e-1, 0.2]", "[1e6, 1e7]"))
    assert run_study(study, tmp_path)
    assert not (tmp_path / "runs" / "ho-fresh").exists()
    page = report(tmp_path).read_text()
    assert "failed: no trial worked" in page
    assert "Not finished" not in page


def test_what_was_chosen_at_an_end_of_its_grid_is_told():
    grids = {
        "inside, top": [(rate, decay) for rate in (1, 2, 4) for decay in (0.0, 0.1, 0.3)],
        "none beyond 0": [(rate, decay) for rate in (1, 2, 4) for decay in (0.0, 0.1, 0.3)],
        "two": [(rate, 0.1) for rate in (1, 2)],
        "failed": [(rate, 0.1) for rate in (1, 2, 4)],
    }
    trials = [
        {"method": method, "trial": n, "choice": {"client_rate": rate, "decay": decay, "rule": "sgd"}}
        for method, grid in grids.items()
        for n, (rate, decay) in enumerate(grid)
    ]
    chosen = {"inside, top": 5, "none beyond 0": 3, "two": 1, "failed": None}
    found = {"methods": {method: {"trial": trial} for method, trial in chosen.items()}, "trials": trials}
    assert at_ends(found).endswith("might do better: inside, top (decay 0.3).")
    found["methods"]["inside, top"]["trial"] = 0
    assert at_ends(found).endswith("might do better: inside, top (client rate 1).")
    found["methods"]["inside, top"]["trial"] = 4
    assert at_ends(found) == ""


def test_the_report_is_whole_and_its_numbers_are_the_runs(tmp_path, whole):
    folder = tmp_path / "study"
    shutil.copytree(whole, folder)
    ways = ("inference", "ho, in place", "ho, in place, two-sided")
    bytes_ = {way: {"peak_extra": 1234567 + 10**6 * n, "cut": 10**5, "of_bound": 0.75} for n, way in enumerate(ways)}
    half = {"what": "a half", "batch": 16, "ways": bytes_}
    machine = json.loads((folder / "runs/frozen/2.json").read_text())["machine"]
    memory = {"machine": machine, "device": "cpu", "bound": 1.1, "halves": {"minilm": half}}
    (folder / "client-memory.json").write_text(json.dumps(memory))
    page = report(folder).read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert set(re.findall(r'src="(.{22})', page)) == {"data:image/png;base64,"}
    assert not re.search(r'href="', page)
    for name in ("curves.png", "memory.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    cells = {
        row[0]: row[1:]
        for row in (re.findall(r"<td[^>]*>(.*?)</td>", line) for line in page.split("Curves</h2>")[0].splitlines())
        if row
    }
    rows = json.loads((folder / "table.json").read_text())["methods"]
    assert cells.keys() == rows.keys()
    for method, row in rows.items():
        runs = [json.loads((folder / f"runs/{slug(method)}/{s}.json").read_text()) for s in (2, 3)]
        mean, error = sum(r["loss"] for r in runs) / 2, abs(runs[0]["loss"] - runs[1]["loss"]) / 2
        assert cells[method][1] == f"{mean:.4f} ± {error:.4f}"
        assert cells[method][3] == number(row["loss_gap_recovered"], None, 2)
        assert cells[method][5] == number(row["loss_gap_in_equal_seconds"], None, 2)
        assert cells[method][6] == number(sum(row["bytes_per_client_round"].values()) / 1e3, None, 1)
    trials = page.split("every trial")[1]
    for trial in json.loads((folder / "table.json").read_text())["trials"]:
        assert f"<td>{trial['loss']:.4f}</td>" in trials
    assert "<td>minilm: ho, in place</td><td>2.23</td><td>0.10</td><td>0.75</td>" in page
    assert machine["torch"] in page
    assert yaml.safe_load(re.search(r"<pre>(.*?)</pre>", page, re.S)[1].replace("&#x27;", "'"))["seeds"] == [2, 3]


def test_a_report_of_a_study_that_is_not_finished(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "study")
    (tmp_path / "study/runs/frozen/3.json").unlink()
    assert "17 of 18 runs are done" in report(tmp_path / "study").read_text()
    shutil.rmtree(tmp_path / "study/runs")
    (tmp_path / "study/tuning/frozen/1-1.json").unlink()
    page = report(tmp_path / "study").read_text()
    assert "11 of 18 runs are done" in page
    assert "Results on test data" not in page


STUDIES = sorted((Path(__file__).parent.parent / "benchmarks/studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_are_fair(path):
    """Equal tuning, both controls, three seeds and more that nothing was tuned on; the page shows them."""
    study = load_study(path)
    assert len({len(trials) for trials in study.trials.values()}) == 1
    assert {"first-order", "frozen"} <= set(study.trials)
    assert not set(study.seeds) & set(study.tuning_seeds)
    assert len(study.seeds) >= 3
    assert f"{path.name}`" in (path.parent / "README.md").read_text()
    for results in (path.parent.parent / "results").glob(f"*/{path.stem}/table.json"):  # they are of this file
        found = json.loads(results.read_text())
        assert list(found["methods"]) == list(study.trials)
        assert [(t["method"], t["choice"]) for t in found["trials"]] == [
            (method, choice) for method, grid in study.grids.items() for choice in choices(grid)
        ]
        assert found["rounds"] == study.rounds

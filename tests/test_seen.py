"""A run that can be seen: scalars for TensorBoard, and the page that says who took part when."""

import json
import math
import re
import shutil
import sys
import time

import numpy as np
import pytest

from hosfl import Config, train
from hosfl.cli import main
from hosfl.engines.engine import Reply
from hosfl.engines.in_process import InProcessEngine
from hosfl.protocol.messages import Invitation, decode, unpack
from hosfl.runs import attendance as page
from hosfl.runs.attendance import STATES, read_events, write_attendance
from hosfl.runs.join import WorkerFactory
from hosfl.runs.serve import Transport

QUICK = {"rounds": 9, "clients": 4, "sampled": 4, "batch": 8, "directions": 1, "evaluate_every": 4, "snapshot_every": 3}
EVALUATED = {"evaluation/loss", "evaluation/accuracy"}
EACH = {"training/loss", "bytes", "clients/took_part", "clients/did_not_answer", "messages/refused"}
EACH |= {"seconds/cuts", "seconds/server", "seconds/answers"}
# What happens to clients whose message of a round, from 0 on, does not arrive as it should.
FAULTS = {(2, 1): "gone", (3, 1): "late", (4, 2): "failed: <b>OSError</b>", (4, 0): "", (5, 3): b"nonsense"}


class Faulty(InProcessEngine):
    """Clients of this process, some of whose answers to invitations are lost or replaced."""

    def ask(self, messages, deadline=None):
        for client, data in messages.items():
            last = decode(unpack(data)[-1])
            fault = FAULTS.get((last.round, client)) if isinstance(last, Invitation) else None
            if fault is None:
                yield Reply(client, self.answer(client, data))
            else:
                yield Reply(client, fault) if isinstance(fault, bytes) else Reply(client, None, fault)


def over():
    return Transport(lambda files, clients: Faulty(WorkerFactory(files)(), clients))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A run whose clients have faults, with both."""
    folder = tmp_path_factory.mktemp("elsewhere") / "run"
    train(Config(**QUICK), folder, transport=over(), tensorboard=True)
    return folder


# --- TensorBoard --------------------------------------------------------------------------------------------------


def points(folder):
    """By tag: pairs of step and value, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def close(value):
    return pytest.approx(value, rel=1e-6)  # a scalar is a float32


def test_the_points_are_the_run_s(tmp_path):
    pytest.importorskip("tensorboard")
    seen, config = [], Config(**QUICK)
    summary = train(config, tmp_path / "run", lambda *state: seen.append(state), tensorboard=True)
    found = points(tmp_path / "run")
    assert found.keys() == EVALUATED | EACH
    assert found["training/loss"] == [(done, close(loss)) for done, loss, _, _ in seen]
    assert found["bytes"] == [(done, close(moved)) for done, _, _, moved in seen]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 4, 8, 9]
    for name in ("loss", "accuracy"):
        assert found[f"evaluation/{name}"] == [(line["round"], close(line[name])) for line in lines]
    assert all([step for step, _ in found[tag]] == list(range(1, 10)) for tag in EACH)
    assert all(value > 0 for phase in ("cuts", "server", "answers") for _, value in found[f"seconds/{phase}"])
    without = train(config, tmp_path / "without")
    assert not (tmp_path / "without/tensorboard").exists()
    assert summary.replicas == without.replicas
    for name in ("config.json", "provenance.json", "server.safetensors", "hosfl.log"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_clients_that_do_not_answer_and_messages_that_are_refused(elsewhere):
    found = points(elsewhere)
    assert [value for _, value in found["clients/took_part"]] == [4, 4, 3, 3, 2, 3, 4, 4, 4]
    assert [value for _, value in found["clients/did_not_answer"]] == [0, 0, 1, 1, 2, 0, 0, 0, 0]
    assert [value for _, value in found["messages/refused"]] == [0, 0, 0, 0, 0, 1, 0, 0, 0]


class Killed(BaseException):
    pass


def test_a_resumed_run_has_no_point_twice(tmp_path):
    """Killed after rounds 5 and 7, with snapshots of 3 and 6."""
    pytest.importorskip("tensorboard")
    config, losses = Config(**QUICK), {}
    train(config, tmp_path / "whole", lambda done, loss, *_: losses.update({done: loss}))

    def kill(at):
        def progress(done, *_):
            found = points(tmp_path / "run")  # now, not when the file is closed
            assert found["training/loss"] == [(n, close(losses[n])) for n in range(1, done + 1)]
            if done == at:
                raise Killed

        return progress

    for at in (5, 7):
        with pytest.raises(Killed):
            train(config, tmp_path / "run", kill(at), resume=at > 5, tensorboard=True)
    train(config, tmp_path / "run", resume=True, tensorboard=True)
    found = points(tmp_path / "run")
    assert found["training/loss"] == [(done, close(loss)) for done, loss in losses.items()]
    assert all([step for step, _ in found[tag]] == list(range(1, 10)) for tag in EACH)
    assert all([step for step, _ in found[tag]] == [0, 4, 8, 9] for tag in EVALUATED)


def test_what_another_run_left_is_void(tmp_path):
    pytest.importorskip("tensorboard")
    train(Config(**QUICK), tmp_path / "run", tensorboard=True)
    shutil.move(tmp_path / "run/tensorboard", tmp_path / "new/tensorboard")
    train(Config(**{**QUICK, "rounds": 2, "seed": 1}), tmp_path / "new", tensorboard=True)
    found = points(tmp_path / "new")
    assert [step for step, _ in found["bytes"]] == [1, 2]
    assert [step for step, _ in found["evaluation/loss"]] == [0, 2]


def test_a_start_that_fails_leaves_no_board(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    (tmp_path / "run/tensorboard").mkdir(parents=True)
    (tmp_path / "run/tensorboard/events.out.tfevents.of-another").write_bytes(b"")

    def fails(*_):
        raise OSError("no broker")

    for others in (1, 0):
        with monkeypatch.context() as patch:
            patch.setattr(Transport, "connect", fails)
            with pytest.raises(OSError, match="no broker"):
                train(Config(**QUICK), tmp_path / "run", transport=over(), tensorboard=True)
        assert len(list(tmp_path.rglob("*"))) == 3 * others  # run, tensorboard and the file of another
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_where_the_package_is_missing_a_run_to_resume_stays_as_it_is(tmp_path, monkeypatch):
    def kill(done, *_):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(Config(**QUICK), tmp_path, kill)
    held = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'hosfl\[tensorboard\]'"):
        train(Config(**QUICK), tmp_path, resume=True, tensorboard=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == held


def test_it_needs_a_folder():
    with pytest.raises(ValueError, match="for TensorBoard needs its folder: out, or --out DIR"):
        train(Config(**QUICK), tensorboard=True)


def test_the_option(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    run = str(tmp_path / "run")
    assert main(["train", "--rounds", "2", "--batch", "8", "--directions", "1", "--tensorboard", "--out", run]) == 0
    assert main(["train", "--resume", run, "--tensorboard"]) == 0  # nothing is left to do
    assert [step for step, _ in points(tmp_path / "run")["bytes"]] == [1, 2]
    assert "tensorboard" not in (tmp_path / "run/config.json").read_text()
    with pytest.raises(SystemExit):
        main(["train", "--tensorboard"])
    assert "--out DIR" in capsys.readouterr().err


# --- who took part when -------------------------------------------------------------------------------------------


def event(number, took=(), missing=(), asked=None, loss=1.0, seconds=2.0):
    missing = {str(client): why for client, why in dict(missing).items()}
    told = {"time": 1.8e9 + 60 * number, "round": number, "loss": loss, "took part": list(took), "missing": missing}
    told |= {"seconds": {"cuts": seconds, "server": 0.1, "answers": 1.0}, "bytes": 1000 * number, "refused": 0}
    return told if asked is None else {**told, "asked": asked}


def written(folder, events, clients=3, rounds=1000, **settings):
    folder.mkdir(exist_ok=True)
    named = {"method": "ho", "task": "digits", "seed": 0, "rounds": rounds, "clients": clients}
    (folder / "config.json").write_text(json.dumps(named | settings))
    lines = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in events]
    (folder / "events.jsonl").write_text("".join(lines))
    return folder


def table(path):
    """Of a page: a client's cells by their heads."""
    text = path.read_text().partition("<h2>Clients</h2>")[2]
    head = re.findall(r"<th>(.*?)</th>", text)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in text.splitlines()]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows if row}


def test_a_run_with_faults(elsewhere, capsys):
    assert main(["report", str(elsewhere)]) == 0
    path = elsewhere / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    assert (elsewhere / "clients.png").read_bytes().startswith(b"\x89PNG")
    text = path.read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(|href=|<b>", text)
    assert "Round 9 of 9, 4 clients" in text
    assert "<h1>Run: ho on digits, seed 0</h1>" in text
    rows = table(path)
    counts = {client: [row[state] for state in STATES] for client, row in rows.items()}
    assert counts == {
        "0": ["8", "", "", "", "1", ""],
        "1": ["7", "1", "1", "", "", ""],
        "2": ["8", "", "", "1", "", ""],
        "3": ["8", "", "", "", "", "1"],
    }
    assert [row["last failure"] for row in rows.values()] == ["", "", "failed: &lt;b&gt;OSError&lt;/b&gt;", ""]
    assert all(row["last took part"].startswith("round 9, 20") for row in rows.values())


def test_rounds_run_again_count_once(tmp_path):
    events = [event(n, [0, 1]) for n in range(1, 7)]
    again = [event(n, [2], loss=2.0) for n in (3, 4)]  # rounds 5 and 6 are void
    written(tmp_path, [*events, *again])
    found, damaged = read_events(tmp_path / "events.jsonl", 1000, 3)
    assert [(e.round, e.loss) for e in found] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert damaged == 0
    rows = table(write_attendance(tmp_path))
    assert [rows[client]["took part"] for client in "012"] == ["2", "2", "2"]
    assert rows["0"]["last took part"] == "round 2, 2027-01-15 08:02 UTC"


def test_lines_that_cannot_be_read(tmp_path):
    good, whole = [event(n, [0]) for n in (1, 2)], json.dumps(event(3, [0]))
    for length in range(len(whole)):
        written(tmp_path, [*good, whole[:length]])
        found, damaged = read(tmp_path)
        assert ([e.round for e in found], damaged) == ([1, 2], 0)
    bad = [
        *("\n", "null\n", "[]\n", "{}\n", "[" * 100_000 + "\n", whole[:40] + whole + "\n"),
        *(event(3, took) for took in ([3], [-1], ["0"], [0.5], [[0]])),
        *(event(3, [0], missing) for missing in ({3: "late"}, {"x": "late"})),
        *(event(n, [0]) for n in (0, 1001, 10**30)),
        *(
            {**event(3, [0]), name: value}
            for name, value in [("time", 1e30), ("time", "now"), ("round", "3"), ("seconds", 1)]
        ),
        *({**event(3, [0]), name: value} for name, value in [("bytes", None), ("loss", "low"), ("took part", 7)]),
    ]
    written(tmp_path, [good[0], *bad, good[1]])
    found, damaged = read(tmp_path)
    assert ([e.round for e in found], damaged) == ([1, 2], len(bad))
    assert f"cannot be read</strong> and do not count: {len(bad)}." in write_attendance(tmp_path).read_text()


def read(folder):
    return read_events(folder / "events.jsonl", 1000, 3)


def cells(events, clients, columns, wide=1, tall=1):
    of = np.array([(e.round - events[0].round) // wide for e in events])
    return page._cells(events, of, columns, clients, tall)


def color(name):
    return [int({**STATES, "not asked": page.NOT_ASKED}[name][n : n + 2], 16) / 255 for n in (1, 3, 5)]


def test_a_cell_has_the_colour_of_what_happened(tmp_path):
    reasons = {0: "gone", 1: "late", 2: "failed: OSError", 3: "lost", 4: "anything else"}
    told = [event(3, [5], reasons, asked=[0, 1, 2, 3, 4, 5, 6]), event(5, [0])]
    written(tmp_path, told, clients=8)
    events, _ = read_events(tmp_path / "events.jsonl", 1000, 8)
    image = cells(events, 8, 3)
    happened = ["gone", "late", "failed", "lost", "failed", "took part", "left out", "not asked"]
    assert image[:, 0] == pytest.approx(np.array([color(name) for name in happened]))
    assert image[:, 1] == pytest.approx(np.array([color("not asked")] * 8))  # a round of which nothing is known
    assert image[0, 2] == pytest.approx(color("took part"))


def test_a_client_that_was_asked_twice_in_a_round_took_part_if_its_last_answer_came(tmp_path):
    written(tmp_path, [event(1, [0], {0: "lost", 1: "lost"}, asked=[0, 1])])
    rows = table(write_attendance(tmp_path))
    assert [[rows[c][state] for state in ("took part", "lost", "left out")] for c in "01"] == [
        ["1", "", ""],
        ["", "1", ""],
    ]


def test_neighbours_share_a_cell(tmp_path):
    """Columns of two rounds, rows of two clients; three clients and rounds."""
    written(tmp_path, [event(1, [0, 2]), event(2, [], {0: "late"}), event(3, [0, 1])])
    events, _ = read(tmp_path)
    image = cells(events, 3, 2, wide=2, tall=2)
    took, late, none = (np.array(color(name)) for name in ("took part", "late", "not asked"))
    assert image[0, 0] == pytest.approx(((took + late) / 2 + none) / 2)
    assert image[0, 1] == pytest.approx(took)
    assert image[1, 0] == pytest.approx(took)
    assert image[1, 1] == pytest.approx(none)


def test_curves_are_means_of_numbers_that_there_are():
    of = np.array([0, 0, 1, 1, 3])
    found = page._means(of, [1.0, 3.0, math.nan, 5.0, math.nan], 4)
    assert found[:2].tolist() == [2.0, 5.0]
    assert np.isnan(found[2:]).all()


def drawn(folder, monkeypatch):
    figures, save = [], page.save_figure
    monkeypatch.setattr(page, "save_figure", lambda figure, *to: figures.append(figure) or save(figure, *to))
    return write_attendance(folder).read_text(), figures[0].axes


def test_the_figure(tmp_path, monkeypatch):
    told = [event(n, [0], {1: "gone"}, loss=None if n == 2 else n, seconds=n) for n in (1, 2, 3)]
    text, (matrix, curve, phases) = drawn(written(tmp_path, told, task="<b>$\\no_formula$"), monkeypatch)
    assert [t.get_text() for t in matrix.get_legend().get_texts()] == ["took part", "gone", "not asked"]
    assert matrix.get_images()[0].get_array().shape == (3, 3, 3)
    assert matrix.collections  # lines between the cells
    np.testing.assert_array_equal(curve.get_lines()[0].get_xydata(), [[1, 1], [2, math.nan], [3, 3]])
    stacked = {patch.get_label(): patch.get_data() for patch in phases.patches}
    assert list(stacked) == ["cuts", "server", "answers"]
    assert stacked["answers"].values == pytest.approx([2.1, 3.1, 4.1])
    assert stacked["answers"].baseline == pytest.approx([1.1, 2.1, 3.1])
    assert "A cell is" not in text
    assert "<b>" not in text
    assert "Last training loss: 3.0000." in text


@pytest.mark.parametrize("events", [[event(7, loss=None)], [event(1, [0]), event(2, loss=None)]])
def test_runs_with_hardly_anything_in_them(events, tmp_path, monkeypatch, recwarn):
    text, _ = drawn(written(tmp_path, [{**event, "seconds": {}} for event in events], clients=1, task=""), monkeypatch)
    assert not recwarn.list
    assert "Last training loss: none: nobody took part" in text
    assert "<h1>Run: ho, seed 0</h1>" in text


def test_thousands_of_rounds_and_clients_stay_readable_and_quick(tmp_path, monkeypatch):
    told = [event(n, range(n % 7, 2000, 40), {n % 2000: "late"}) for n in range(1, 5002)]
    written(tmp_path, told, clients=2000, rounds=10**7)
    begin = time.perf_counter()
    text, (matrix, curve, _) = drawn(tmp_path, monkeypatch)
    assert time.perf_counter() - begin < 20  # seconds; some 2 on a machine that does nothing else
    rows, columns, _ = matrix.get_images()[0].get_array().shape
    assert (rows, columns) == (143, 556)
    assert not matrix.collections
    assert len(curve.get_lines()[0].get_xdata()) == columns
    assert "A cell is 14 clients x 9 rounds" in text
    assert len(table(tmp_path / "report.html")) == 2000
    written(tmp_path, [event(1, [0]), event(10**7, [0])], rounds=10**7)  # as many columns, not more memory
    write_attendance(tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "neither study.yaml nor events.jsonl"),
        ({"config.json": "{}"}, "neither study.yaml nor events.jsonl"),
        ({"events.jsonl": ""}, "there is no config.json"),
        ({"events.jsonl": "", "config.json": "{"}, "config.json is not a run's settings"),
        ({"events.jsonl": "", "config.json": "[]"}, "config.json is not a run's settings"),
        ({"events.jsonl": "", "config.json": '{"method": "ho"}'}, "config.json is not a run's settings: KeyError"),
    ],
)
def test_a_folder_that_has_no_report(files, says, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    try:
        status = main(["report", str(tmp_path)])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_a_run_without_a_round(tmp_path):
    with pytest.raises(ValueError, match="no round yet that can be read"):
        write_attendance(written(tmp_path, ["{"]))
    (tmp_path / "events.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no events\.jsonl"):
        write_attendance(tmp_path)

"""A client's own samples, in files that the server never sees: of every task that reads files, and as arrays."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
import test_lm
import test_squad
import test_text
import torch
from safetensors.torch import save_file
from test_join import Direct, Elsewhere
from test_squad import folder as squad_folder  # noqa: F401
from test_tasks import folder as sentences_folder  # noqa: F401
from test_text import models  # noqa: F401
from test_vision import folder as pictures_folder  # noqa: F401
from test_vision import weights  # noqa: F401

from hosfl import Config, train
from hosfl.engines.engine import JoinError
from hosfl.engines.joining import check_cut
from hosfl.runs.assemble import assemble
from hosfl.runs.join import ClientFactory, join, read_client_data, read_run
from hosfl.runs.serve import Transport, offered_files
from hosfl.tasks import READERS, make_task
from hosfl.tasks.reading import DataError
from hosfl.tasks.vision import DEVIATION

FEW = {"rounds": 3, "clients": 2, "sampled": 2, "batch": 4, "directions": 2, "evaluate_every": 3, "partition": "iid"}
RATES = {"server_rate": 0.01, "client_rate": 0.01}
TASKS = [("sentences", ""), *((t, k) for t in ("sst2", "rte", "wsc") for k in ("encoder", "decoder")), ("squad", "")]
TASKS += [("lm", ""), ("cifar10", ""), ("cifar10-noisy", "")]
lm_folder = test_lm.folder


@pytest.fixture
def given(request, tmp_path):
    """Settings of a run, and the file or folder of each of two clients: a file of one class, and a folder.

    The first has a text that is longer than any that the server has, where they are texts.
    """
    task, kind = request.param
    mine = tmp_path / "mine"
    mine.mkdir()
    if task == "sentences":
        there = request.getfixturevalue("sentences_folder")
        data, model = there, there / "model"
        (tmp_path / "one.tsv").write_text(f"sentence\tlabel\n{'the film was good ' * 9}\t1\n" + "good film\t1\n" * 8)
        (mine / "train.tsv").write_text("sentence\tlabel\nbad film\t0\ngood film\t1\n")
        files = [tmp_path / "one.tsv", mine]
    elif task == "squad":
        there = request.getfixturevalue("squad_folder")
        data, model = there, there / "model"
        (tmp_path / "one.json").write_text(json.dumps(test_squad.as_json([test_squad.question(0)])))
        some = list(map(test_squad.question, range(7)))
        (mine / "train-v1.1.json").write_text(json.dumps(test_squad.as_json(some)))
        files = [tmp_path / "one.json", mine]
    elif task == "lm":
        there = request.getfixturevalue("lm_folder")
        data, model = there, there / "model"
        longer = {"prompt": "now " * 40 + "the dog likes", "completion": " bones"}
        test_lm.write(tmp_path / "one.jsonl", [longer, *map(test_lm.sample, range(5))])
        test_lm.write(mine / "train.jsonl", map(test_lm.sample, range(7)))
        files = [tmp_path / "one.jsonl", mine]
    elif task.startswith("cifar"):
        data, model = request.getfixturevalue("pictures_folder"), request.getfixturevalue("weights")
        for folder in data.joinpath("train").iterdir():
            (mine / folder.name).mkdir()
            (tmp_path / "other" / "train" / folder.name).mkdir(parents=True)
        (mine / "ship" / "0.png").write_bytes((data / "train" / "ship" / "3.png").read_bytes())
        (tmp_path / "other" / "train" / "frog" / "a.png").write_bytes((data / "train/frog/5.png").read_bytes())
        files = [mine, tmp_path / "other"]
    else:
        model = request.getfixturevalue("models") / kind
        data = test_text.write(task, tmp_path / "data")
        name = test_text.TEXTS[task].files[0]
        lines = (data / name).read_text().splitlines()
        head, rest = (lines[:1], lines[1:]) if task == "sst2" else ([], lines)
        one = tmp_path / f"one{name[-6:] if task != 'sst2' else '.tsv'}"
        longer = rest[0].replace("film", "film" + " and film" * 30).replace("dog ate", "dog ate" + " and ate" * 30)
        one.write_text("\n".join([*head, longer, *rest[3:12:3]]) + "\n")
        (mine / name).write_text("\n".join([*head, *rest[:6]]) + "\n")
        files = [one, mine]
    at = "" if task.startswith("cifar") else "1"
    return Config(task=task, data=str(data), model=str(model), at=at, **FEW, **RATES), files


class WithData(Elsewhere):
    """Clients that have samples of their own, and the model of a run."""

    def __init__(self, files, model):
        super().__init__(len(files))
        self.data, self.model = files, model

    def reply(self, number, data):
        if number not in self.endpoints:
            run, config = read_run(self.files["run"], model=self.model)
            own = read_client_data(str(self.data[number]), config, run["cut"][0])
            clients = ClientFactory(run, config, self.files["base"], own)
            self.endpoints[number] = clients.endpoint(number, clients.samples(number), alone=True)
        return self.endpoints[number].answer(data)


@pytest.mark.parametrize("given", TASKS, indirect=True, ids=["-".join(filter(None, task)) for task in TASKS])
def test_clients_with_files_of_their_own(given, tmp_path):
    config, files = given
    engine = WithData(files, config.model)
    found = train(config, tmp_path / "run", transport=Transport(engine))
    assert found.refused == []
    assert found.replicas.equal
    assert found.replicas.digest != train(config).replicas.digest


def test_every_task_that_reads_files_is_here():
    assert {task for task, _ in TASKS} | {"cifar100", "cifar10-inverted"} == set(READERS)


@pytest.mark.parametrize("given", [("cifar10", "")], indirect=True)
def test_classes_are_numbered_by_all_folders(given, tmp_path):
    config, (mine, other) = given
    assert read_client_data(str(mine), config, 1).labels.tolist() == [8]
    assert read_client_data(str(other), config, 1).labels.tolist() == [6]
    (mine / "cat").rmdir()
    with pytest.raises(DataError, match="10 folders, one per class, are needed, there are 9"):
        read_client_data(str(mine), config, 1)


@pytest.mark.parametrize("given", [("sst2", "encoder"), ("sentences", "")], indirect=True, ids=["sst2", "sentences"])
def test_labels_that_are_none(given, tmp_path):
    config, (one, _) = given
    one.write_text("sentence\tlabel\ngood film\tnone\n")
    with pytest.raises(DataError, match=r"one\.tsv.*line 2: label 'none'"):
        read_client_data(str(one), config, 64)
    with pytest.raises(FileNotFoundError):
        read_client_data(str(tmp_path / "nowhere.tsv"), config, 64)


def arrays_of(config, count=5):
    """What a user would make of a task's own tokens."""
    data = make_task(config).train[:count]
    return {**{name: value.numpy() for name, value in data.inputs.items()}, "labels": data.labels.numpy()}


@pytest.mark.parametrize("given", [("sentences", ""), ("lm", "")], indirect=True, ids=["sentences", "lm"])
def test_arrays_of_tokens(given, tmp_path):
    config, _ = given
    np.savez(tmp_path / "mine.npz", **arrays_of(config))
    (tmp_path / "mine.py").write_text(
        f"import numpy as np\ndef samples():\n    return dict(np.load({str(tmp_path / 'mine.npz')!r}))\n"
    )
    engine = WithData([tmp_path / "mine.npz", f"{tmp_path}/mine.py:samples"], config.model)
    found = train(config, tmp_path / "run", transport=Transport(engine))
    assert found.refused == []
    assert found.replicas.equal


@pytest.mark.parametrize("given", [("sentences", "")], indirect=True, ids=["sentences"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: {"x": a["input_ids"], "labels": a["labels"]}, "the client half does not take these data"),
        (lambda a: {**a, "input_ids": a["input_ids"] + 10**6}, "the client half does not take these data"),
        (lambda a: {k: np.repeat(v, 9, 1) if v.ndim == 2 else v for k, v in a.items()}, "cuts of shape|does not take"),
    ],
    ids=["another name", "tokens that are none", "longer texts"],
)
def test_arrays_that_the_half_does_not_take(given, change, reason, tmp_path):
    config, _ = given
    federation, _ = assemble(config)
    files = offered_files(federation)
    federation.close()
    np.savez(tmp_path / "mine.npz", **change(arrays_of(config)))
    run, config = read_run(files["run"], model=config.model)
    with pytest.raises(DataError, match=reason):
        ClientFactory(run, config, files["base"], read_client_data(str(tmp_path / "mine.npz"), config, run["cut"][0]))


def test_pictures_of_another_size(tmp_path):
    federation, _ = assemble(Config(**FEW, **RATES))
    files = offered_files(federation)
    federation.close()
    np.savez(tmp_path / "mine.npz", inputs=np.zeros((4, 1, 9, 9), np.float32), labels=np.zeros(4, int))
    run, config = read_run(files["run"])
    np.savez(tmp_path / "right.npz", inputs=np.zeros((4, 1, 8, 8), np.float32), labels=np.zeros(4, int))
    ClientFactory(run, config, files["base"], read_client_data(str(tmp_path / "right.npz"), config, 1))
    with pytest.raises(DataError, match=r"the client half makes cuts of shape \[7, 9, 9\], and the server takes \["):
        ClientFactory(run, config, files["base"], read_client_data(str(tmp_path / "mine.npz"), config, 1))


@pytest.mark.parametrize(
    ("made", "texts", "right"),
    [
        ([5, 8], False, True),
        ([4, 8], False, False),
        ([4, 8], True, True),
        ([6, 8], True, False),
        ([4, 7], True, False),
        ([5], True, False),
        ([], False, False),
    ],
)
def test_cuts_of_texts_alone_may_be_shorter(made, texts, right):
    with contextlib.nullcontext() if right else pytest.raises(DataError, match=r"mine: .* cuts of shape"):
        check_cut(made, True, texts, [5, 8], "mine")


@pytest.fixture(scope="module")
def digits():
    """What the server of a run on digits offers."""
    federation, _ = assemble(Config(**FEW))
    files = offered_files(federation)
    federation.close()
    return files


RIGHT = {"inputs": np.zeros((40, 1, 8, 8), np.float32), "labels": np.arange(40) % 10}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"labels": np.full(40, 10)}, "its labels are from 10 to 10, and the server takes 0 to 9"),
        ({"labels": np.arange(40) % 11}, "its labels are from 0 to 10, and the server takes 0 to 9"),
        ({"labels": np.full(40, -1)}, "its labels are from -1 to -1, and the server takes 0 to 9"),
        ({"labels": np.full(40, 0.5)}, "its labels are floating-point numbers, and the server takes integers"),
        ({"labels": RIGHT["labels"][:, None]}, r"a sample's label has the shape \[1\], and the server takes \[\]"),
        ({"inputs": RIGHT["inputs"] * np.nan}, "the client half makes infinite or NaN numbers"),
        ({"inputs": RIGHT["inputs"].astype(int)}, "the client half does not take these data"),
        ({"inputs": RIGHT["inputs"][:, :, :7]}, r"cuts of shape \[7, 7, 8\], and the server takes \[7, 8, 8\]"),
    ],
    ids=["above", "one above", "below", "real", "of another shape", "NaN", "integers", "smaller"],
)
def test_what_the_server_would_refuse_in_every_round(digits, wrong, says, tmp_path):
    np.savez(tmp_path / "right.npz", **RIGHT)
    join(Direct(digits), 0, tmp_path / "state", data=str(tmp_path / "right.npz"))
    np.savez(tmp_path / "mine.npz", **RIGHT | wrong)
    with pytest.raises(DataError, match=rf"mine\.npz: .*{says}"):
        join(Direct(digits), 0, tmp_path / "state", data=str(tmp_path / "mine.npz"))


def whole(folder, kind):
    """A file of arrays, its bytes."""
    path = folder / f"whole.{kind}"
    if kind == "npz":
        np.savez(path, **RIGHT)
    else:
        save_file({name: torch.as_tensor(value) for name, value in RIGHT.items()}, path)
    return path.read_bytes()


def pickled(folder):
    np.savez(folder / "objects.npz", **RIGHT | {"inputs": np.array([print] * 40, object)})
    return (folder / "objects.npz").read_bytes()


def one_array(folder):
    np.save(folder / "one.npy", RIGHT["inputs"])
    return (folder / "one.npy").read_bytes()


DAMAGE = {
    "empty": lambda folder, kind: b"",
    "text": lambda folder, kind: b"hello",
    "cut": lambda folder, kind: whole(folder, kind)[:300],
    "without its end": lambda folder, kind: whole(folder, kind)[:-1],
    "without its begin": lambda folder, kind: whole(folder, kind)[200:],
    "of objects": lambda folder, kind: pickled(folder),
    "one array": lambda folder, kind: one_array(folder),
}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(damage, kind, tmp_path):
    (tmp_path / f"mine.{kind}").write_bytes(DAMAGE[damage](tmp_path, kind))
    with pytest.raises(DataError, match=rf"mine\.{kind} is damaged, or holds no arrays of numbers"):
        read_client_data(str(tmp_path / f"mine.{kind}"), Config(**FEW), 1)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_every_byte_of_a_file_damaged(kind, tmp_path):
    """What is not noticed is in the numbers, or in what nobody reads."""
    good, path = whole(tmp_path, kind), tmp_path / f"mine.{kind}"
    places = [*range(300), *range(300, len(good) - 300, 997), *range(len(good) - 300, len(good))]
    said = []
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            read_client_data(str(path), Config(**FEW), 1)
        except DataError as error:
            said.append(str(error))
    assert len(said) > len(places) / 9
    assert all(str(path) in text for text in said)


def test_files_that_are_not_there(tmp_path):
    for name in ("mine.npz", "mine.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            read_client_data(str(tmp_path / name), Config(**FEW), 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("f = 5", r"mine\.py:f is no function without arguments \(5 is not a callable object\)"),
        ("def f(folder): return 3", r"mine\.py:f is no function without arguments \(missing a required argument"),
        ("def f(): return 3", r"mine\.py:f is a int, which has no length"),
        ("x = 1\ndef f(:", r"data '.*mine\.py:f': .*mine\.py, line 2: "),
        ("def g(): return 3", r"there is no f in .*mine\.py"),
    ],
    ids=["a number", "an argument", "no samples", "syntax", "another name"],
)
def test_functions_that_are_none(text, says, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_client_data(f"{tmp_path}/mine.py:f", Config(**FEW), 1)


@pytest.mark.parametrize("beside", [False, True])
def test_labels_of_items(digits, beside, tmp_path):
    """Those of the first items; all that lie beside them, unless an item's own are others."""
    files = {"first": [10, 10, 0], "last": [0, 0, 10]}
    for name, labels in files.items():
        (tmp_path / f"{name}.py").write_text(
            f"""
import torch
class Items:
    labels = {labels}
    def __init__(self, shift=0):
        self.shift = shift
        if {beside}:
            self.targets = torch.tensor(self.labels) + shift
    def __len__(self):
        return 3
    def __getitem__(self, number):
        return torch.zeros(1, 8, 8), self.labels[number]
def shifted():
    return Items(7)
"""
        )

    def joins(name):
        join(Direct(digits), 0, tmp_path / "state", data=f"{tmp_path}/{name}")

    with pytest.raises(DataError, match=rf"first\.py:Items: its labels are from {0 if beside else 10} to 10"):
        joins("first.py:Items")
    if beside:
        with pytest.raises(DataError, match=r"last\.py:Items: its labels are from 0 to 10"):
            joins("last.py:Items")
        joins("last.py:shifted")
    else:
        joins("last.py:Items")


@pytest.mark.parametrize("given", [("lm", "")], indirect=True, ids=["lm"])
def test_labels_of_tokens(given, tmp_path):
    config, _ = given
    federation, _ = assemble(config)
    files, model = offered_files(federation), config.model
    federation.close()
    right = arrays_of(config)
    for change, says in (
        (right["labels"] * 0 - 100, "all of its labels are -100, which do not count"),
        (right["labels"][:, :-1], "a sample's label has the shape"),
        (right["labels"] + 10**6, "and the server takes 0 to"),
    ):
        np.savez(tmp_path / "mine.npz", **right | {"labels": change})
        with pytest.raises(DataError, match=says):
            join(Direct(files), 0, tmp_path / "state", data=str(tmp_path / "mine.npz"), model=model)


@pytest.mark.parametrize("without", ["labels", "shape", "real", "classes", "ignore_index"])
def test_an_offer_that_does_not_say_which_labels(digits, without):
    told = json.loads(digits["run"])
    (told if without == "labels" else told["labels"]).pop(without)
    with pytest.raises(JoinError, match="no run"):
        read_run(json.dumps(told).encode())


def test_public_samples_are_not_set_aside_of_a_client_s_own(tmp_path):
    config = Config(**FEW | {"trains": "act:2", "public": 40, "directions_from": "fresh", "rule": "adamw"}, **RATES)
    few = make_task(Config(**FEW)).train[:6]
    assert make_task(config, few).public is None
    assert len(make_task(config).train) == len(make_task(replace(config, public=0)).train) - 40
    federation, _ = assemble(config)
    files = offered_files(federation)
    federation.close()
    run, config = read_run(files["run"])
    clients = ClientFactory(run, config, files["base"], few)
    assert torch.equal(clients.samples(1).labels, few.labels)


@pytest.mark.parametrize("given", [("squad", "")], indirect=True, ids=["squad"])
def test_windows_as_long_as_the_server_s(given):
    config, (one, _) = given
    assert read_client_data(str(one), config, 18).length == 18


@pytest.mark.parametrize("given", [("cifar10-noisy", "")], indirect=True, ids=["noisy"])
def test_a_task_s_noise_is_in_a_client_s_pictures_too(given):
    config, (mine, _) = given
    plain = read_client_data(str(mine), replace(config, task="cifar10"), 1).inputs
    change = read_client_data(str(mine), config, 1).inputs - plain
    deviation = torch.tensor(DEVIATION)[:, None, None]
    assert 0.15 < float((change * deviation).std()) < 0.25

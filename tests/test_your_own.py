"""A stranger's model and data: every kind of data and of model, by Python, command line and study; what is refused."""

import copy
import json
import math
import pickle
import random
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, Subset

from hosfl import Config, SplitModel, Task, rebuild, split, train
from hosfl.cli import main
from hosfl.protocol.provenance import ProvenanceError
from hosfl.protocol.terms import Diverged
from hosfl.runs.assemble import assemble
from hosfl.runs.faults import Faults
from hosfl.runs.simulate import simulate
from hosfl.studies.study import read_study
from hosfl.tasks import make_task
from hosfl.tasks.items import Items, as_dataset, global_seed, read
from hosfl.tasks.reading import DataError

FILE = '''
from pathlib import Path
from typing import Optional

import torch
from torch import nn

from hosfl import Task


class Strange(nn.Module):
    """Of no family that the library knows."""

    def __init__(self, hidden):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(x + torch.tanh(self.second(x)))


def soft_margin(outputs, labels):
    return nn.functional.softplus(outputs[:, 0] - outputs[:, 1]).mul(2.0 * labels - 1).exp().log1p().mean()


def make(hidden: int = 16, shift: float = 0.0, name: str = "x"):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(260, 12, generator=random) + shift
    y = (x[:, :6].sum(1) > x[:, 6:].sum(1)).long()
    return Task(
        model=lambda: Strange(hidden), at="second", train=(x[:200], y[:200]), validation=(x[200:230], y[200:230]),
        test=(x[230:], y[230:]), loss=nn.functional.cross_entropy, classes=2,
        rates={"ho": (0.05, 0.2), "first-order": (0.05, 1.0), "frozen": (0.05, 1.0)},
    )


def drawn(n: int = 3, sets: int = 0):
    x = torch.randn(120, 12)
    y = (x.sum(1) > 0).long()
    train = [(x[k::sets], y[k::sets]) for k in range(sets)] if sets else (x, y)
    rates = {"ho": (0.05, 0.2), "frozen": (0.05, 1.0)}
    return Task(Strange(8), train, (x[:40], y[:40]), nn.functional.cross_entropy, at="second", rates=rates, classes=2)


def typed(where: Path, many: Optional[int] = None, few: "int | None" = 3, share: float = 0.5, on: bool = False, **more):
    found.append((where, many, few, share, on, more))
    return make()


def single():
    """Server half with BatchNorm, which takes no single sample."""
    x, y = torch.randn(60, 4), torch.arange(60) % 2
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    return Task(net, (x, y), (x, y), nn.functional.cross_entropy, at=1, rates={"ho": (0.05, 0.2)})


found = []


def nothing():
    return None


def needs(size: int):
    return make(size)
'''
QUICK = {"rounds": 3, "clients": 3, "sampled": 2, "batch": 8, "directions": 2, "pool_size": 8}
RATES = {"server_rate": 0.05, "client_rate": 0.1}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stranger") / "stranger.py"
    path.write_text(FILE)
    return path


def data(n=60, features=4, seed=0):
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 0).long()


def net(features=4):
    return nn.Sequential(nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, 2))


def task(**more):
    x, y = data()
    given = {"model": net, "at": 2, "train": (x[:40], y[:40]), "test": (x[40:], y[40:])}
    return Task(**{**given, "loss": nn.functional.cross_entropy, **more})


# --- by command line, in a study, in Python ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ho", "first-order", "frozen"])
def test_a_stranger_s_file_trains(file, method, tmp_path, capsys):
    command = ["train", "--task", f"{file}:make", "--option", "hidden=8", "--method", method, "--rounds", "4"]
    assert main([*command, "--clients", "4", "--batch", "8", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith(f"{method}: test accuracy")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["task"], config["options"]) == (f"{file}:make", {"hidden": 8})
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_what_a_function_draws_is_the_same_in_every_run(file, tmp_path):
    """A model and data that are made at random in the function, not in one that it gives to Task."""
    config = Config(task=f"{file}:drawn", **QUICK)
    torch.manual_seed(1)
    first = train(config, tmp_path / "run")
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert train(config).provenance == first.provenance
    assert train(config, tmp_path / "run", resume=True).loss == first.loss
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("faults", [{}, {"absence": 0.3}, {"crash_every": 3}])
def test_clients_data_that_a_file_gives_say_how_many_clients_there_are(file, tmp_path, faults):
    settings = {name: value for name, value in QUICK.items() if name not in ("clients", "sampled")}
    config = Config(task=f"{file}:drawn", options={"sets": 2}, snapshot_every=1, **settings)
    summary = train(config, tmp_path / "run")
    assert (summary.config["clients"], summary.config["sampled"]) == (2, 2)
    assert train(config, tmp_path / "run", resume=True).loss == summary.loss
    outcome = simulate(replace(config, rounds=8), Faults(**faults))
    assert outcome.equal
    assert outcome.clients == 2
    assert (outcome.deaths > 0) == ("crash_every" in faults)
    with pytest.raises(ValueError, match="cannot sample 5 of 2 clients"):
        train(replace(config, sampled=5))


def test_options_become_what_the_function_takes(file, tmp_path):
    told = {"where": "a/b", "many": "8", "few": "none", "share": "1e-2", "on": "True", "other": "x"}
    config = Config(task=f"{file}:typed", options=told, **QUICK)
    assert config.options == {"where": "a/b", "many": 8, "few": None, "share": 0.01, "on": True, "other": "x"}
    make_task(config)
    make_task(Config(task=f"{file}:typed", options={"where": Path("c"), "share": 1}))
    found = sys.modules[make_task.__globals__["_load_function"](f"{file}:typed").__module__].found
    assert found[-2:] == [
        (Path("a/b"), 8, None, 0.01, True, {"other": "x"}),
        (Path("c"), None, 3, 1.0, False, {}),
    ]
    train(config, tmp_path / "run")  # the text of a command line and the values of Python are one run
    same = replace(config, options={**config.options, "many": 8})
    assert train(same, tmp_path / "run", resume=True).rounds == 3


def test_a_run_that_learns_from_nobody_fails_and_says_why(file, tmp_path, capsys, caplog):
    command = ["train", "--task", f"{file}:single", "--clients", "3", "--sampled", "2", "--batch", "1", "--rounds", "3"]
    run = tmp_path / "run"
    assert main([*command, "--out", str(run)]) == 1
    why = "the server learnt from no cut in 3 rounds"
    first = r"round 0, client \d: nothing can be learnt from it: ValueError: Expected more than 1 value per channel"
    told = capsys.readouterr().err
    assert re.search(rf"^hosfl: {why}: {first}", told, re.MULTILINE)
    assert caplog.messages[0].startswith("the server learnt from no cut in the first round: round 0, client ")
    summary = json.loads((run / "summary.json").read_text())
    assert re.match(rf"{why}: {first}", summary["failure"])
    assert (summary["rounds"], len(summary["refused"])) == (3, 6)
    assert main(["train", "--resume", str(run)]) == 1  # it still is none, and who refused what is not known any more
    assert why in capsys.readouterr().err
    assert main(["train", "--task", f"{file}:single", "--clients", "3", "--batch", "4", "--rounds", "3"]) == 0


def test_a_run_says_what_was_refused(monkeypatch, caplog):
    bad = iter([True, *[False] * 99])

    def loss(outputs, labels):
        assert not (outputs.requires_grad and next(bad)), "not today"
        return nn.functional.cross_entropy(outputs, labels)

    summary = train(task(loss=loss), **QUICK, **RATES)
    assert (len(summary.refused), summary.failure) == (1, None)
    (said,) = [record.message for record in caplog.records if record.name == "hosfl.federation"]
    assert re.match(r"messages that were refused: 1, such as: round 0, client \d: .* AssertionError: not today", said)


def test_a_server_that_goes_on_knows_whether_it_has_learnt(tmp_path):
    mine = task()
    train(mine, tmp_path / "run", **QUICK, **RATES, snapshot_every=1)
    (tmp_path / "run" / "summary.json").unlink()
    assert train(mine, tmp_path / "run", resume=True, **QUICK, **RATES).failure is None  # without a round of its own


@pytest.mark.learning
def test_a_stranger_s_client_half_learns(file, seed, below):
    """Better than the control that never learns, on the same data: two random features are not enough for them."""
    shared = {"task": f"{file}:make", "options": {"hidden": 2}, "rounds": 60, "clients": 4, "schedule": "constant"}
    learnt = train(Config(method="ho", client_rate=0.03, seed=seed, **shared)).loss
    below(learnt / train(Config(method="frozen", seed=seed, **shared)).loss, 0.5)


def test_options_differ_and_are_in_the_provenance(file, tmp_path):
    outcomes = [
        train(Config(task=f"{file}:make", options=options, **QUICK), tmp_path / str(n))
        for n, options in enumerate(({}, {"hidden": 8}, {"shift": 0.5}))
    ]
    assert len({o.loss for o in outcomes}) == 3
    assert outcomes[0].provenance["data"] == outcomes[1].provenance["data"] != outcomes[2].provenance["data"]
    with pytest.raises(ValueError, match="options was not there, is"):
        train(Config(task=f"{file}:make", options={"hidden": 8}, **QUICK), tmp_path / "0", resume=True)


def test_options_are_in_a_grid(file):
    text = f"""
base: {{task: "{file}:make", clients: 3, sampled: 2, batch: 8, pool_size: 8}}
rounds: 2
seeds: [0]
tuning_seeds: [1]
methods: {{ho: {{grid: {{options: [{{hidden: 4}}, {{hidden: 8}}]}}}}}}
"""
    assert [trial["options"] for trial in read_study(text).trials["ho"]] == [{"hidden": 4}, {"hidden": 8}]
    with pytest.raises(ValueError, match=r"methods.ho.grid.options: .* each once"):
        read_study(text.replace("{hidden: 8}", "{hidden: 4}"))
    with pytest.raises(ValueError, match=r"methods\.ho: task .* has no option hiden"):
        read_study(text.replace("{hidden: 8}", "{hiden: 4}"))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 3", "returns a int: a hosfl.Task is needed"),
        (
            "return hosfl.Task(net, data, data, lambda o, y: o, at=1)",
            "a tensor of one element, the mean over the batch",
        ),
        ("return hosfl.Task(Ways(), data, data, loss, at='head')", "cannot cut a Ways: "),
    ],
)
def test_a_task_that_is_none_is_told_in_one_line(body, says, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        f"""
import torch
from torch import nn
import hosfl
loss, net = nn.functional.cross_entropy, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
data = torch.zeros(80, 4), torch.arange(80) % 2
class Ways(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = net
    def forward(self, x):
        return self.head(self.body(x) if x.sum() > 0 else x)
def make():
    {body}
"""
    )
    quick = ["--clients", "2", "--sampled", "2", "--batch", "8", "--server-rate", "0.1", "--client-rate", "0.1"]
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--task", f"{tmp_path}/mine.py:make", *quick, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stranger_s_study_in_processes_of_its_own(file, tmp_path):
    (tmp_path / "study.yaml").write_text(
        f"""
base: {{task: "{file}:make", options: {{hidden: 8}}, clients: 3, sampled: 2, batch: 8}}
rounds: 3
seeds: [0]
tuning_seeds: [1]
methods:
  frozen: {{settings: {{method: frozen}}, grid: {{server_rate: [0.05]}}}}
  ho: {{settings: {{pool_size: 8}}, grid: {{server_rate: [0.05], client_rate: [0.1]}}}}
  first-order: {{settings: {{method: first-order}}, grid: {{server_rate: [0.05], client_rate: [0.5]}}}}
"""
    )
    command = [sys.executable, "-m", "hosfl.cli", "study", "study.yaml", "--out", "out", "--jobs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "out" / "table.json").read_text())["methods"]) == {"frozen", "ho", "first-order"}


def test_an_object_trains_resumes_and_is_refused_for_another(tmp_path):
    mine = task()
    whole = train(mine, tmp_path / "whole", **QUICK, **RATES, snapshot_every=1)
    assert whole.replicas.equal
    again = train(mine, tmp_path / "whole", resume=True, **QUICK, **RATES)
    assert again.loss == whole.loss
    with pytest.raises(ProvenanceError):
        train(task(test=data(20, seed=5)), tmp_path / "whole", resume=True, **QUICK, **RATES)
    with pytest.raises(ProvenanceError):
        train(task(model=net()), tmp_path / "whole", resume=True, **QUICK, **RATES)
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(tmp_path / "whole")])


class Turned(nn.Module):
    """Pairs of numbers turned as complex ones: the buffer of rotary positions, as published models hold it."""

    def __init__(self, persistent=True):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)), persistent=persistent)

    def forward(self, x):
        return torch.view_as_real(torch.view_as_complex(self.linear(x).unflatten(1, (3, 2))) * self.turn).flatten(1)


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.weight).abs()


@pytest.mark.parametrize("persistent", [False, True])
def test_what_is_complex_stays_so(persistent, tmp_path):
    model = nn.Sequential(Turned(persistent), nn.Tanh(), nn.Linear(6, 2))
    x, _ = data()
    federation, _ = assemble(Config(**QUICK, **RATES), task=task(model=model))
    assert federation.base[0].turn.dtype == torch.complex64
    with torch.no_grad():
        # On the lattice weights are rounded.
        assert torch.allclose(federation.model()(x), model(x), atol=1e-4)
    assert train(task(model=model), tmp_path / "run", **QUICK, **RATES).replicas.equal
    tensors, _ = rebuild(tmp_path / "run" / "hosfl.log", tmp_path / "run" / "base.safetensors")
    assert ("0.turn" in tensors) == persistent


def test_complex_weights_that_move_are_refused():
    model = nn.Sequential(Spectral(), nn.Tanh(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"0\.weight of the client half is complex and moves"):
        train(task(model=model), **QUICK, **RATES)


class Residual(nn.Module):
    """What mixed precision leaves: a sum in float32 beside a product in bfloat16."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6).bfloat16()

    def forward(self, x):
        return x + self.linear(x.bfloat16()).float()


def test_a_server_half_that_takes_another_dtype_than_its_weights():
    mixed = nn.Sequential(nn.Linear(4, 6), Residual(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"the cut is torch\.float32, and the first weights of the server half are"):
        train(task(model=mixed, at=1), **QUICK, **RATES)
    narrow = net().bfloat16()
    narrow[2].float()
    assert train(task(model=(narrow[:2], narrow[2:]), at=None), **QUICK, **RATES).replicas.equal
    assert train(task(model=net), **QUICK, **RATES, dtype="bfloat16").replicas.equal
    both = net().bfloat16()
    assert train(task(model=(both[:2], both[2:]), at=None), **QUICK, **RATES).refused == []


def test_a_cut_without_a_gradient_is_refused():
    class Nearest(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    model = nn.Sequential(nn.Linear(4, 6), Nearest(), nn.Embedding(6, 2))
    with pytest.raises(ValueError, match=r"the cut is torch\.int64, and both halves learn from a gradient"):
        train(task(model=model), **QUICK, **RATES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_refused_by_name():
    layers = torch.ao.quantization.quantize_dynamic(net()[:2], {nn.Linear})
    with pytest.raises(ValueError, match=r"0\._packed_params\.\S+ of the client half is a .* no tensor, as quantised"):
        train(task(model=(layers, net()[2:]), at=None), **QUICK, **RATES)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_cannot_be_copied_is_refused_by_name():
    model = net()
    nn.utils.weight_norm(model[0])
    for mine, at in ((model, 2), ((model[:2], model[2:]), None)):
        with pytest.raises(ValueError, match=r"the task's model cannot be copied: its 0\.weight is a tensor that was"):
            train(task(model=mine, at=at), **QUICK, **RATES)
    assert train(task(model=lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), *net()[1:])), **QUICK, **RATES)


@pytest.mark.parametrize("method", ["ho", "first-order"])
def test_a_client_half_of_which_nothing_moves(method):
    model = nn.Sequential(nn.Flatten(), *net())
    settings = {"rounds": 1, "clients": 2, "sampled": 2, "method": method, **RATES}
    with pytest.raises(ValueError, match=f"has no weights that train, and with the method {method} clients learn"):
        train(task(model=model, at=1), **settings)
    with pytest.raises(ValueError, match="has no weights that train"):
        train(task(model=net().requires_grad_(False).append(nn.Linear(2, 2)), at=3), **settings)
    settings = {"rounds": 1, "clients": 2, "sampled": 2, "method": "frozen", "server_rate": 0.1}
    assert train(task(model=model, at=1), **settings).failure is None


def test_the_given_model_stays_as_it_was():
    mine = task(model=net())
    before = copy.deepcopy(mine.model.state_dict())
    train(mine, **QUICK, **RATES)
    assert all(torch.equal(before[k], v) for k, v in mine.model.state_dict().items())
    assert mine.model.training


# --- kinds of models -----------------------------------------------------------------------------------------------

MODELS = {
    "whole": {"model": net()},
    "halves": {"model": lambda: split(net(), 2), "at": None},
    "a pair": {"model": (nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 2)), "at": None},
    "a function": {"model": net},
    "halves as they are": {"model": split(net(), 2), "at": None},
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model(kind):
    mine = task(**MODELS[kind])
    assert train(mine, **QUICK, **RATES).replicas.equal
    one, two, three = (mine.halves(seed) for seed in (1, 1, 2))
    assert isinstance(one, SplitModel)
    assert one is not two

    def same(a, b):
        return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

    assert same(one, two)
    assert same(one, three) != callable_without_weights(mine.model)


def callable_without_weights(model):
    return not isinstance(model, (nn.Module, tuple))


def test_a_place_of_0_is_a_place():
    """A run's `at` comes before the task's, also where the client half is what lies before all layers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, vocab_size=9)
    x = {"input_ids": torch.ones(4, 3, dtype=torch.int64)}
    mine = task(model=transformers.BertForSequenceClassification(config), at=2, train=(x, Y[:4]), test=(x, Y[:4]))
    sides = [[name for name, _ in mine.halves(0, at).server.named_parameters()] for at in ("", "0", "1")]
    assert [sum("query.weight" in name for name in names) for names in sides] == [1, 3, 2]


@pytest.mark.parametrize("rates", [(1e-4, 1.0), (1.0, 1e-4), (0.5, 0.5), (0.0, 0.0), (0.5,)])
def test_groups_of_an_optimizer_keep_the_ratios_of_their_rates(rates):
    """At the run's rate goes the group with the largest."""
    made = []

    def optimizer(half, decay):
        groups = [{"params": [p], "lr": rate} for p, rate in zip(half.parameters(), rates, strict=False)]
        made.append(torch.optim.SGD(groups, lr=0.3))
        return made[0]

    train(task(optimizer=optimizer), **QUICK, **RATES, schedule="constant")
    found = [group["lr"] for group in made[0].param_groups]
    assert found == [RATES["server_rate"] * (rate / max(rates) if any(rates) else 1) for rate in rates]


class Looks(nn.Module):
    """Of two tables: up the rows of one, or along one whether the outputs are like its rows; the other has no use."""

    def __init__(self, table, up):
        super().__init__()
        self.table, self.up, self.other = table, up, nn.Linear(6, 6)
        self.register_buffer("shift", table.weight.detach()[0])

    def forward(self, x):
        return self.table(x) + self.shift if self.up else self.other(x).mean(1) @ self.table.weight.T


def tied():
    table = nn.Embedding(9, 6)
    client, server = Looks(table, True), Looks(table, False)
    server.shift = client.shift
    return client, server


TIED = {"a pair": tied(), "halves": SplitModel(*tied()), "a function": tied}


@pytest.mark.parametrize("kind", TIED)
def test_what_both_halves_have_becomes_two(kind):
    """As where `split` cuts. Else the server's steps move the weights with which clients begin that come later."""
    x = torch.randint(0, 9, (40, 3), generator=torch.Generator().manual_seed(0))
    mine = task(model=TIED[kind], at=None, train=(x, x[:, 0]), test=(x, x[:, 0]))
    client, server = mine.halves(1)
    assert client.table.weight is not server.table.weight
    assert client.shift is not server.shift
    assert torch.equal(client.table.weight, server.table.weight)
    config = Config(task="", **QUICK | {"sampled": 1, "partition": "iid"}, **RATES)
    federation, _ = assemble(config, task=mine)
    first = federation.base.table.weight.detach().clone()
    trained = federation.server.half.table.weight.detach().clone()
    for number in range(3):
        federation.round(number)
    assert torch.equal(federation.base.table.weight, first)
    assert not torch.equal(federation.server.half.table.weight, trained)
    assert federation.compare_replicas().equal


def test_of_halves_that_have_something_in_common_no_more_is_copied():
    client, server = tied()
    found = task(model=lambda: (client, server), at=None).halves(1)
    assert found.server.other.weight is server.other.weight


class Halved(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(0.5) if self.inplace else x * 0.5


WAYS = {
    **{name: {"method": name} for name in ("ho", "first-order", "hosl", "zo-both", "mu-splitfed")},
    "centered": {"multiplier": "centered"},
    "bfloat16": {"wire": "bfloat16"},
    "grouped": {"server_batch": 64},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_server_half_may_begin_in_place(way):
    """It gets a copy: what it does to that is nobody's, not even its own next pass's."""
    given = {name: value for name, value in QUICK.items() if way != "first-order" or name != "directions"}
    if WAYS[way].get("method", "ho") != "ho":
        del given["pool_size"]
    first = nn.Linear(4, 6)
    nets = [nn.Sequential(first, Halved(inplace), nn.Tanh(), nn.Linear(6, 2)) for inplace in (False, True)]
    nets[1][3].load_state_dict(nets[0][3].state_dict())
    outcomes = [train(task(model=net, at=1), **given, **RATES, **WAYS[way]) for net in nets]
    assert outcomes[0].refused == outcomes[1].refused == []
    assert outcomes[0].loss == outcomes[1].loss
    assert outcomes[0].replicas == outcomes[1].replicas


def test_halves_are_a_module_like_any_other():
    model = net()
    halves = split(model, 2)
    client, server = halves
    x = torch.randn(3, 4)
    assert torch.equal(halves(x), model(x))
    assert torch.equal(server(client(x)), model(x))
    assert list(halves.state_dict()) == ["client.0.weight", "client.0.bias", "server.2.weight", "server.2.bias"]
    halves.eval()
    assert not client.training
    assert not server.training
    assert next(halves.double().parameters()).dtype == torch.float64
    for again in (copy.deepcopy(halves), pickle.loads(pickle.dumps(halves))):
        assert again.client is not halves.client
        assert torch.equal(again(x.double()), halves(x.double()))
    assert sum(p.numel() for p in halves.parameters()) == sum(p.numel() for p in model.parameters())


# --- kinds of data -------------------------------------------------------------------------------------------------


class Numbered(TorchDataset):
    """Counts what is read. noise: random, on every read."""

    def __init__(self, n=60, seed=0, noise=0.0, named=False):
        self.x, self.y = data(n, seed=seed)
        self.noise, self.named, self.read = noise, named, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, number):
        self.read.append(number)
        x = self.x[number] + self.noise * (torch.rand(()) + random.random() + np.random.rand())
        return {"x": x, "labels": int(self.y[number])} if self.named else (x, self.y[number])


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x):
        return torch.tanh(self.inner(x))


def huggingface():
    datasets = pytest.importorskip("datasets")
    x, y = data(40)
    return datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist()})


def frame():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(X.numpy()).sample(frac=1, random_state=0), pandas.Series(Y.numpy()).astype("Int64")


X, Y = data(40)
DATA = {
    "tensors": lambda: ((X, Y), False),
    "arrays": lambda: ((X.double().numpy(), Y.numpy().astype(np.int32)), False),
    "pandas' frame and column": lambda: (frame(), False),
    "lists": lambda: ((X.tolist(), Y.tolist()), False),
    "a pair with names": lambda: (({"x": X}, Y), True),
    "a mapping": lambda: ({"x": X.numpy(), "labels": Y.numpy()}, True),
    "a torch data set": lambda: (Numbered(40), False),
    "a torch data set with names": lambda: (Numbered(40, named=True), True),
    "a Hugging Face data set": lambda: (huggingface(), True),
    "a set for each client": lambda: ([(X[:10], Y[:10]), (X[10:], Y[10:])], False),
    "a torch data set for each client": lambda: ([Numbered(10), Numbered(12, 1), Numbered(9, 2)], False),
}


@pytest.mark.parametrize("method", ["ho", "splitfed"])
@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data(kind, method):
    given, named = DATA[kind]()
    model = (Named(), nn.Linear(6, 2)) if named else net()
    test = ({"x": X[:9]}, Y[:9]) if named else (X[:9], Y[:9])
    mine = task(model=model, at=None if named else 2, train=given, test=test)
    settings = {**QUICK, **RATES}
    if isinstance(given, list):
        del settings["clients"]
    if method == "splitfed":
        settings = {k: v for k, v in settings.items() if k not in ("directions", "pool_size")} | {"local_steps": 2}
    summary = train(mine, method=method, **settings)
    assert summary.rounds == 3
    assert list(summary.scores) == ["accuracy"]
    if isinstance(given, list):
        assert summary.config["clients"] == len(given)


def test_the_same_samples_make_the_same_run_however_they_are_given():
    losses = set()
    for kind in ("tensors", "lists", "a torch data set"):
        losses.add(train(task(train=DATA[kind]()[0]), **QUICK, **RATES).loss)
    assert len(losses) == 1


def test_arrays_of_any_layout_in_memory_are_taken():
    read_only, labels = X.numpy().copy(), Y.numpy()
    read_only.flags.writeable = False
    for array in (read_only, X.flip(0).numpy()[::-1], X.numpy().astype(">f4")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(as_dataset((array, labels), "train").inputs, X)


def test_no_more_is_read_than_is_needed():
    given = Numbered(10_000)
    given.targets = given.y  # as torchvision's data sets have
    mine = task(train=given)
    train(mine, **{**QUICK, "rounds": 2}, **RATES)
    # Up to 1,024 for the digest, one to see what they are like, two to compare the halves, two to try the loss, two
    # clients' batches of two rounds.
    assert len(given.read) <= 1024 + 1 + 2 + 2 + 2 * 2 * 8
    assert len(set(given.read)) < 1100


def test_augmentation_is_a_function_of_seed_client_and_round(tmp_path):
    def run(folder, rounds, **more):
        mine = task(train=Numbered(40, noise=0.5))
        settings = {**QUICK, **RATES, "rounds": rounds, "schedule": "constant", "snapshot_every": 2}
        return train(mine, folder, **settings, **more)

    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    drawn = torch.rand(()), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    whole = run(tmp_path / "a", 6)
    assert (torch.rand(()), random.random(), np.random.rand()) == drawn  # nobody else's numbers moved
    assert run(tmp_path / "b", 6).loss == whole.loss
    assert run(None, 6, seed=1).loss != whole.loss
    (tmp_path / "a" / "snapshot-00000006.safetensors").unlink()
    assert run(tmp_path / "a", 6, resume=True).loss == whole.loss


@pytest.mark.parametrize("kind", ["targets", "subset", "a Hugging Face data set"])
def test_labels_beside_the_items_are_taken_from_there(kind):
    """To divide the data by class, no item is read."""
    given = Numbered(40)
    given.targets = given.y.tolist()
    if kind == "subset":
        items = as_dataset(Subset(given, range(39, 9, -1)), "train")
        expected = given.y[range(39, 9, -1)]
    elif kind == "targets":
        items, expected = as_dataset(given, "train"), given.y
    else:
        items, expected = as_dataset(huggingface().with_transform(refused), "train"), Y
    assert torch.equal(items.labels, expected)
    assert torch.equal(items[torch.tensor([3, 1])].labels, expected[[3, 1]])
    assert given.read == []
    del given.targets
    assert torch.equal(as_dataset(given, "train").labels, given.y)


def refused(batch):
    raise AssertionError("an item was read")


def test_regression_has_labels_that_are_no_classes():
    x, _ = data()
    mine = task(
        model=nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)),
        train=(x[:40], x[:40].sum(1)),
        test=(x[40:], x[40:].sum(1)),
        loss=lambda outputs, labels: nn.functional.mse_loss(outputs[:, 0], labels),
    )
    for method, more in (("ho", {}), ("zo-both", {})):
        summary = train(mine, method=method, partition="iid", **QUICK, **RATES, **more)
        assert summary.scores == {"score": -summary.loss}
        assert summary.replicas.equal
    with pytest.raises(ValueError, match="labels that are no classes cannot divide the data: use partition iid"):
        train(mine, **QUICK, **RATES)
    grouped = task(**{**vars_of(mine), "groups": torch.arange(40) // 14})
    assert train(grouped, **QUICK, **RATES).rounds == 3


def vars_of(mine):
    return {name: getattr(mine, name) for name in ("model", "train", "test", "loss")}


def test_metrics_are_of_the_whole_set():
    seen = []

    def metric(outputs, labels):
        seen.append((len(outputs), len(labels)))
        return torch.tensor(0.25)

    mine = task(metrics={"mine": metric, "other": lambda outputs, labels: 1}, test=Numbered(150))
    summary = train(mine, **QUICK, **RATES)
    assert summary.scores == {"mine": 0.25, "other": 1.0}
    assert set(seen) == {(150, 150)}


def test_real_labels_are_checked_by_the_server():
    x, y = data()
    mine = task(train=(x, y.float()), test=(x, y.float()), loss=lambda o, t: (o[:, 0] - t).square().mean())
    real, _ = assemble(Config(task="", partition="iid", **QUICK, **RATES), task=mine)
    client = real.load_client(real.invited(0)[0])
    real.catch_up(client)
    cut = client.output(0)
    assert real.server.step(0, [replace(cut, labels=cut.labels * float("nan"))])[0] == {}
    assert "infinite or NaN labels" in real.server.refused[-1]
    assert real.server.step(0, [replace(cut, labels=cut.labels.int())])[0] == {}
    assert real.server.step(0, [cut])[0]


# --- what is refused -----------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


class Ragged(Numbered):
    def __getitem__(self, number):
        return torch.zeros(4 + number % 2), 0


class Wrong(Numbered):
    def __getitem__(self, number):
        return {"x": X[0]} if self.named else X[0]


class Counted(Endless):
    def __len__(self):
        return 40


REFUSED = {
    "an iterable data set": ({"train": Endless()}, DataError, "train is a Endless, which has no length"),
    "an iterable data set with a length": ({"train": Counted()}, DataError, "train is a Counted, which has no length"),
    "a list of samples": ({"train": [(X[0], 1)]}, DataError, "is a list, which has one data set for each client"),
    "labels beyond int32": ({"train": (X, Y + 2**40)}, DataError, "train: labels from 1099511627776 to .*int32"),
    "labels that are not finite": ({"test": (X, Y / 0)}, DataError, "test: labels that are infinite or NaN"),
    "complex labels": ({"train": (X, Y * 1j)}, DataError, "train: labels that are torch.complex64"),
    "a class too many": ({"test": (X, Y + 1), "classes": 2}, DataError, "test has labels from 1 to 2, .*from 0 to 1"),
    "a class below 0": ({"train": (X, Y - 1), "classes": 2}, DataError, "train has labels from -1 to 0"),
    "classes that are none": ({"train": (X, Y / 2), "classes": 2}, DataError, "torch.float32: with classes = 2"),
    "no metrics": ({"metrics": {}}, ValueError, "metrics is empty: name one, or leave it out"),
    "a list of metrics": ({"metrics": [max]}, TypeError, "metrics is a list: a mapping is needed"),
    "a metric that is none": ({"metrics": {"m": 1}}, TypeError, "the metric 'm' is a int: a function"),
    "scores that are none": ({"scores": 1}, TypeError, "scores is a int"),
    "metrics and scores": ({"scores": max, "metrics": {"m": max}}, ValueError, "metrics and scores: give one"),
    "less of no metric": ({"lower_is_better": ("m",)}, TypeError, "has 'm', and the task's metrics are left out"),
    "less of another metric": (
        {"metrics": {"m": max}, "lower_is_better": ["n"]},
        TypeError,
        "lower_is_better has 'n', and the task's metrics are m",
    ),
    "less of a word": ({"lower_is_better": "m"}, TypeError, "lower_is_better is 'm': a tuple of names"),
    "no optimizer": ({"optimizer": None}, TypeError, "optimizer is a NoneType: a function of a half"),
    "rates without names": ({"rates": (0.1, 0.1)}, TypeError, "rates is a tuple: a mapping is needed"),
    "one rate": ({"rates": {"ho": 0.1}}, ValueError, "rates of 'ho' are 0.1: a server rate and a client rate"),
    "one rate in a tuple": ({"rates": {"ho": (0.1,)}}, ValueError, "rates of 'ho' are"),
    "four rates": ({"rates": {"ho": (0.1, 0.1, 0.1, 0.1)}}, ValueError, "rates of 'ho' are"),
    "a negative rate": ({"rates": {"ho": (0.1, -0.1)}}, ValueError, "rates of 'ho' are"),
    "an endless rate": ({"rates": {"ho": (0.1, float("inf"))}}, ValueError, "rates of 'ho' are"),
    "groups that are no numbers": ({"groups": ["a"] * 40}, DataError, "groups: no array of integers .*number them"),
    "groups that are shares": ({"groups": [0.5] * 40}, DataError, "groups of shape .*torch.float32: one integer"),
    "groups of clients' data": ({"train": [(X, Y)], "groups": [1] * 40}, ValueError, "divided already: leave out"),
    "no data": ({"train": None}, DataError, "train is a NoneType"),
    "inputs alone": ({"train": X}, DataError, "train is a Tensor"),
    "a triple": ({"train": (X, Y, Y)}, DataError, r"train is a tuple of 3: a pair \(inputs, labels\) is needed"),
    "a mask of weights": (
        {"train": ({"x": X, "attention_mask": X.clamp(0.25, 1)}, Y)},
        DataError,
        "train: attention_mask has 0.25, and it is of 0 and 1",
    ),
    "a mask of twos": (
        {"test": ({"x": X, "attention_mask": 2 + 0 * X.long()}, Y)},
        DataError,
        "test: attention_mask has 2, and it is of 0 and 1",
    ),
    "a mask of pairs": (
        {"train": ({"x": X, "attention_mask": torch.ones(40, 4, 4)}, Y)},
        DataError,
        r"train: attention_mask of shape \(40, 4, 4\), and \[samples, tokens\] is needed",
    ),
    "sparse inputs": ({"train": (X.to_sparse(), Y)}, DataError, "train, inputs: laid out as torch.sparse_coo: make it"),
    "empty": ({"test": (X[:0], Y[:0])}, DataError, "test has no samples"),
    "an empty list": ({"train": []}, DataError, "train is an empty list: one data set for each client"),
    "a bad set of a client": ({"train": [(X, Y), X]}, DataError, "train of client 1 is a Tensor"),
    "no labels by name": ({"train": {"x": X}}, DataError, "train has x; one must be called labels"),
    "lengths that differ": ({"train": (X[:5], Y)}, DataError, "train has 40 labels, and inputs of shape"),
    "words": ({"train": (["a", "b"], [0, 1])}, DataError, "train, inputs: no array of numbers"),
    "text": ({"train": (X, np.array(["a", "b"] * 20))}, DataError, "train, labels: text or objects: make numbers"),
    "no model": ({"model": 3}, TypeError, "model is a int: a module, two halves or a function"),
    "no loss": ({"loss": "mse"}, TypeError, "loss is a str: a function of outputs and labels"),
    "groups of another length": ({"groups": [1, 2]}, DataError, r"groups of shape \(2,\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_task_that_is_none(what):
    more, error, reason = REFUSED[what]
    with pytest.raises(error, match=reason):
        task(**more)


def crossed(outputs, labels):
    return nn.functional.cross_entropy(outputs.reshape(-1, 2), labels.reshape(-1).long())


class Told(nn.Module):
    """What a half makes, as a function of it."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x):
        return self.change(self.inner(x))


def subtracts(x):
    x -= 0.5
    return x


class First(Told):
    """Told, but of what its inner module gets."""

    def forward(self, x):
        return self.inner(self.change(x))


def first(client):
    return {"model": (First(nn.Linear(4, 6), client), nn.Linear(6, 2)), "at": None}


def made(client=lambda x: x, server=lambda x: x):
    return {"model": (Told(nn.Linear(4, 6), client), Told(nn.Linear(6, 2), server)), "at": None, "loss": crossed}


class Weighed(Numbered):
    def __getitem__(self, number):
        return {"x": self.x[number], "attention_mask": [1, 1, 0.5, 0], "labels": self.y[number]}


class Gone(Numbered):
    def __getitem__(self, number):
        raise KeyError(number)


UNLIKE = {
    "features": (
        [(X, Y), (X[:, :3], Y)],
        r"train of client 1: a sample's inputs are floating-point numbers of shape \(3",
    ),
    "kinds of inputs": ([(X, Y), (X.long(), Y)], "a sample's inputs are integers"),
    "shapes of labels": ([(X, Y), (X, Y[:, None])], r"a sample's labels are integers of shape \(1,\)"),
    "kinds of labels": ([(X, Y), (X, Y.float())], "a sample's labels are floating-point numbers"),
    "names": ([(X, Y), ({"x": X}, Y)], "train of client 1 has x, labels, and train of client 0 has inputs, labels"),
}
IDS = torch.randint(1, 9, (40, 6), generator=torch.Generator().manual_seed(0))
SEEN = (torch.arange(6) < torch.tensor([6, 6, 3, 2] * 10)[:, None]).long()


class Texts(nn.Module):
    """The client half of padded texts. pools: into one place for each."""

    def __init__(self, pools):
        super().__init__()
        self.up, self.pools = nn.Embedding(9, 4), pools

    def forward(self, input_ids, attention_mask):
        hidden = self.up(input_ids) * attention_mask[..., None]
        return hidden.sum(1) if self.pools else hidden


class Tags(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(4, 2)

    def forward(self, cut, attention_mask=None):
        return self.down(cut)


def padded(labels, pools=False, **more):
    texts = {"input_ids": IDS, "attention_mask": SEEN}, labels
    return {"model": (Texts(pools), Tags()), "at": None, "train": texts, "test": texts, "loss": crossed, **more}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, a, b):
        return self.down(torch.tanh(self.up(a + b)))


def tokens(ids):
    halves = nn.Embedding(9, 4), nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
    return {"model": halves, "at": None, "train": (ids, Y), "test": (IDS, Y)}


def one_output(out):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), *out)
    binary = nn.functional.binary_cross_entropy_with_logits
    return {"model": net, "loss": lambda outputs, y: binary(outputs.flatten(), y.float())}


LATER = {
    "labels of tokens that nobody told": (
        padded(IDS % 2, groups=[0, 1] * 20),
        DataError,
        r"train: the loss does not take labels \(2, 6\) .*label for each token\? Then give the task ignore_index",
    ),
    "a client half that pools": (
        padded(IDS[:, 0] % 2, pools=True),
        TypeError,
        r"the cut of 2 samples is a tensor \(2, 4\), and their attention_mask a tensor \(2, 6\)",
    ),
    "one output for each class of two": (one_output([]), TypeError, r"and not \(2, 1\): give metrics="),
    "one output without a dimension": (one_output([nn.Flatten(0)]), TypeError, r"and not \(2,\): give metrics="),
    "a test label without an output": (
        {"test": (X, torch.cat([Y[:-1], torch.tensor([2])]))},
        DataError,
        r"test: the loss does not take labels .*from 0 to 2 with outputs \(2, 2\) \(IndexError: Target 2 is out of",
    ),
    "a client's label below 0": (
        {"train": [(X, Y), (X, torch.cat([Y[:-1], torch.tensor([-1])]))]},
        DataError,
        "train of client 1: the loss does not take labels .*from -1 to 1",
    ),
    "items with a label without an output": (
        {"validation": list(zip(X, [0, 3] * 20, strict=True))},
        DataError,
        "validation: the loss does not take labels .*from 0 to 3",
    ),
    "test samples of another width": (
        {"test": (X[:, :3], Y)},
        DataError,
        r"test: the model does not take samples of float32 \[2, 3\] \(RuntimeError",
    ),
    "a model without numbers": (
        {"model": nn.Sequential(nn.Linear(4, 6, device="meta"), nn.Tanh(), nn.Linear(6, 2))},
        TypeError,
        "the task's model has no numbers for 0.weight, which is on the device meta",
    ),
    **{
        f"clients with other {what}": ({"train": sets, "loss": crossed}, DataError, reason)
        for what, (sets, reason) in UNLIKE.items()
    },
    "test labels of another kind": (
        {"test": (X, Y.float()), "loss": crossed},
        DataError,
        "test: a sample's labels are",
    ),
    "test labels of more dimensions": (
        {"test": (X, Y[:, None]), "loss": crossed},
        DataError,
        "test: a sample's labels",
    ),
    "validation inputs by name": ({"validation": ({"x": X}, Y)}, DataError, "validation has x, labels, and train has"),
    "items without numbers": (
        {"train": Gone()},
        DataError,
        r"train\[0\] cannot be read \(KeyError.* from 0 to 59",
    ),
    "a cut without samples": (made(client=lambda x: x.mean(0)), TypeError, r"the cut of 2 samples is a tensor \(6,\)"),
    "outputs by name": (made(server=lambda x: {"logits": x}), TypeError, "the output of 2 samples is a dict: a tensor"),
    "one output": (made(server=lambda x: x.sum()), TypeError, r"the output of 2 samples is a tensor \(\)"),
    "items with a mask of weights": (
        {"train": Weighed()},
        DataError,
        "train: attention_mask has 0.5, and it is of 0 and 1",
    ),
    "a half that writes its inputs": (first(subtracts), ValueError, "the client half writes into its inputs, .*a copy"),
    "a half with noise": (
        made(client=lambda x: x + 0.1 * torch.randn_like(x)),
        ValueError,
        "the client half in eval mode makes two outputs of the same inputs, .* random numbers in train mode only",
    ),
    "a half that remembers": (
        made(client=lambda x, seen=[]: x * len([seen.append(0), *seen])),
        ValueError,
        "the client half in eval mode makes two outputs of the same inputs, .* keep nothing",
    ),
    "a server half of no weights": ({"model": (nn.Linear(4, 2), nn.Tanh()), "at": None}, ValueError, "no parameters"),
    "an optimizer that is none": ({"optimizer": lambda half, decay: None}, TypeError, "optimizer is a NoneType"),
    "an optimizer that needs a closure": (
        {"optimizer": lambda half, decay: torch.optim.LBFGS(half.parameters())},
        TypeError,
        "the task's optimizer LBFGS evaluates the loss several times a step",
    ),
    "an optimizer of another model": (
        {"optimizer": lambda half, decay: torch.optim.SGD(net().parameters())},
        ValueError,
        "the task's optimizer has none of the server half's parameters",
    ),
    "scores of nothing": ({"scores": lambda outputs, data: None}, TypeError, "the task's scores are None: numbers by"),
    "less of no score": (
        {"scores": lambda outputs, data: {"s": 1.0}, "lower_is_better": ("t",)},
        TypeError,
        "lower_is_better has 't', and the task's metrics are s",
    ),
    "nowhere to cut": ({"at": None}, ValueError, "where is the model to be cut"),
    "no such place": ({"at": 7}, ValueError, "cannot cut at 7; the cut points are"),
    "a function of nothing": ({"model": lambda: None}, TypeError, "the task's model is a NoneType"),
    "ragged items": ({"train": Ragged()}, DataError, "train: inputs of several shapes, such as .*: pad them to one"),
    "items that are no pairs": ({"train": Wrong()}, DataError, r"train\[\d+\] is a Tensor: a pair"),
    "items without labels": ({"train": Wrong(named=True)}, DataError, r"train\[\d+\] has x; one must be called labels"),
    "a loss per sample": (
        {"loss": lambda o, y: nn.functional.cross_entropy(o, y, reduction="none")},
        TypeError,
        "the loss of a batch is a tensor",
    ),
    "a loss that is a sum": (
        {"loss": lambda o, y: nn.functional.cross_entropy(o, y, reduction="sum")},
        TypeError,
        "the loss of a batch is a sum",
    ),
    "several inputs, and no halves": (
        {"model": Pair(), "at": "down", "train": ({"a": X, "b": X}, Y), "test": ({"a": X, "b": X}, Y)},
        TypeError,
        "it takes several inputs, a, b, and only one can be followed; build a SplitModel",
    ),
    "halves, and a place to cut": (
        {"model": (nn.Linear(4, 6), nn.Linear(6, 2)), "at": 1},
        ValueError,
        "cut already: leave out at = 1",
    ),
    "a name that the client half has not": (
        {"model": (Texts(True), Tags()), "at": None, "train": ({"ids": IDS}, Y), "test": ({"ids": IDS}, Y)},
        DataError,
        r"train: the model does not take samples of ids int64 \[2, 6\].* unexpected keyword argument 'ids'",
    ),
    "an unknown token": (
        tokens(IDS.index_put((torch.tensor([30]), torch.tensor([1])), torch.tensor(9))),
        DataError,
        r"train: the model does not take samples of int64 \[2, 6\], from 1 to 9 \(IndexError",
    ),
    "unknown tokens from the start": (tokens(IDS + 9), DataError, r"train: the model does not take .*, from 11 to 17 "),
    "an unknown token of the test data": (
        {**tokens(IDS), "test": (IDS - IDS[7, 2] - 1, Y)},
        DataError,
        r"test: the model does not take .*, from -",
    ),
    "infinite numbers": (
        {"train": (X.index_fill(1, torch.tensor([1]), math.inf), Y)},
        ValueError,
        r"makes infinite or NaN gradients of the example, float32 \[2, 4\]: look for such numbers in the data",
    ),
    "no inputs": ({"train": {"labels": Y}, "test": ({}, Y)}, DataError, "train has no inputs"),
    "classes in a column": (
        {"train": (X, Y[:, None]), "test": (X, Y[:, None])},
        ValueError,
        r"use partition iid, or give groups \(they are int64 \[40, 1\], and classes are integers \[40\]\)",
    ),
    "a loss that is a number": ({"loss": lambda o, y: 1.0}, TypeError, "the loss of a batch is a float"),
    "a metric per sample": (
        {"metrics": {"m": lambda o, y: o.argmax(-1) == y}},
        TypeError,
        "the metric m gives a Tensor that is no number",
    ),
}


@pytest.mark.parametrize("what", LATER)
def test_a_task_that_cannot_run(what, tmp_path):
    more, error, reason = LATER[what]
    clients = len(more["train"]) if isinstance(more.get("train"), list) else QUICK["clients"]
    with pytest.raises(error, match=reason):
        train(task(**more), tmp_path / "run", **{**QUICK, "clients": clients}, **RATES)
    assert not any(tmp_path.glob("run/*"))


class Limited(nn.Linear):
    """It limits its weights before each pass."""

    def __init__(self, limit):
        super().__init__(4, 6)
        self.limit = limit

    def forward(self, x):
        self.limit(self.weight)
        return super().forward(x)


def limited(limit):
    return {"model": (Limited(limit), nn.Linear(6, 2)), "at": None}


class Rows(nn.Embedding):
    def forward(self, x):
        return super().forward(x.abs().long().clamp(max=8)).flatten(1)


WRITERS = {
    "an embedding": {"model": (Rows(9, 4, max_norm=100.0), nn.Linear(16, 2)), "at": None},
    "in place": limited(lambda weight: weight.data.clamp_(0)),
    "in place, in torch's sight": limited(torch.no_grad()(lambda weight: weight.clamp_(-9, 9))),
    "in another place": limited(lambda weight: setattr(weight, "data", torch.renorm(weight.data, 2, 0, 100.0))),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_half_that_writes_its_weights_is_refused(what):
    """Each client would have others, also where nothing of the sample is beyond the limit yet."""
    with pytest.raises(ValueError, match="the client half writes its weights in a forward pass"):
        train(task(**WRITERS[what]), **QUICK, **RATES)


def test_what_is_tried_before_the_first_round_is_what_runs():
    """Labels that a loss leaves out, integers of which no accuracy is asked, and a text without tokens: all run."""
    gone = torch.cat([torch.full((8,), -100), Y[8:]])  # which torch's cross_entropy does not count
    assert train(task(train=(X, gone)), **QUICK, **RATES).rounds == 3
    counts = task(**one_output([]), metrics={"m": lambda outputs, labels: 1.0})
    assert train(counts, **QUICK, **RATES).refused == []
    labels = torch.where(SEEN == 0, -100, IDS % 2)
    tagged = padded(labels, ignore_index=-100)
    tagged["train"][0]["attention_mask"] = torch.cat([SEEN[:-1], 0 * SEEN[:1]])
    assert train(task(**tagged), partition="iid", **QUICK, **RATES).refused == []


@pytest.mark.parametrize("settings", [{}, {"estimator": "backward"}])
def test_a_client_half_may_write_what_makes_the_same_of_a_batch_again(settings):
    assert train(task(**first(torch.relu_)), **QUICK, **RATES, **settings).refused == []


def test_data_stay_as_they_were_given():
    """Also where a half that writes into its inputs was tried on them, and refused."""
    x, y = X.clone(), Y.clone()
    for model in (first(subtracts), {}):
        mine = task(train=[(x, y), (x, y)], test=(x, y), **model)
        with nullcontext() if not model else pytest.raises(ValueError, match="writes into its inputs"):
            train(mine, rounds=2, batch=8, **RATES)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


def test_a_half_may_draw_in_train_mode_and_make_what_is_no_number():
    """Dropout is no noise, as clients run in eval mode; NaN, which is not equal to itself, is none either."""
    drops = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))
    assert train(task(model=drops), **QUICK, **RATES).refused == []
    with pytest.raises(Diverged, match="before the first round is not finite: look for NaN in the data"):
        train(task(**made(client=lambda x: x / 0 * 0)), **QUICK, **RATES)


def test_what_is_evaluated_on_may_be_larger():
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(40, 1, 12)
    mine = task(model=net, train=(x[:, :, :8], Y), test=(x, Y))
    assert train(mine, **QUICK, **RATES).rounds == 3


def test_a_function_that_gives_one_module_again_is_refused():
    """It was changed by the run before."""
    one = net()
    client, server = nn.Linear(4, 6), nn.Linear(6, 2)
    for mine in (task(model=lambda: one), task(model=lambda: (client, server), at=None)):
        train(mine, **QUICK, **RATES)
        with pytest.raises(ValueError, match="gives the same module again, which a run has changed"):
            train(mine, **QUICK, **RATES)


def test_settings_beside_a_task():
    with pytest.raises(ValueError, match="no rates are tuned for ho pool normalized: give server_rate and client_rate"):
        train(task(), **QUICK)
    with pytest.raises(ValueError, match="no rates are tuned for ho pool normalized, only for hoo: give server_rate"):
        train(task(rates={"hoo": (0.1, 0.1)}), **QUICK)
    with pytest.raises(TypeError, match="there is no setting round"):
        train(task(), round=3)
    with pytest.raises(TypeError, match="a Task has its own data and model"):
        train(task(), data="/tmp")
    with pytest.raises(TypeError, match="method beside a Config: give them to Config"):
        train(Config(), method="ho")
    with pytest.raises(TypeError, match="train needs a Task or a Config, not a str"):
        train("digits")
    with pytest.raises(ValueError, match="the task has no validation data"):
        train(task(), **QUICK, **RATES, evaluate_on="validation")
    clients = task(train=[(X, Y), (X, Y)])
    with pytest.raises(ValueError, match="the task has the data of 2 clients, not of 5: leave out clients"):
        train(clients, **RATES, clients=5)
    with pytest.raises(ValueError, match="the task's model is cut already: leave out at"):
        train(task(model=split(net(), 2), at=None), at="1", **QUICK, **RATES)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("make", {"hiden": 3}, "has no option hiden; it has hidden, shift, name"),
        ("make", {"hidden": "x"}, "option hidden: a whole number is needed, got 'x'"),
        ("make", {"hidden": 2.5}, "option hidden: a whole number is needed, got 2.5"),
        ("make", {"name": 3}, "option name: text is needed, got 3"),
        ("typed", {"where": "x", "few": "y"}, "option few: a whole number or none is needed, got 'y'"),
        ("needs", {}, "needs the option size: --option size=VALUE"),
        ("no", {}, "there is no no in"),
        ("Task.", {}, "there is no Task. in"),
    ],
)
def test_options_that_are_none(file, name, options, reason):
    with pytest.raises(ValueError, match=reason):
        Config(task=f"{file}:{name}", options=options)


def test_settings_that_a_stranger_s_function_does_not_read(file):
    for setting in ("data", "model", "at"):
        with pytest.raises(ValueError, match=f"has its own {setting}: leave out {setting}"):
            Config(task=f"{file}:make", **{setting: "x"})
    with pytest.raises(TypeError, match="returns a NoneType"):
        make_task(Config(task=f"{file}:nothing"))
    with pytest.raises(ValueError, match="task 'digits' has no option hidden; it has none"):
        Config(options={"hidden": 3})


def test_reading_does_not_move_other_random_numbers(monkeypatch):
    torch.manual_seed(1)
    # Of a device that is not in use yet no seed is set either: nobody could put it back.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a device's seed is set"))
    before = torch.random.get_rng_state()
    with global_seed(3):
        first = torch.rand(3), random.random(), np.random.rand()
    with global_seed(3):
        assert torch.equal(torch.rand(3), first[0])
        assert (random.random(), np.random.rand()) == first[1:]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_digests_are_of_content():
    given = Numbered(2000)
    items = as_dataset(given, "train")
    assert isinstance(items, Items)
    once = items.digest()
    assert as_dataset(Numbered(2000), "train").digest() == once
    assert len(given.read) == 1024
    other = Numbered(2000)
    other.x[0] += 1
    assert as_dataset(other, "train").digest() != once
    assert as_dataset(Numbered(1999), "train").digest() != once
    assert read(items[:3]).labels.tolist() == given.y[:3].tolist()


class Refers(nn.Module):
    """Its second layer has the first one's weight, in a list so that it is one parameter."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.shared = [self.layer.weight]

    def forward(self, x):
        return self.head(nn.functional.linear(torch.tanh(self.layer(x)), self.shared[0]))


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({}, True),  # weights move in place, and every reference sees it
        ({"estimator": "backward", "directions_from": "fresh"}, True),
        ({"dist": "gaussian"}, False),
        ({"estimator": "forward"}, False),
        ({"probes_at_once": 2}, False),
        ({"method": "zo-both"}, False),
        ({"method": "hosl"}, False),
        ({"method": "first-order"}, True),
    ],
)
def test_a_half_that_reads_weights_by_references_of_its_own(settings, taken):
    own = task(model=lambda: (Refers(), nn.Linear(2, 2)), at=None)
    quick = {"rounds": 2, "clients": 3, "batch": 8, **RATES}
    if taken:
        train(own, **quick, **settings)
    else:
        with pytest.raises(ValueError, match="reads a weight by a reference of its own"):
            train(own, **quick, **settings)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from 3.11 on")
def test_an_item_that_cannot_be_read_is_named():
    class Broken(TorchDataset):
        def __len__(self):
            return 5

        def __getitem__(self, number):
            if number == 3:
                raise OSError("truncated")
            return torch.zeros(2), 0

    items = as_dataset(Broken(), "train")
    with pytest.raises(OSError, match="truncated") as raised:
        read(items)
    assert raised.value.__notes__ == ["while train[3] was read"]

"""A method is one file: what it says of itself, and one of a user's own by name."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hosfl import Config, Method
from hosfl.cli import main
from hosfl.methods import METHODS, method_of
from hosfl.references import load_object, short_name
from hosfl.runs.assemble import assemble
from hosfl.settings import CONCERNS, DEFAULTS, FIELDS
from hosfl_kernels import SGD, AdamW

SIGNS = str(Path(__file__).parent.parent / "examples/signs.py") + ":Signs"
QUICK = ["--rounds", "3", "--batch", "8", "--clients", "4"]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_of_itself(name):
    method = method_of(name)
    module = importlib.import_module(method.__module__)
    assert issubclass(method, Method)
    assert "er client and round" in module.__doc__ or name == "checkpointed", "what it sends"
    assert method.__doc__
    assert set(method.reads) <= FIELDS.keys()
    assert len(set(method.reads)) == len(method.reads)
    for settings, rates in method.ways.values():
        assert settings.keys() <= {*method.reads, "aggregation", "schedule"}
        assert len(rates) == 3
        Config(**{"method": name, **settings})
    assert len(method.server_rates) == 3


def test_ways_have_names_of_their_own():
    ways = [way for name in METHODS for way in method_of(name).ways]
    assert len(set(ways)) == len(ways)


def test_every_setting_is_of_one_concern():
    names = [f.name for concern in CONCERNS for f in dataclasses.fields(concern)]
    assert len(set(names)) == len(names)
    assert set(names) == set(Config.names()) == DEFAULTS.keys()
    for concern in CONCERNS:
        assert concern() == concern(**{f.name: DEFAULTS[f.name] for f in dataclasses.fields(concern)})
        for f in dataclasses.fields(concern):
            assert f"{f.name}" in concern.__doc__, f.name


@pytest.mark.parametrize("rule", ["sgd", "normalized", "momentum", "adamw"])
def test_a_rule_is_one_optimizer_in_every_method(rule):
    """But that a pool's Adam, whose coefficients are measured a few times only, forgets sooner."""
    told = {"rule": rule, "client_rate": 0.1, "server_rate": 0.1, "clients": 2, "sampled": 2}
    methods = ({"method": "first-order"}, {"method": "splitfed"}, {"directions_from": "pool"})
    first_order, splitfed, pool = (assemble(Config(**told, **method))[0] for method in methods)
    own = splitfed.load_client(0).optimizer([torch.zeros(1, requires_grad=True)])
    for made, betas in (
        (first_order.server.ledger.optimizer, (0.9, 0.999)),
        (own, (0.9, 0.999)),
        (pool.server.ledger.step.optimizer, (0.5, 0.9)),
    ):
        found = {name: made.defaults.get(name) for name in ("momentum", "betas", "weight_decay")}
        if rule == "adamw":
            assert (type(made), made.defaults["eps"]) == (torch.optim.AdamW, 1e-8)
            assert found == {"momentum": None, "betas": betas, "weight_decay": 0}
        else:
            assert type(made) is torch.optim.SGD
            assert found == {"momentum": 0.9 if rule == "momentum" else 0, "betas": None, "weight_decay": 0}
    fresh = assemble(Config(**told, directions_from="fresh", dist="gaussian"))[0].server.ledger.run.rule
    rules = {"momentum": SGD(momentum=0.9), "adamw": AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)}
    assert fresh == rules.get(rule, SGD())


def test_a_method_of_one_s_own_by_name(tmp_path, capsys):
    assert main(["train", "--method", SIGNS, *QUICK, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("Signs: test accuracy")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["replicas"]["equal"]
    assert summary["config"]["method"] == SIGNS
    scalars = [row["bytes_per_client_round"] for row in [summary]]
    assert scalars[0]["scalars up"] == 20
    command = ["compare", "--methods", "ho", SIGNS, "--seeds", "0", *QUICK, "--out", str(tmp_path / "both")]
    assert main(command) == 0
    table = json.loads((tmp_path / "both" / "table.json").read_text())
    assert list(table["methods"]) == ["ho", "Signs"]
    assert table["methods"]["ho"]["losses"] != table["methods"]["Signs"]["losses"]
    assert (tmp_path / "both" / "Signs-0" / "hosfl.log").exists()


def test_it_resumes_and_refuses_settings_that_it_does_not_read(tmp_path):
    assert main(["train", "--method", SIGNS, *QUICK, "--out", str(tmp_path / "run")]) == 0
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    with pytest.raises(ValueError, match=r"local_steps = 3 would do nothing with method '.*signs.py:Signs'"):
        Config(method=SIGNS, local_steps=3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "method must be one of ho, first-order, .*, or FILE.py:NAME or package.module:NAME, got 'nothing'"),
        ("", "method must be one of"),
        (":Signs", "method must be one of"),
        ("signs.py:", "method must be one of"),
        ("no/such.py:Signs", "method: there is no file .*no/such.py"),
        ("no.such.module:Signs", "method: there is no module no"),
        (SIGNS.replace(":Signs", ":Sings"), "there is no Sings in .*signs.py"),
        ("hosfl.settings:PRESETS", "'hosfl.settings:PRESETS' is a dict: a subclass of hosfl.Method is needed"),
    ],
)
def test_names_that_are_none(name, reason):
    with pytest.raises(ValueError, match=reason):
        Config(method=name)


def test_a_file_is_one_module_however_often_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("class It:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    first = load_object("mine.py:It", "thing", {})
    assert load_object(str(tmp_path / "mine.py") + ":It", "thing", {}) is first
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load_object("broken.py:It", "thing", {})
    assert short_name("mine.py:It") == "It"
    assert short_name("ho") == "ho"


def test_help_imports_neither_torch_nor_numpy():
    code = "import sys; from hosfl.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'rich', 'transformers') if m in sys.modules])"
    for arguments in (["--help"], ["train", "--help"], ["simulate", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "[]", (arguments, done.stdout[-300:], done.stderr)

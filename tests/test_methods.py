"""A method is one file: what it says of itself, and one of a user's own by name."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hosfl import Config, Method
from hosfl.cli import main
from hosfl.methods import METHODS, method_of
from hosfl.named import label, named
from hosfl.settings import CONCERNS, DEFAULTS, FIELDS

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
    first = named("mine.py:It", "thing", {})
    assert named(str(tmp_path / "mine.py") + ":It", "thing", {}) is first
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            named("broken.py:It", "thing", {})
    assert label("mine.py:It") == "It"
    assert label("ho") == "ho"


def test_help_imports_neither_torch_nor_numpy():
    code = "import sys; from hosfl.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'rich', 'transformers') if m in sys.modules])"
    for arguments in (["--help"], ["train", "--help"], ["simulate", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "[]", (arguments, done.stdout[-300:], done.stderr)

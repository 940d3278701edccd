"""What works without the packages of extras, and what is said where one is missing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hosfl import extras
from hosfl.cli import main
from hosfl.runs.report import plot_curves
from hosfl.tasks.data import split_held_out
from hosfl.tasks.picture_files import picture_file

# A process where none of these can be imported, of the extras or of what they bring.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
MISSING = {"matplotlib", "sklearn", "scipy", "yaml", "PIL", "nats", "cryptography", "ray", "tensorboard"}
class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Others
"""
WORKS = {
    "help": "from hosfl.cli import main; main(['--help'])",
    "version": "from hosfl.cli import main; main(['--version'])",
    "an optimizer": """
import torch
from hosfl.optim import ZOSGD
x = torch.nn.Parameter(torch.ones(9))
ZOSGD([x], lr=1e-3).step(lambda: (x * x).sum())
assert not torch.equal(x, torch.ones(9))
""",
    "a command that needs torch": "from hosfl.commands import COMMANDS; assert COMMANDS['train']",
    "a run without a folder": """
import torch
from hosfl import Config, train
from hosfl.tasks import digits as tasks
from hosfl.tasks.data import Dataset, Splits
tasks.digits = lambda: Splits(*[Dataset(torch.randn(200, 1, 8, 8), torch.arange(200) % 10)] * 3)
assert train(Config(rounds=2)).rounds == 2
""",
}


@pytest.mark.parametrize("what", WORKS)
def test_this_works_without(what):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + WORKS[what]],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


STUDY = """
rounds: 1
tuning_seeds: [0]
seeds: [1]
methods: {ho: {}}
"""
TRAIN, STUDIES = "train --rounds 1 --out {0}/run", "study {0}/study.yaml --out {0}/run"
COMMANDS = [
    (TRAIN, "sklearn.datasets", "the task digits needs sklearn"),
    (TRAIN, "matplotlib.figure", "a run's folder needs matplotlib"),
    ("compare --rounds 1 --out {0}/run", "matplotlib.figure", "a run's folder needs matplotlib"),
    (STUDIES, "yaml", "a study's file needs yaml"),
    (STUDIES, "matplotlib.figure", "a study's page needs matplotlib"),
    ("report {0}", "yaml", "a study's file needs yaml"),
    (TRAIN + " --tensorboard", "tensorboard", "--tensorboard needs tensorboard"),
]


@pytest.mark.parametrize(("command", "module", "message"), COMMANDS)
def test_a_command_names_the_extra_before_it_writes(command, module, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "study.yaml").write_text(STUDY)
    missing(module, monkeypatch)
    with pytest.raises(SystemExit) as end:
        main(command.format(tmp_path).split())
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert said.endswith(f"pip install 'hosfl[{module if module == 'tensorboard' else 'studies'}]'")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["study.yaml"]


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("sklearn.model_selection", lambda: split_held_out(np.arange(100) % 2)),
        ("PIL.Image", lambda: picture_file(Path("a.png"), (1, 1))),
        ("matplotlib.figure", lambda: plot_curves({}, Path("curves.png"), "")),
    ],
)
def test_a_function_names_the_extra(module, use, monkeypatch):
    missing(module, monkeypatch)
    with pytest.raises(ImportError, match=rf"needs {module}.*: pip install 'hosfl\[studies\]'"):
        use()


def missing(module, monkeypatch):
    for importer in ("hosfl.studies.yaml12", "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, importer, raising=False)
    monkeypatch.setitem(sys.modules, module, None)


def test_a_package_that_needs_a_later_python(monkeypatch):
    """pip would install the extra without it, and say nothing."""
    assert extras.FROM_PYTHON == {"onnxruntime": (3, 11)}
    monkeypatch.setattr(extras, "FROM_PYTHON", {"no_such_package": (99, 1)})
    with pytest.raises(ImportError, match=r"^the client needs no_such_package, and with it Python 99\.1 or later$"):
        extras.require("no_such_package", "the client", "edge")
    with pytest.raises(ImportError, match=r"is missing: pip install 'hosfl\[edge\]'$"):
        extras.require("another_such_package", "the client", "edge")

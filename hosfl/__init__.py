"""HO-SFL: fine-tune split models whose clients cannot afford backpropagation (Chen et al., arXiv 2603.14773).

The public names are imported when they are first asked for: the core of the protocol, and a command line that shows its
help, need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hosfl.extras import require

if TYPE_CHECKING:
    from hosfl.halves.follow import CutError
    from hosfl.halves.split import SplitModel, cut_points, split
    from hosfl.methods.client import Client
    from hosfl.methods.first_order import FirstOrderClient, GradientAverage
    from hosfl.methods.ho import ZerothOrderClient
    from hosfl.methods.ledger import SeedReplay
    from hosfl.methods.method import Method
    from hosfl.methods.server import Server
    from hosfl.methods.steps import FreshStep, PoolStep
    from hosfl.protocol.header import LogError
    from hosfl.protocol.lattice import Lattice, LatticeError
    from hosfl.protocol.log import Log
    from hosfl.protocol.messages import MessageError, Wire, decode, encode
    from hosfl.protocol.replica import Replica
    from hosfl.protocol.terms import Pool, Run
    from hosfl.runs.checkpoint import rebuild
    from hosfl.runs.config import Config
    from hosfl.runs.report import Evaluation, Summary
    from hosfl.runs.trainer import train
    from hosfl.tasks.task import Task

_WHERE = {
    "hosfl.halves.follow": ("CutError",),
    "hosfl.halves.split": ("SplitModel", "cut_points", "split"),
    "hosfl.methods.client": ("Client",),
    "hosfl.methods.first_order": ("FirstOrderClient", "GradientAverage"),
    "hosfl.methods.ho": ("ZerothOrderClient",),
    "hosfl.methods.ledger": ("SeedReplay",),
    "hosfl.methods.method": ("Method",),
    "hosfl.methods.server": ("Server",),
    "hosfl.methods.steps": ("FreshStep", "PoolStep"),
    "hosfl.protocol.lattice": ("Lattice", "LatticeError"),
    "hosfl.protocol.header": ("LogError",),
    "hosfl.protocol.log": ("Log",),
    "hosfl.protocol.messages": ("MessageError", "Wire", "decode", "encode"),
    "hosfl.protocol.replica": ("Replica",),
    "hosfl.protocol.terms": ("Pool", "Run"),
    "hosfl.runs.checkpoint": ("rebuild",),
    "hosfl.runs.config": ("Config",),
    "hosfl.runs.report": ("Evaluation", "Summary"),
    "hosfl.runs.trainer": ("train",),
    "hosfl.tasks.task": ("Task",),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Client",
    "Config",
    "CutError",
    "Evaluation",
    "FirstOrderClient",
    "FreshStep",
    "GradientAverage",
    "Lattice",
    "LatticeError",
    "Log",
    "LogError",
    "MessageError",
    "Method",
    "Pool",
    "PoolStep",
    "Replica",
    "Run",
    "SeedReplay",
    "Server",
    "SplitModel",
    "Summary",
    "Task",
    "Wire",
    "ZerothOrderClient",
    "cut_points",
    "decode",
    "encode",
    "rebuild",
    "split",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hosfl")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(require(_MODULES[name], f"hosfl.{name}", "torch"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

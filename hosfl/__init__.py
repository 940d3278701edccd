"""HO-SFL: fine-tune split models whose clients cannot afford backpropagation (Chen et al., arXiv 2603.14773)."""

from importlib.metadata import version

from hosfl.halves.chain import CutError
from hosfl.halves.split import SplitModel, cut_points, split
from hosfl.methods.client import Client, FirstOrderClient, ZerothOrderClient
from hosfl.methods.ledger import FreshStep, GradientAverage, PoolStep, SeedReplay
from hosfl.methods.server import Server
from hosfl.protocol.lattice import Lattice, LatticeError
from hosfl.protocol.log import Log, LogError
from hosfl.protocol.messages import MessageError, Wire, decode, encode
from hosfl.protocol.replica import Pool, Replica, Run
from hosfl.runs.checkpoint import rebuild
from hosfl.runs.config import Config
from hosfl.runs.report import Evaluation, Summary
from hosfl.runs.trainer import train

__version__ = version("hosfl")

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
    "Pool",
    "PoolStep",
    "Replica",
    "Run",
    "SeedReplay",
    "Server",
    "SplitModel",
    "Summary",
    "Wire",
    "ZerothOrderClient",
    "cut_points",
    "decode",
    "encode",
    "rebuild",
    "split",
    "train",
]

"""HO-SFL: fine-tune split models whose clients cannot afford backpropagation (Chen et al., arXiv 2603.14773)."""

from importlib.metadata import version

from hosfl.chain import CutError
from hosfl.checkpoint import rebuild
from hosfl.client import Client, FirstOrderClient, ZerothOrderClient
from hosfl.config import Config
from hosfl.lattice import Lattice, LatticeError
from hosfl.ledger import FreshStep, GradientAverage, PoolStep, SeedReplay
from hosfl.log import Log, LogError
from hosfl.messages import MessageError, Wire, decode, encode
from hosfl.replica import Pool, Replica, Run
from hosfl.report import Evaluation, Summary
from hosfl.server import Server
from hosfl.split import SplitModel, cut_points, split
from hosfl.trainer import train

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

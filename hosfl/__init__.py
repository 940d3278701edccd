"""HO-SFL: fine-tune split models whose clients cannot afford backpropagation (Chen et al., arXiv 2603.14773)."""

from hosfl.client import Client, FirstOrderClient, Run, ZerothOrderClient
from hosfl.config import Config
from hosfl.lattice import Lattice, LatticeError
from hosfl.messages import MessageError, Wire, decode, encode
from hosfl.report import Evaluation, Summary
from hosfl.server import GradientAverage, SeedReplay, Server
from hosfl.split import SplitModel, split
from hosfl.trainer import train

__all__ = [
    "Client",
    "Config",
    "Evaluation",
    "FirstOrderClient",
    "GradientAverage",
    "Lattice",
    "LatticeError",
    "MessageError",
    "Run",
    "SeedReplay",
    "Server",
    "SplitModel",
    "Summary",
    "Wire",
    "ZerothOrderClient",
    "decode",
    "encode",
    "split",
    "train",
]

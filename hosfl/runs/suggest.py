"""`hosfl suggest`: which weights of a client half to train with a given budget of forward passes.

A run measures P numbers a round about d trainable weights. In the studies (docs/results-studies.md) a client learns
next to nothing if the whole run measures less than one number per weight, and the more numbers, the more it learns. So
the suggestion has few enough weights for the budget, in the layers next to the cut, where probes are cheap.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn

from hosfl.halves.adapters import is_adaptable, largest_rank
from hosfl.halves.blocks import allot_directions, blocks_of, layer_entries, parameter_layers, work
from hosfl.halves.inputs import Inputs
from hosfl.halves.trains import select_trainable
from hosfl.protocol.header import LARGEST_DIRECTIONS
from hosfl.protocol.seeds import Purpose, round_seed
from hosfl.settings import Settings
from hosfl.tasks import make_task
from hosfl.tasks.items import read
from hosfl.tasks.task import Task

NUMBERS_PER_WEIGHT = 15  # numbers that a run should measure for every trainable weight
MAX_RANK = 8


@dataclass(frozen=True)
class Suggestion:
    """Suggested settings, and the reasons for them.

    weights: the number of trainable ones. work: the cost of a round's probes, in forward passes.
    """

    trains: str
    blocks: int
    directions: int
    weights: int
    work: float
    reasons: tuple[str, ...]

    @property
    def settings(self) -> dict[str, object]:
        """The settings as arguments of `hosfl.train`. The update rule stays the default: see docs/forward-passes.md."""
        return {
            "trains": self.trains,
            "blocks": self.blocks,
            "directions": self.directions,
            "directions_from": "fresh",
        }


def suggest(config: Settings, rounds: int = 300, passes: float = 5.0, task: Task | None = None) -> Suggestion:
    """Suggest which layers of a task's client half to adapt, at which rank, and how many directions to measure.

    rounds: of the planned run. passes: the budget for probes in a round, in forward passes of the client half. For each
    candidate two forward passes of two samples are computed; no other data are read.

    Raises ValueError for a budget too small for one direction, and for a half without trainable weights; CutError for a
    half that cannot be divided into blocks.
    """
    if rounds < 1 or not 0 < passes < math.inf:
        raise ValueError(f"rounds and passes must be positive and finite, got {rounds} and {passes}")
    task = make_task(config) if task is None else task.with_public(config.public)

    def half() -> nn.Module:
        return task.halves(round_seed(config.seed, Purpose.MODEL, 0), "" if config.task else config.at).client.eval()

    train = task.train[0] if isinstance(task.train, list) else task.train
    inputs, first = read(train[:2]).inputs, half()
    if any(isinstance(m, nn.modules.batchnorm._NormBase) and m.affine for m in first.modules()):
        suggestion = _suggest_norms(first, inputs, rounds, passes)
    else:
        suggestion = _suggest_adapters(half, inputs, config.seed, task.public is not None, rounds, passes)
    if suggestion is None:
        raise ValueError(f"{passes:g} passes a round are too few for one direction: raise passes")
    return suggestion


def _suggest_adapters(
    half: Callable[[], nn.Module], inputs: Inputs, seed: int, public: bool, rounds: int, passes: float
) -> Suggestion | None:
    """Suggest adapters in the last layers, a block per layer; None if the budget is too small. half: makes a half."""
    first = half()
    named = {path: m for path, m in first.named_modules() if path and is_adaptable(m)}
    if not named:
        raise ValueError(
            "the client half has no linear layer, convolution or BatchNorm that could train: cut the model later"
        )
    numbers = parameter_layers(first, [m.weight for m in named.values()])
    layers = sorted(set(numbers))

    def fit(rank: int, chosen: Mapping[str, int], count: int) -> _Probes | None:
        return _fit_directions(select_trainable(half(), f"xs:{rank}:{','.join(chosen)}", seed), count, inputs, passes)

    for count in range((len(layers) + 1) // 2, 0, -1):  # half of the layers, or fewer where the budget is small
        chosen = {path: n for path, n in zip(named, numbers, strict=True) if n in layers[-count:]}
        if (probes := fit(1, chosen, count)) is None:
            continue
        rank = round((probes.directions * rounds / NUMBERS_PER_WEIGHT / len(chosen)) ** 0.5)
        rank = max(1, min(rank, MAX_RANK, *(largest_rank(named[path]) for path in chosen)))
        if (probes := fit(rank, chosen, count)) is None:
            continue
        weights = len(chosen) * rank**2
        source = "public samples" if public else "the weights; public samples would make better ones"
        return Suggestion(
            trains=f"{'act' if public else 'xs'}:{rank}:{_patterns(first, chosen, named)}",
            blocks=count,
            directions=probes.directions,
            weights=weights,
            work=probes.work,
            reasons=(
                f"train adapters in the last layers, {count} of {len(layers)}: a probe of the last one costs"
                f" {probes.shares[-1]:.2f} of a forward pass",
                f"each direction moves one layer: {probes.directions} directions cost {passes:g} passes a round",
                f"rank {rank}: {weights} weights move, in linear layers: {len(chosen)}; {rounds} rounds"
                f" measure {probes.directions * rounds / weights:.0f} numbers for each weight",
                f"the adapters' fixed matrices are made from {source}",
            ),
        )
    return None


def _suggest_norms(half: nn.Module, inputs: Inputs, rounds: int, passes: float) -> Suggestion | None:
    """Suggest scales and shifts of the BatchNorms; None if the budget is too small."""
    trained = select_trainable(half, "norms", 0)
    weights = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    layers = len(set(parameter_layers(trained, [p for p in trained.parameters() if p.requires_grad])))
    for count in range(min(4, layers), 0, -1):
        probes = _fit_directions(trained, count, inputs, passes)
        if probes is not None:
            directions, numbers = probes.directions, probes.directions * rounds / weights
            advice = "" if numbers >= NUMBERS_PER_WEIGHT else f": raise rounds, {NUMBERS_PER_WEIGHT} or more are wanted"
            reasons = (
                f"train scales and shifts of the BatchNorms, {weights} weights: adapters suit convolutions less",
                f"blocks: {count}; {directions} directions cost {passes:g} passes a round",
                f"{rounds} rounds measure {numbers:.1f} numbers for each weight{advice}",
                "add calibrate=8 where the pictures' distribution has changed",
            )
            return Suggestion("norms", count, directions, weights, probes.work, reasons)
    return None


@dataclass(frozen=True)
class _Probes:
    """The directions that fit a budget. shares: a probe's cost in each block; work: a round's; in forward passes."""

    directions: int
    shares: list[float]
    work: float


def _fit_directions(half: nn.Module, count: int, inputs: Inputs, passes: float) -> _Probes | None:
    """Find the most directions that fit the budget, in `count` blocks; None if one per block is too many."""
    parameters = [p for p in half.parameters() if p.requires_grad]
    begins = blocks_of(half, count, inputs)
    sizes = [float(sum(parameters[t].numel() for t in begin.tensors)) for begin in begins]
    shares = [begin.share for begin in begins]

    def cost(directions: int) -> float:
        return work(allot_directions(directions, sizes, shares), shares)

    counts = range(count, LARGEST_DIRECTIONS + 1)
    fitting = bisect_right(counts, 1.01 * passes, key=cost)  # with a tolerance, since shares are measured
    return _Probes(counts[fitting - 1], shares, cost(counts[fitting - 1])) if fitting else None


def _patterns(half: nn.Module, chosen: Mapping[str, int], named: Mapping[str, nn.Module]) -> str:
    """Return name patterns of the chosen modules for `trains`, with commas between.

    A layer's pattern is that of the module that contains exactly its chosen modules, or else their names.
    """
    patterns, entries = [], layer_entries(half)
    for number in sorted(set(chosen.values())):
        in_layer = [path for path, layer in chosen.items() if layer == number]
        entry = entries[number]
        matching = [path for path in named if entry and fnmatch(path, f"*{entry}.*")]
        patterns += [f"*{entry}.*"] if matching == in_layer else in_layer
    return ",".join(patterns)

"""Servers that measure losses for clients who never see a gradient, and what these clients send."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hosfl.halves.inputs import Inputs, evaluating
from hosfl.methods.server import Server, copy_cut, refusing_failures
from hosfl.probing.displaced import Displacement, casts_forgotten, displaced, evaluate_displaced, refuse_writers
from hosfl.probing.probe import trainable
from hosfl.protocol.messages import Cut, Message, MessageError, ProbedCut


def displaced_outputs(
    module: nn.Module, inputs: Inputs, seeds: Sequence[int], steps: Sequence[float], dist: str, factors: Sequence[float]
) -> Tensor:
    """The module's outputs at th + s u_p, for every direction p and every step s in turn: [P x steps, batch, ...].

    The weights are only read, in eval mode; all outputs are held at once.
    """
    parameters, streams = trainable(module)
    moves = [Displacement(parameters, streams, seed, step, dist, factors) for seed in seeds for step in steps]
    with evaluating(module):
        return torch.stack([evaluate_displaced(module, inputs, move) for move in moves])


@dataclass
class LossServer(Server):
    """A server that measures the losses of displaced cuts. probes: how many of them come with a cut."""

    probes: int = field(kw_only=True)
    cut_type = ProbedCut

    def __post_init__(self) -> None:
        super().__post_init__()
        self.largest_message += 4 * self.probes * self.cuts.elements

    def _check_cut(self, round: int, message: Message) -> ProbedCut:
        checked = super()._check_cut(round, message)
        assert isinstance(checked, ProbedCut)
        moved, shape = checked.displaced, (self.probes, *checked.cut.shape)
        if tuple(moved.shape) != shape or moved.dtype != checked.cut.dtype:
            raise MessageError(f"displaced cuts {moved.dtype} {tuple(moved.shape)}, not {checked.cut.dtype} {shape}")
        if not torch.isfinite(moved).all():
            raise MessageError("infinite or NaN elements in the displaced cuts")
        return checked

    def _losses(self, message: Cut, cuts: Sequence[Tensor], moves: Sequence[Displacement | None] = (None,)) -> Tensor:
        """The loss of each of the cuts at each of the moved weights (None: where they are), float64 [cuts x moves].

        In eval mode, forward only, for the message's labels; differences are to be taken, so from logits on in float64.
        Raises MessageError where the half cannot take the cut, or the loss the labels, and for losses that are infinite
        or NaN.
        """
        parameter = next(self.half.parameters())
        labels, masks = self._labels(message.labels), self._masks(message.mask)
        losses = []
        refuse_writers(self.half)
        with refusing_failures(), evaluating(self.half), casts_forgotten():
            for cut in cuts:
                inputs = cut.to(parameter.device)
                for move in moves:
                    with nullcontext() if move is None else displaced(self.half, move):
                        output = self.half(copy_cut(inputs, parameter.dtype), **masks)
                    losses.append(self.loss(output.double(), labels.double() if self.cuts.real else labels).double())
                    self.passes["server forward"] += len(cut)
        found = torch.stack(losses).cpu()
        if not torch.isfinite(found.float()).all():
            raise MessageError("cuts whose losses are infinite or NaN")
        return found


def slopes(losses: Tensor, base: Tensor, mu: float, two_sided: bool) -> Tensor:
    """float64 [P]: from losses at th + mu u_p, or with `two_sided` at th + mu u_p and th - mu u_p in turn."""
    return (losses[::2] - losses[1::2]) / (2 * mu) if two_sided else (losses - base) / mu

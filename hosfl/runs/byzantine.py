"""Byzantine clients of a simulation: they compute honestly, and falsify their messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hosfl.methods.ho import ZerothOrderClient
from hosfl.methods.travel import packed, unpacked
from hosfl.protocol.messages import Cut, Message, Scalars
from hosfl.runs.faults import Faults


@dataclass
class ByzantineClient(ZerothOrderClient):
    """A client that falsifies its messages.

    faults: says which parts of them. classes: the number of classes of the labels. ignore_index: see `CutSpec`. random:
    the generator of false values.
    """

    faults: Faults = field(kw_only=True)
    classes: int = field(kw_only=True)
    ignore_index: int | None = field(kw_only=True)
    random: np.random.Generator = field(kw_only=True)

    @staticmethod
    def of(honest: ZerothOrderClient, **lies: Any) -> ByzantineClient:
        """Make a Byzantine client with the settings and the state of an honest one. lies: the fields of this class."""
        inherited = {f.name: getattr(honest, f.name) for f in fields(ZerothOrderClient) if f.init}
        return ByzantineClient(**inherited, **lies)

    def output(self, round: int) -> Cut:
        """Compute the cut, and falsify it."""
        honest = super().output(round)
        computed = replace(honest, cut=unpacked(honest.cut, honest.scales, self.wire))
        falsified = self._falsify(computed)
        if falsified.cut is computed.cut:
            return replace(falsified, cut=honest.cut)
        cut, scales = packed(falsified.cut, self.wire)
        return replace(falsified, cut=cut, scales=scales)

    def answer(self, message: Message) -> Scalars:
        """Compute the answer, and falsify it."""
        return self._falsify(super().answer(message))

    def _falsify(self, message: AnyMessage) -> AnyMessage:
        for lie in self.faults.lie_names:
            name, falsify = FALSIFIERS[lie]
            if hasattr(message, name):
                values: dict[str, Any] = {name: falsify(message, self)}
                message = replace(message, **values)
        return message


AnyMessage = TypeVar("AnyMessage", Cut, Scalars)


def _classes(cut: Cut, liar: ByzantineClient) -> int:
    """Return the number of values that a label may have. Pairs of labels are positions in a text: the cut's length."""
    positions = cut.labels.dim() > 1 and liar.ignore_index is None
    return cut.cut.shape[1] if positions else liar.classes


def _other_labels(cut: Cut, liar: ByzantineClient) -> Tensor:
    return _keep_ignored(cut, _classes(cut, liar) - 1 - cut.labels, liar)


def _random_labels(cut: Cut, liar: ByzantineClient) -> Tensor:
    classes = _classes(cut, liar)
    others = torch.from_numpy(liar.random.integers(1, max(2, classes), cut.labels.shape).astype(np.int32))
    return _keep_ignored(cut, (cut.labels + others.to(cut.labels.device)) % classes, liar)


def _keep_ignored(cut: Cut, labels: Tensor, liar: ByzantineClient) -> Tensor:
    """Return false labels, except where the loss ignores the true ones."""
    return labels if liar.ignore_index is None else torch.where(cut.labels == liar.ignore_index, cut.labels, labels)


def _noise(cut: Cut, liar: ByzantineClient) -> Tensor:
    noise = torch.from_numpy(liar.random.standard_normal(cut.cut.shape, np.float32)).to(cut.cut.device)
    return (noise * cut.cut.float().square().mean().sqrt()).to(cut.cut.dtype)


def _signed(honest: Scalars, liar: ByzantineClient) -> Tensor:
    signs = torch.from_numpy(liar.random.choice([-1.0, 1.0], len(honest.scalars)).astype(np.float32))
    return honest.scalars * signs * liar.faults.magnitude


# By lie: the name of a message's field, and the function (message, client) -> its false value.
FALSIFIERS: dict[str, tuple[str, Callable[[Any, ByzantineClient], Tensor]]] = {
    "labels": ("labels", _other_labels),
    "random-labels": ("labels", _random_labels),
    "flipped-cuts": ("cut", lambda cut, liar: -cut.cut),
    "scaled-cuts": ("cut", lambda cut, liar: cut.cut * liar.faults.magnitude),
    "noisy-cuts": ("cut", _noise),
    "flipped-scalars": ("scalars", lambda honest, liar: -honest.scalars),
    "scalars": ("scalars", _signed),
}

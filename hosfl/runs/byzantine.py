"""Clients of a simulation that lie: they do what they should, and say something else."""

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
    """Does what it should and lies about it. faults: what it lies about. classes: C. ignore_index: see `CutSpec`."""

    faults: Faults = field(kw_only=True)
    classes: int = field(kw_only=True)
    ignore_index: int | None = field(kw_only=True)
    random: np.random.Generator = field(kw_only=True)

    @staticmethod
    def of(honest: ZerothOrderClient, **lies: Any) -> ByzantineClient:
        """The liar that takes an honest client's place, with all its settings."""
        same = {f.name: getattr(honest, f.name) for f in fields(ZerothOrderClient) if f.init}
        return ByzantineClient(**same, **lies)

    def output(self, round: int) -> Cut:
        honest = super().output(round)
        computed = replace(honest, cut=unpacked(honest.cut, honest.scales, self.wire))
        said = self._lie(computed)
        if said.cut is computed.cut:
            return replace(said, cut=honest.cut)
        cut, scales = packed(said.cut, self.wire)
        return replace(said, cut=cut, scales=scales)

    def answer(self, message: Message) -> Scalars:
        return self._lie(super().answer(message))

    def _lie(self, honest: AnyMessage) -> AnyMessage:
        for lie in self.faults.lies_told:
            about, told = TOLD[lie]
            if hasattr(honest, about):
                lied: dict[str, Any] = {about: told(honest, self)}
                honest = replace(honest, **lied)
        return honest


AnyMessage = TypeVar("AnyMessage", Cut, Scalars)


def _classes(cut: Cut, liar: ByzantineClient) -> int:
    """Labels are below it. Two for each sample are places in a text, of which one may be shorter than the longest."""
    places = cut.labels.dim() > 1 and liar.ignore_index is None
    return cut.cut.shape[1] if places else liar.classes


def _other_labels(cut: Cut, liar: ByzantineClient) -> Tensor:
    return _where_they_count(cut, _classes(cut, liar) - 1 - cut.labels, liar)


def _random_labels(cut: Cut, liar: ByzantineClient) -> Tensor:
    classes = _classes(cut, liar)
    others = torch.from_numpy(liar.random.integers(1, max(2, classes), cut.labels.shape).astype(np.int32))
    return _where_they_count(cut, (cut.labels + others.to(cut.labels.device)) % classes, liar)


def _where_they_count(cut: Cut, lie: Tensor, liar: ByzantineClient) -> Tensor:
    return lie if liar.ignore_index is None else torch.where(cut.labels == liar.ignore_index, cut.labels, lie)


def _noise(cut: Cut, liar: ByzantineClient) -> Tensor:
    noise = torch.from_numpy(liar.random.standard_normal(cut.cut.shape, np.float32)).to(cut.cut.device)
    return (noise * cut.cut.float().square().mean().sqrt()).to(cut.cut.dtype)


def _signed(honest: Scalars, liar: ByzantineClient) -> Tensor:
    signs = torch.from_numpy(liar.random.choice([-1.0, 1.0], len(honest.scalars)).astype(np.float32))
    return honest.scalars * signs * liar.faults.magnitude


# What a message says, and what a liar says in its place.
TOLD: dict[str, tuple[str, Callable[[Any, ByzantineClient], Tensor]]] = {
    "labels": ("labels", _other_labels),
    "random-labels": ("labels", _random_labels),
    "flipped-cuts": ("cut", lambda cut, liar: -cut.cut),
    "scaled-cuts": ("cut", lambda cut, liar: cut.cut * liar.faults.magnitude),
    "noisy-cuts": ("cut", _noise),
    "flipped-scalars": ("scalars", lambda honest, liar: -honest.scalars),
    "scalars": ("scalars", _signed),
}

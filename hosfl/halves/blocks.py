"""Blocks of a client half: consecutive layers that a direction moves alone, and the half from a block's first layer on.

A direction that moves one block needs the forward pass from that block to the cut, and no more. What comes before the
first block runs once a round. So of six layers the last three cost 3/6 of a pass a probe if they are one block; each a
block of its own, they cost 3/6, 2/6 and 1/6, and twice 1/6 a round to go on from one block to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hosfl.halves.follow import CutError
from hosfl.halves.inputs import Inputs, call, evaluating, mask_of
from hosfl.halves.split import find_cutter
from hosfl.halves.transformer_halves import ClientHalf

MIN_SHARE = 0.01  # of a pass: what has no matrix product takes time all the same
MIN_SAVING = 0.1  # of a pass, at least: what has to be in front of a single block for its input to be kept


@dataclass(frozen=True)
class BlockEntry:
    """Where a block begins.

    Attributes:
        entry: its first module's name in the half; "" for the half's own beginning.
        tensors: what it moves, by position among the half's trainable parameters.
        share: the work from there to the cut, as a share of the whole half's.
    """

    entry: str
    tensors: tuple[int, ...]
    share: float


def blocks_of(half: nn.Module, count: int, inputs: Inputs) -> list[BlockEntry]:
    """`count` blocks of a half, with about as many layers that move in each; inputs: a few samples.

    Work is counted in floating-point operations of matrix products and convolutions, on these samples. One block is
    the whole half where nothing can be told about it, its first layers do little, or their output is larger than the
    cut.

    Raises, of more than one block: CutError for a half that nothing can be told about, and where what runs from an
    entry on does not give the half's own bits; ValueError where fewer than `count` layers move.
    """
    moving = [p for p in half.parameters() if p.requires_grad]
    if count > 1:
        return _find_blocks(half, count, inputs, parameter_layers(half, moving))[0]
    whole = [BlockEntry("", tuple(range(len(moving))), 1.0)]
    try:
        layer = parameter_layers(half, moving)
        if not min(layer, default=0):
            return whole
        begins, kept, cut = _find_blocks(half, count, inputs, layer)
    except Exception:  # whatever a part of a half raises that nobody knows: it runs whole
        return whole
    return begins if begins[0].share <= 1 - MIN_SAVING and kept <= cut else whole


def _find_blocks(
    half: nn.Module, count: int, inputs: Inputs, layer: Sequence[int]
) -> tuple[list[BlockEntry], int, int]:
    """The blocks, and bytes: of the first one's input, and of the cut. layer: see `parameter_layers`."""
    layers = sorted(set(layer))
    if count > len(layers):
        raise ValueError(
            f"blocks={count}: only {len(layers)} of the client half's layers have something that moves; choose as many "
            "blocks or fewer, or let more move by trains"
        )
    groups = [group.tolist() for group in np.array_split(layers, count)]
    entries = layer_entries(half)
    run = BlockRun(half, [entries[group[0]] for group in groups])
    begins = []
    with evaluating(half):
        with run.kept():
            whole, cut = _count_flops(half, inputs)
        kept = run.held
        for number, group in enumerate(groups):
            work, again = _count_flops(*run.at(number, inputs))
            entry = run.entries[number]
            if not torch.equal(cut, again):
                raise CutError(
                    f"the client half from {entry or 'its beginning'} on does not give its own output: leave out blocks"
                )
            tensors = tuple(t for t, of in enumerate(layer) if of in group)
            begins.append(BlockEntry(entry, tensors, max(work / whole, MIN_SHARE) if whole else 1.0))
    return begins, kept, cut.nbytes


def layer_entries(half: nn.Module) -> list[str]:
    """The names of a half's layers, as its own cut points have them; the first is "", for what comes before them."""
    return ["", *find_cutter(_cuttable_part(half)).places]


def parameter_layers(half: nn.Module, parameters: Sequence[Tensor]) -> list[int]:
    """Of each parameter of a half the layer that uses it first, by its number in `layer_entries`.

    It is the last place at which the half could be cut with the parameter behind the cut.
    """
    layers, way = [0] * len(parameters), find_cutter(_cuttable_part(half))
    for number, place in enumerate(way.places.values(), 1):
        before = {id(p) for p in way.cut(place)[0].parameters()}
        layers = [last if id(p) in before else number for p, last in zip(parameters, layers, strict=True)]
    return layers


def allot_directions(directions: int, sizes: Sequence[float], shares: Sequence[float]) -> list[int]:
    """How many of P directions move each block: P_b in proportion to sqrt(d_b / c_b), and one at least.

    Of all ways to spend the same work it makes the estimate's variance the least where blocks have gradients of equal
    size: d_b / P_b summed, sum P_b c_b fixed. sizes: d_b, numbers that move. shares: c_b, the work of a probe.

    Raises ValueError for fewer directions than blocks.
    """
    if directions < len(sizes):
        raise ValueError(f"{directions} directions cannot move {len(sizes)} blocks: raise directions or lower blocks")
    wanted = np.sqrt(np.array(sizes) / np.array(shares))
    wanted *= directions / wanted.sum()
    counts = np.maximum(1, np.floor(wanted)).astype(int)
    while counts.sum() < directions:
        counts[int(np.argmax(wanted - counts))] += 1
    while counts.sum() > directions:
        counts[int(np.argmin(np.where(counts > 1, wanted - counts, math.inf)))] -= 1
    return [int(count) for count in counts]


def work(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Of a round's probes, P_b of each block, and of going on from block to block, in passes of the whole half."""
    return sum(n * share for n, share in zip(counts, shares, strict=True)) + shares[0] - shares[-1]


def _unreached_error(entry: str) -> CutError:
    return CutError(f"the client half's forward pass never reaches {entry}, where a block begins: leave out blocks")


class _BlockReached(Exception):
    """The forward pass has come to the next block, and need not go on."""


class BlockRun:
    """A client half's forward pass from one block after another.

    half: as it is; its weights may move between the passes. entries: of the blocks, in order. call: how modules are
    called. Holds the input of one block, a tensor of about the cut's size, and two while it goes on to the next.
    """

    def __init__(
        self, half: nn.Module, entries: Sequence[str], call: Callable[[nn.Module, Inputs], Any] = call
    ) -> None:
        self.half, self.entries, self.call = half, list(entries), call
        self.rests, self.front = [half] * len(self.entries), half
        if any(self.entries):
            with evaluating(half):  # parts have a mode of their own, which is the half's when it is cut
                way = find_cutter(_cuttable_part(half))
                parts = [way.cut(way.places[entry]) if entry else (half, half) for entry in self.entries]
            self.front, self.rests = parts[0][0], [rest for _, rest in parts]
        self._input: Tensor | None = None
        self._block = 0

    def output(self, inputs: Inputs) -> Tensor:
        """The half's output. The first block's input stays here."""
        if self.call is call or not self.entries[0]:
            with self.kept():
                output: Tensor = self.call(self.half, inputs)
            return output
        # Compiled code does not look for hooks, so its two parts run one after the other.
        self._input, self._block = self.call(self.front, inputs), 0
        output = self.call(self.rests[0], self._inputs(0, inputs))
        return output

    @property
    def held(self) -> int:
        """Bytes of the block's input."""
        return 0 if self._input is None else self._input.nbytes

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A forward pass of the half in this block leaves the first block's input here."""
        self._input, self._block = None, 0

        def keep(value: Tensor) -> None:
            if self._input is None:
                self._input = value

        with capture_entry_input(self.half, self.entries[0], keep):
            yield

    def at(self, block: int, inputs: Inputs) -> tuple[nn.Module, Inputs]:
        """What to call for the pass from a block to the cut: a module, and its inputs.

        inputs: the half's own, as in the pass under `kept`. Blocks are asked for in order: what lies between runs. For
        an earlier one again, as where a multiplier comes twice, the whole half does. Call it in eval mode and without a
        graph, with the half's weights as they were under `kept`.
        """

        def stop(value: Tensor) -> None:
            self._input = value
            raise _BlockReached

        if block < self._block:
            self.output(inputs)
        for last in range(self._block, block):
            if not self.entries[last + 1]:  # that one begins with the half, too
                self._block = last + 1
                continue
            with capture_entry_input(self.half, self.entries[last + 1], stop):
                try:
                    call(self.rests[last], self._inputs(last, inputs))
                except _BlockReached:
                    self._block = last + 1
                    continue
            raise _unreached_error(self.entries[last + 1])
        return self.rests[block], self._inputs(block, inputs)

    def _inputs(self, block: int, inputs: Inputs) -> Inputs:
        if not self.entries[block]:
            return inputs
        if self._input is None:
            raise _unreached_error(self.entries[block])
        mask = mask_of(inputs)
        return self._input if mask is None else {"cut": self._input, "attention_mask": mask}


@contextmanager
def capture_entry_input(half: nn.Module, entry: str, take: Callable[[Tensor], object]) -> Iterator[None]:
    """The input of a block's first module goes to `take`; where that is the half's own beginning, nothing does."""
    if not entry:
        yield
        return

    def hook(module: nn.Module, args: Sequence[Any], named: dict[str, Any]) -> None:
        take(next(value for value in (*args, *named.values()) if isinstance(value, Tensor)))

    handle = _cuttable_part(half).get_submodule(entry).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _cuttable_part(half: nn.Module) -> nn.Module:
    """What of a half is cut again."""
    return half.trunk if isinstance(half, ClientHalf) else half


def _count_flops(module: nn.Module, inputs: Inputs) -> tuple[int, Tensor]:
    """(floating-point operations, output) of a forward pass in eval mode."""
    from torch.utils.flop_counter import FlopCounterMode  # seconds to import

    with evaluating(module), FlopCounterMode(display=False) as counter:
        output = call(module, inputs)
    return counter.get_total_flops(), output

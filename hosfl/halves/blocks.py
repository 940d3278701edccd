"""Blocks of a client half: groups of consecutive layers, of which each direction perturbs one.

A direction that perturbs one block needs only the forward pass from that block to the cut. The layers before the first
block run once a round. Example: of six layers the last three are trained. As one block, each probe costs 3/6 of a
forward pass. As three blocks, a probe costs 3/6, 2/6 or 1/6, and 2/6 a round to advance from one block to the next.
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

MIN_SHARE = 0.01  # least share of a forward pass that a block counts as: layers without matrix products take time too
MIN_SAVING = (
    0.1  # share of a forward pass: a single block's input is kept only if the layers before it cost at least this
)


@dataclass(frozen=True)
class BlockEntry:
    """A block: where it begins, and what it moves.

    Attributes:
        entry: its first module's name in the half; "" for the half's own beginning.
        tensors: the parameters that it moves, as positions among the half's trainable parameters.
        share: the work from there to the cut, as a share of the whole half's.
    """

    entry: str
    tensors: tuple[int, ...]
    share: float


def blocks_of(half: nn.Module, count: int, inputs: Inputs) -> list[BlockEntry]:
    """Divide a half into `count` blocks with about equally many trainable layers each. inputs: a few samples.

    Work is counted on these samples, as floating-point operations of matrix products and convolutions. A single block
    is the whole half if the half cannot be cut, if the layers before the first trainable one do little work, or if
    their output is larger than the cut.

    Raises, for more than one block: CutError if the half cannot be cut, or if running it from a block's entry does not
    give the same bits; ValueError if fewer than `count` layers are trainable.
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
    """(the blocks, bytes of the first block's input, bytes of the cut). layer: see `parameter_layers`."""
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
        with run.keeping_input():
            whole, cut = _count_flops(half, inputs)
        kept = run.input_bytes
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
    """The names of the half's own cut points, after "" for the half's beginning."""
    return ["", *find_cutter(_cuttable_part(half)).cut_points]


def parameter_layers(half: nn.Module, parameters: Sequence[Tensor]) -> list[int]:
    """For each parameter, the number in `layer_entries` of the first layer that uses it.

    That is the last cut point of the half that leaves the parameter behind the cut.
    """
    layers, cutter = [0] * len(parameters), find_cutter(_cuttable_part(half))
    for number, place in enumerate(cutter.cut_points.values(), 1):
        before = {id(p) for p in cutter.cut(place)[0].parameters()}
        layers = [last if id(p) in before else number for p, last in zip(parameters, layers, strict=True)]
    return layers


def allot_directions(directions: int, sizes: Sequence[float], shares: Sequence[float]) -> list[int]:
    """Divide P directions among blocks: P_b proportional to sqrt(d_b / c_b), at least one each.

    For equal work, sum P_b c_b, this minimises the estimate's variance, sum d_b / P_b, if the blocks' gradients are of
    equal size. sizes: d_b, the number of trainable elements. shares: c_b, the work of a probe.

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
    """The work of a round in forward passes of the whole half: P_b probes of each block, and advancing between them."""
    return sum(n * share for n, share in zip(counts, shares, strict=True)) + shares[0] - shares[-1]


def _unreached_error(entry: str) -> CutError:
    return CutError(f"the client half's forward pass never reaches {entry}, where a block begins: leave out blocks")


class _BlockReached(Exception):
    """Raised by a hook to stop the forward pass at the next block."""


class BlockRun:
    """Forward passes of a client half from one block after another to the cut.

    half: its weights may move between passes. entries: the blocks' first modules, in order. call: how modules are
    called. Holds one block's input, a tensor of about the cut's size, and two while it advances to the next block.
    """

    def __init__(
        self, half: nn.Module, entries: Sequence[str], call: Callable[[nn.Module, Inputs], Any] = call
    ) -> None:
        self.half, self.entries, self.call = half, list(entries), call
        self.tails, self.front = [half] * len(self.entries), half
        if any(self.entries):
            with evaluating(half):  # parts have a mode of their own, which is the half's when it is cut
                cutter = find_cutter(_cuttable_part(half))
                parts = [cutter.cut(cutter.cut_points[entry]) if entry else (half, half) for entry in self.entries]
            self.front, self.tails = parts[0][0], [rest for _, rest in parts]
        self._input: Tensor | None = None
        self._block = 0

    def output(self, inputs: Inputs) -> Tensor:
        """The half's output; keeps the first block's input."""
        if self.call is call or not self.entries[0]:
            with self.keeping_input():
                output: Tensor = self.call(self.half, inputs)
            return output
        # Compiled code does not look for hooks, so its two parts run one after the other.
        self._input, self._block = self.call(self.front, inputs), 0
        output = self.call(self.tails[0], self._inputs(0, inputs))
        return output

    @property
    def input_bytes(self) -> int:
        """Bytes of the block's input."""
        return 0 if self._input is None else self._input.nbytes

    @contextmanager
    def keeping_input(self) -> Iterator[None]:
        """Context manager: a forward pass of the half inside it keeps the first block's input."""
        self._input, self._block = None, 0

        def keep(value: Tensor) -> None:
            if self._input is None:
                self._input = value

        with capture_entry_input(self.half, self.entries[0], keep):
            yield

    def at(self, block: int, inputs: Inputs) -> tuple[nn.Module, Inputs]:
        """What to call for the pass from a block to the cut: a module, and its inputs.

        inputs: the half's own, as in the pass under `keeping_input`. Ask for blocks in order: the layers in between
        run. For an earlier block, as when a multiplier comes twice, the whole half runs again. Call the module in eval
        mode without autograd, with the weights as they were under `keeping_input`.
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
                    call(self.tails[last], self._inputs(last, inputs))
                except _BlockReached:
                    self._block = last + 1
                    continue
            raise _unreached_error(self.entries[last + 1])
        return self.tails[block], self._inputs(block, inputs)

    def _inputs(self, block: int, inputs: Inputs) -> Inputs:
        if not self.entries[block]:
            return inputs
        if self._input is None:
            raise _unreached_error(self.entries[block])
        mask = mask_of(inputs)
        return self._input if mask is None else {"cut": self._input, "attention_mask": mask}


@contextmanager
def capture_entry_input(half: nn.Module, entry: str, take: Callable[[Tensor], object]) -> Iterator[None]:
    """Context manager: forward passes of the half hand the input of module `entry` to `take`; "" hands over nothing."""
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
    """The module of a half that can be cut again: the trunk of a transformer's half."""
    return half.trunk if isinstance(half, ClientHalf) else half


def _count_flops(module: nn.Module, inputs: Inputs) -> tuple[int, Tensor]:
    """(floating-point operations, output) of a forward pass in eval mode."""
    from torch.utils.flop_counter import FlopCounterMode  # seconds to import

    with evaluating(module), FlopCounterMode(display=False) as counter:
        output = call(module, inputs)
    return counter.get_total_flops(), output

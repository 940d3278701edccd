"""Blocks of a client half: groups of consecutive layers, of which each direction perturbs one.

A direction that perturbs one block needs only the forward pass from that block to the cut. The layers before the first
block run once a round. Example: of six layers the last three are trained. As one block, each probe costs 3/6 of a
forward pass. As three blocks, a probe costs 3/6, 2/6 or 1/6, and advancing from block to block costs 2/6 a round.
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

# Shares of the half's forward pass.
MIN_SHARE = 0.01  # a block counts as at least this much work: layers without matrix products take time, too
MIN_SAVING = 0.1  # a single block begins after the half's beginning only if that saves at least this much


@dataclass(frozen=True)
class BlockEntry:
    """A block of a half.

    Attributes:
        entry: the name of its first module in the half; "" for the half's own beginning.
        tensors: its trainable parameters, as positions among the half's trainable parameters.
        share: the work from the block to the cut, as a share of the whole half's.
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
    trainable = [p for p in half.parameters() if p.requires_grad]
    if count > 1:
        return _find_blocks(half, count, inputs, parameter_layers(half, trainable))[0]
    whole = [BlockEntry("", tuple(range(len(trainable))), 1.0)]
    try:
        numbers = parameter_layers(half, trainable)
        if not min(numbers, default=0):
            return whole
        blocks, input_bytes, cut_bytes = _find_blocks(half, count, inputs, numbers)
    except Exception:  # whatever a part of a user's half raises: the whole half runs
        return whole
    return blocks if blocks[0].share <= 1 - MIN_SAVING and input_bytes <= cut_bytes else whole


def _find_blocks(
    half: nn.Module, count: int, inputs: Inputs, numbers: Sequence[int]
) -> tuple[list[BlockEntry], int, int]:
    """Return (blocks, bytes of the first block's input, bytes of the cut).

    numbers: the layers of the trainable parameters, see `parameter_layers`. Raises as `blocks_of`.
    """
    layers = sorted(set(numbers))
    if count > len(layers):
        raise ValueError(
            f"blocks={count}: only {len(layers)} of the client half's layers have trainable parameters; choose as many "
            "blocks or fewer, or train more of them by trains"
        )
    groups = [group.tolist() for group in np.array_split(layers, count)]
    entries = layer_entries(half)
    run = BlockRun(half, [entries[group[0]] for group in groups])
    blocks = []
    with evaluating(half):
        with run.keeping_input():
            flops, cut = _count_flops(half, inputs)
        input_bytes = run.input_bytes
        for number, group in enumerate(groups):
            tail_flops, tail_cut = _count_flops(*run.tail(number, inputs))
            entry = run.entries[number]
            if not torch.equal(cut, tail_cut):
                raise CutError(
                    f"the client half from {entry or 'its beginning'} on does not give its own output: leave out blocks"
                )
            tensors = tuple(t for t, layer in enumerate(numbers) if layer in group)
            blocks.append(BlockEntry(entry, tensors, max(tail_flops / flops, MIN_SHARE) if flops else 1.0))
    return blocks, input_bytes, cut.nbytes


def layer_entries(half: nn.Module) -> list[str]:
    """The names of the modules at which a block can begin: "" for the half's beginning, then the half's cut points."""
    return ["", *find_cutter(_cuttable_part(half)).cut_points]


def parameter_layers(half: nn.Module, parameters: Sequence[Tensor]) -> list[int]:
    """For each parameter, the number in `layer_entries` of the first layer that uses it.

    That is the last cut point at which the parameter belongs to the part after the cut.
    """
    numbers, cutter = [0] * len(parameters), find_cutter(_cuttable_part(half))
    for number, place in enumerate(cutter.cut_points.values(), 1):
        before = {id(p) for p in cutter.cut(place)[0].parameters()}
        numbers = [last if id(p) in before else number for p, last in zip(parameters, numbers, strict=True)]
    return numbers


def allot_directions(directions: int, sizes: Sequence[float], shares: Sequence[float]) -> list[int]:
    """Divide P directions among blocks: P_b proportional to sqrt(d_b / c_b), at least one each.

    For equal work, sum P_b c_b, this minimises the estimate's variance, sum d_b / P_b, if the blocks' gradients have
    equal norms. sizes: d_b, the number of trainable elements. shares: c_b, the work of a probe.

    Raises ValueError for fewer directions than blocks.
    """
    if directions < len(sizes):
        raise ValueError(f"{directions} directions cannot move {len(sizes)} blocks: raise directions or lower blocks")
    ideal = np.sqrt(np.array(sizes) / np.array(shares))
    ideal *= directions / ideal.sum()
    counts = np.maximum(1, np.floor(ideal)).astype(int)
    while counts.sum() < directions:
        counts[int(np.argmax(ideal - counts))] += 1
    while counts.sum() > directions:
        counts[int(np.argmin(np.where(counts > 1, ideal - counts, math.inf)))] -= 1
    return [int(count) for count in counts]


def work(counts: Sequence[int], shares: Sequence[float]) -> float:
    """The work of a round in forward passes of the whole half: P_b probes of each block, and advancing between them."""
    return sum(n * share for n, share in zip(counts, shares, strict=True)) + shares[0] - shares[-1]


def _unreached_error(entry: str) -> CutError:
    """The error for a forward pass that does not call a block's first module."""
    return CutError(f"the client half's forward pass never reaches {entry}, where a block begins: leave out blocks")


class _BlockReached(Exception):
    """Raised by a hook to stop the forward pass at the next block."""


class BlockRun:
    """Forward passes of a client half from its blocks to the cut.

    half: its weights may change between passes. entries: the blocks' first modules, in order. call: how modules are
    called. It holds one block's input, a tensor of about the cut's size, and two while it advances to the next block.
    """

    def __init__(
        self, half: nn.Module, entries: Sequence[str], call: Callable[[nn.Module, Inputs], Any] = call
    ) -> None:
        self.half, self.entries, self.call = half, list(entries), call
        self.tails, self.head = [half] * len(self.entries), half  # modules from each block on, and before the first one
        if any(self.entries):
            with evaluating(half):  # parts have modes of their own, and get the half's when it is cut
                cutter = find_cutter(_cuttable_part(half))
                parts = [cutter.cut(cutter.cut_points[entry]) if entry else (half, half) for entry in self.entries]
            self.head, self.tails = parts[0][0], [tail for _, tail in parts]
        self._input: Tensor | None = None
        self._block = 0

    def output(self, inputs: Inputs) -> Tensor:
        """Compute the half's output, and keep the first block's input."""
        if self.call is call or not self.entries[0]:
            with self.keeping_input():
                output: Tensor = self.call(self.half, inputs)
            return output
        # Compiled code ignores hooks, so the two parts run one after the other.
        self._input, self._block = self.call(self.head, inputs), 0
        output = self.call(self.tails[0], self._inputs(0, inputs))
        return output

    @property
    def input_bytes(self) -> int:
        """Bytes of the kept block's input."""
        return 0 if self._input is None else self._input.nbytes

    @contextmanager
    def keeping_input(self) -> Iterator[None]:
        """Context manager: keep the first block's input of a forward pass of the half that the caller runs inside."""
        self._input, self._block = None, 0

        def keep(value: Tensor) -> None:
            if self._input is None:
                self._input = value

        with capture_entry_input(self.half, self.entries[0], keep):
            yield

    def tail(self, block: int, inputs: Inputs) -> tuple[nn.Module, Inputs]:
        """Return (module, its inputs) for the pass from a block to the cut.

        inputs: the half's own, as in the pass under `keeping_input`. Advancing to a later block runs the layers in
        between; going back to an earlier one, as when a multiplier comes twice, runs the whole half again. Call this in
        eval mode without autograd, with the weights as they were under `keeping_input`.
        """

        def stop(value: Tensor) -> None:
            self._input = value
            raise _BlockReached

        if block < self._block:
            self.output(inputs)
        for current in range(self._block, block):
            if not self.entries[current + 1]:  # the next block begins with the half, too
                self._block = current + 1
                continue
            with capture_entry_input(self.half, self.entries[current + 1], stop):
                try:
                    call(self.tails[current], self._inputs(current, inputs))
                except _BlockReached:
                    self._block = current + 1
                    continue
            raise _unreached_error(self.entries[current + 1])
        return self.tails[block], self._inputs(block, inputs)

    def _inputs(self, block: int, inputs: Inputs) -> Inputs:
        """The inputs of a block's tail: the kept input, with the attention mask if the half takes one."""
        if not self.entries[block]:
            return inputs
        if self._input is None:
            raise _unreached_error(self.entries[block])
        mask = mask_of(inputs)
        return self._input if mask is None else {"cut": self._input, "attention_mask": mask}


@contextmanager
def capture_entry_input(half: nn.Module, entry: str, callback: Callable[[Tensor], object]) -> Iterator[None]:
    """Context manager: call `callback` with the input of module `entry` in every forward pass of the half.

    For entry "" it is never called.
    """
    if not entry:
        yield
        return

    def hook(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        callback(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    handle = _cuttable_part(half).get_submodule(entry).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _cuttable_part(half: nn.Module) -> nn.Module:
    """The module of a half that can be cut again: the trunk of a transformer's half, else the half itself."""
    return half.trunk if isinstance(half, ClientHalf) else half


def _count_flops(module: nn.Module, inputs: Inputs) -> tuple[int, Tensor]:
    """Run a forward pass in eval mode, and return (its floating-point operations, its output)."""
    from torch.utils.flop_counter import FlopCounterMode  # takes seconds to import

    with evaluating(module), FlopCounterMode(display=False) as counter:
        output = call(module, inputs)
    return counter.get_total_flops(), output

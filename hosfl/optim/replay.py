"""Rebuilds the trained model from the base model and the log of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from hosfl.interrupts import uninterrupted
from hosfl.optim.groups import without_prefix
from hosfl.optim.log_file import Chapter, Header, dtype_and_shape, read
from hosfl.optim.sharded import full_tensors, reshard, shards
from hosfl.optim.terms import Terms, apply_rule, zeros
from hosfl.protocol.header import LogError
from hosfl.protocol.lattice import STEPS, Lattice
from hosfl.protocol.replica import digest
from hosfl_kernels import replay_


def rebuild(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Train a base model again from a log, in place: the weights that the run had at `log.save`, to the bit.

    Parameters only: buffers, such as running statistics, are not in the log.

        model = make_model()  # the base, with the weights that the run began with
        hosfl.optim.rebuild(model, "run.safetensors")

    Args:
        model: as it was before the run's first step, on any device, or sharded by FSDP2, where every process must call
            this. Parameters are found by name, where the optimizer was given names or the model; otherwise by position,
            and then the optimizer must have been given `model.parameters()`.
        path: of the log's file.

    One pass over the weights for as long as the same parameters moved on the same lattice, and their moves together
    cannot leave it. Nothing in the file is trusted: all of it is checked before the first write. Time is at most in
    proportion to the file's size times the weights that move. Memory: some copies of the file, a copy on the host of
    the weights that move, from which they are put back, and with momentum a float32 tensor for each.

    Raises, with the model as it was, to the bit, as after an interrupt:
        LogError: the log is damaged, or no run can have written it; the parameters' names, shapes, dtypes or bits are
            not those of the base; or somebody else wrote the weights during the run.
        OSError: the file cannot be read.
        TypeError: the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    path = Path(path)
    try:
        header, tables = read(path)
    except LogError as error:
        raise LogError(f"{path} is no log of an optimizer, or a damaged one: {error}") from None
    reshard(model)
    parameters = _matched(model, header)
    with _restored_on_failure(_movable(header, parameters)):
        replay = _Replay(header.terms, parameters)
        first = header.first
        for chapter, table in zip(header.chapters, tables, strict=True):
            replay.chapter(first, chapter, table)
            first += len(table)
        if digest(full_tensors(parameters)).hex() != header.trained:
            raise LogError("these are not the weights of the run: somebody else wrote them while it went on")


def _matched(model: nn.Module, header: Header) -> list[Tensor]:
    """The model's parameters that the log has, by number. Raises LogError if they are not those that it began with."""
    named = {without_prefix(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    positions = list(model.named_parameters())
    parameters: list[Tensor] = []
    for number, parameter in enumerate(header.parameters):
        name = parameter.name
        what = repr(name) if name else f"number {number}"
        found = named.get(name) if name else None
        if not name and number < len(positions):
            what, found = f"number {number}, {positions[number][0]!r},", positions[number][1]
        advice = "" if name else ". Without names the optimizer must have been given `model.parameters()`, all of them"
        if found is None:
            raise LogError(f"the model has no parameter {what}, which the log has{advice}")
        if dtype_and_shape(found) != (parameter.dtype, parameter.shape):
            raise LogError(
                f"{what} is {found.dtype} {list(found.shape)} in the model, {parameter.dtype} {parameter.shape} in the "
                f"log{advice}"
            )
        parameters.append(found)
    if len({id(p) for p in parameters}) < len(parameters):
        raise LogError("two of the log's parameters are one in the model")
    start = 0
    for end, base in header.bases:
        if digest(full_tensors(parameters[start:end])).hex() != base:
            raise LogError("this is not the model that the run began with: the digest of its weights is another")
        start = end
    return parameters


def _movable(header: Header, parameters: list[Tensor]) -> list[Tensor]:
    """The tensors of the model that the log moves. Raises LogError for tensors that the kernels refuse."""
    lists = {id(c.groups): c.groups for c in header.chapters}.values()  # chapters may share a list
    put = {n for c in header.chapters for _, mine in c.puts for n in mine}
    numbers = sorted(put.union(n for groups in lists for mine in groups for n in mine))
    try:
        tensors, starts = shards(parameters[n] for n in numbers)
        with torch.no_grad():
            replay_(tensors, [], [], streams=numbers, starts=starts)
    except (RuntimeError, TypeError, ValueError) as error:
        raise LogError(f"the log moves parameters {numbers}, which cannot move in this model: {error}") from None
    return tensors


@contextmanager
def _restored_on_failure(tensors: list[Tensor]) -> Iterator[None]:
    """Restore these tensors if the block fails or is interrupted."""
    before = [t.detach().to("cpu", copy=True) for t in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad(), uninterrupted():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)
        raise


class _Replay:
    """Applies the chapters of a log to a model's parameters."""

    def __init__(self, terms: Terms, parameters: list[Tensor]) -> None:
        self.terms, self.parameters = terms, parameters
        self.moments: dict[int, Tensor] = {}

    @torch.no_grad()
    def chapter(self, first: int, chapter: Chapter, table: Tensor) -> None:
        """Apply a chapter. first: the number of its first step. table: float32 [steps, groups, P + 2]."""
        terms = self.terms
        for quantum, numbers in chapter.puts:
            Lattice(quantum).put(shards(self.parameters[n] for n in numbers)[0], [1.0] * len(numbers))
        for g, numbers in enumerate(chapter.groups):
            rows = table[:, g].contiguous()
            coefficients, steps = rows[:, : terms.directions].contiguous(), rows[:, terms.directions :]
            if chapter.exact:
                self._move(first, numbers, chapter.quanta[g], coefficients)
            else:
                tensors, starts = shards(self.parameters[n] for n in numbers)
                pairs = zip(numbers, tensors, strict=True)
                momentum = chapter.momenta[g]
                kept = [self.moments.setdefault(n, zeros(t)) for n, t in pairs] if momentum else []
                apply_rule(terms, momentum, tensors, numbers, starts, kept, first, coefficients, steps)

    def _move(self, first: int, numbers: list[int], quantum: float, coefficients: Tensor) -> None:
        """Apply steps on the lattice, as many in one pass as cannot leave it together."""
        tensors, starts = shards(self.parameters[n] for n in numbers)
        distances = coefficients.double().abs().sum(1).cumsum(0)
        done, distance = 0, 0.0
        while done < len(coefficients):
            room = STEPS * quantum - max(map(_largest, full_tensors(self.parameters[n] for n in numbers)))
            end = int(torch.searchsorted(distances, distance + room, right=True))
            if end <= done:
                raise LogError(f"step {first + done} carries weights beyond the lattice's limit {STEPS * quantum:g}")
            seeds, moves = self.terms.table(first + done, end - done), coefficients[done:end]
            replay_(tensors, seeds.reshape(-1), moves.reshape(-1), dist=self.terms.dist, streams=numbers, starts=starts)
            done, distance = end, float(distances[end - 1])


def _largest(tensor: Tensor) -> float:
    """max |weight|; infinity where one is NaN."""
    size = max(map(abs, map(float, tensor.aminmax()))) if tensor.numel() else 0.0
    return size if math.isfinite(size) else math.inf

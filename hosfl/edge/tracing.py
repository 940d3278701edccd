"""From a client half to the exporter's model of it, by torch.onnx."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosfl.edge.original import ExportError, Original, is_text
from hosfl.halves.blocks import capture_entry_input
from hosfl.halves.follow import CutError
from hosfl.halves.inputs import call
from hosfl.halves.modules import copy_module
from hosfl.halves.narrow import narrow_bfloat16_as_floats
from hosfl.halves.transformer_halves import ClientHalf


class Positional(nn.Module):
    """The half as a module of positional arguments, which the exporter counts and names.

    Its outputs are the cut, and what comes to each of the entries.
    """

    def __init__(self, of: Original, entries: Sequence[str]) -> None:
        super().__init__()
        self.client, self.entries = _without_token_check(of.half), entries
        self.names = list(of.named) if isinstance(of.sample, Mapping) else None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        reached: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for entry in self.entries:
                hooks.enter_context(capture_entry_input(self.client, entry, partial(reached.setdefault, entry)))
            cut = call(self.client, tensors[0] if self.names is None else dict(zip(self.names, tensors, strict=True)))
        if missed := [entry for entry in self.entries if entry not in reached]:
            raise CutError(f"the forward pass never reaches {missed[0]}")
        return cut, *(reached[entry] for entry in self.entries)


def trace_graph(of: Original, entries: Sequence[str], kind: type[Positional] = Positional) -> Any:
    """The exporter's model, in onnxscript's representation; its outputs are those of `Positional`, or another kind."""
    inputs = of.traced()
    texts = {name for name, x in inputs.items() if of.any_length and is_text(name, x)}
    sizes = tuple({0: "batch", **({1: "tokens"} if name in texts else {})} for name in inputs)
    client = kind(of, entries)
    with as_export_errors(of.half), silence_exporter(), narrow_bfloat16_as_floats(of.half), OnnxLookups():
        program = torch.onnx.export(
            client,
            tuple(inputs.values()),
            dynamo=True,
            optimize=False,  # which would rename weights, and fold what depends on them
            verbose=False,
            input_names=list(inputs),
            output_names=["cut"],
            dynamic_shapes=(sizes,),
        )
    assert program is not None
    return program.model


def _without_token_check(half: nn.Module) -> nn.Module:
    """The half without its check of tokens' values, of which a graph has none."""
    if not isinstance(half, ClientHalf) or half.pools is None:
        return half
    own: Any = copy_module(half)
    own.pools = None
    return own


class OnnxLookups(TorchFunctionMode):
    """Lookups in a graph are those of torch. To torch a negative number is an error, and ONNX counts it from the
    table's end: it is made one that lies beyond any table. Sums and means of a text's rows, which the exporter writes
    as loops, are those of their rows.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        told = dict(kwargs or {})
        if function is nn.functional.embedding:
            told = _EMBEDDING.bind(*args, **told).arguments
            told["input"] = torch.where(told["input"] < 0, torch.iinfo(torch.int32).max, told["input"])
            return function(**told)
        if function is nn.functional.embedding_bag:
            told = _EMBEDDING_BAG.bind(*args, **told).arguments
            if told.get("offsets") is None and told["input"].dim() == 2:
                return _embedding_bag(**told)
        return function(*args, **(kwargs or {}))


_EMBEDDING, _EMBEDDING_BAG = signature(nn.functional.embedding), signature(nn.functional.embedding_bag)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    **others: Any,
) -> Tensor:
    """embedding_bag of texts of one length: the sum, mean or largest of each one's rows."""
    rows = nn.functional.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    counts = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counts = input != (padding_idx if padding_idx >= 0 else padding_idx + len(weight))
    any_counts = counts.any(1, keepdim=True)
    if mode == "max":
        largest = rows.masked_fill(~counts.unsqueeze(-1), -torch.inf).amax(1)
        return torch.where(any_counts, largest, 0.0)
    total = torch.where(counts.unsqueeze(-1), rows, 0.0).sum(1)
    return total / counts.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else total


@contextmanager
def as_export_errors(half: nn.Module, otherwise: str = "") -> Iterator[None]:
    """What torch cannot export is an ExportError: the exporter's own errors, and whatever a model raises under it.

    otherwise: what else can be done.
    """
    try:
        yield
    except Exception as error:
        cause = next(e for e in _causes(error) if e.__cause__ is None)
        said = " ".join(str(cause).split())[:500]
        way = "cut the model elsewhere, or replace the module that it names"
        if "grouped_mm" in said:
            way = 'tell transformers\' model `set_experts_implementation("batched_mm")`'
        raise ExportError(
            f"torch cannot export the {type(half).__name__}: {type(cause).__name__}: {said}; {way}{otherwise}"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


@contextmanager
def silence_exporter() -> Iterator[None]:
    """Without the exporter's remarks on what of torchvision is missing and what of torch will change."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)

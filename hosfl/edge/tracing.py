"""Tracing of a client half by torch.onnx."""

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

from hosfl.edge.source import ExportError, ExportSource, is_text
from hosfl.halves.blocks import capture_entry_input
from hosfl.halves.follow import CutError
from hosfl.halves.inputs import call
from hosfl.halves.modules import copy_module
from hosfl.halves.narrow import narrow_bfloat16_as_floats
from hosfl.halves.transformer_halves import ClientHalf


class PositionalHalf(nn.Module):
    """The half as a module with positional arguments, as the exporter needs it.

    Its outputs are the cut and, for each of the entries, the entry's input.
    """

    def __init__(self, source: ExportSource, entries: Sequence[str]) -> None:
        super().__init__()
        self.client, self.entries = _without_token_check(source.half), entries
        self.names = list(source.named) if isinstance(source.sample, Mapping) else None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        entry_inputs: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for entry in self.entries:
                hooks.enter_context(capture_entry_input(self.client, entry, partial(entry_inputs.setdefault, entry)))
            cut = call(self.client, tensors[0] if self.names is None else dict(zip(self.names, tensors, strict=True)))
        if unreached := [entry for entry in self.entries if entry not in entry_inputs]:
            raise CutError(f"the forward pass never reaches {unreached[0]}")
        return cut, *(entry_inputs[entry] for entry in self.entries)


def trace_graph(source: ExportSource, entries: Sequence[str], wrapper: type[PositionalHalf] = PositionalHalf) -> Any:
    """Export a half with torch.onnx, and return the model in onnxscript's representation.

    wrapper: the module to trace; its outputs are the graph's outputs. Raises ExportError.
    """
    inputs = source.trace_inputs()
    texts = {name for name, x in inputs.items() if source.any_length and is_text(name, x)}
    sizes = tuple({0: "batch", **({1: "tokens"} if name in texts else {})} for name in inputs)
    client = wrapper(source, entries)
    with as_export_errors(source.half), silence_exporter(), narrow_bfloat16_as_floats(source.half), OnnxEmbeddings():
        program = torch.onnx.export(
            client,
            tuple(inputs.values()),
            dynamo=True,
            optimize=False,  # the optimizer would rename weights, and fold operators on them into constants
            verbose=False,
            input_names=list(inputs),
            output_names=["cut"],
            dynamic_shapes=(sizes,),
        )
    assert program is not None
    return program.model


def _without_token_check(half: nn.Module) -> nn.Module:
    """Return the half without its check of tokens' values, which a graph cannot make."""
    if not isinstance(half, ClientHalf) or half.classifier_pad is None:
        return half
    unchecked: Any = copy_module(half)
    unchecked.classifier_pad = None
    return unchecked


class OnnxEmbeddings(TorchFunctionMode):
    """Mode in which embeddings are traced so that ONNX computes what torch does.

    A negative index is an error to torch, but ONNX counts it from the table's end: it is replaced by one beyond any
    table. `embedding_bag` of texts of one length, which the exporter writes as loops, becomes a lookup and a reduction.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.embedding:
            bound = _EMBEDDING.bind(*args, **kwargs).arguments
            bound["input"] = torch.where(bound["input"] < 0, torch.iinfo(torch.int32).max, bound["input"])
            return function(**bound)
        if function is nn.functional.embedding_bag:
            bound = _EMBEDDING_BAG.bind(*args, **kwargs).arguments
            if bound.get("offsets") is None and bound["input"].dim() == 2:
                return _embedding_bag(**bound)
        return function(*args, **kwargs)


_EMBEDDING, _EMBEDDING_BAG = signature(nn.functional.embedding), signature(nn.functional.embedding_bag)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    **others: Any,
) -> Tensor:
    """`embedding_bag` of texts of one length, [batch, tokens]: the sum, mean or maximum of each text's rows."""
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
    """Context manager: turn every error of the exporter, or of the model under it, into an ExportError.

    otherwise: further advice, appended to the message.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        message = " ".join(str(cause).split())[:500]
        advice = "cut the model elsewhere, or replace the module that it names"
        if "grouped_mm" in message:
            advice = 'call `set_experts_implementation("batched_mm")` on transformers\' model'
        raise ExportError(
            f"torch cannot export the {type(half).__name__}: {type(cause).__name__}: {message}; {advice}{otherwise}"
        ) from error


@contextmanager
def silence_exporter() -> Iterator[None]:
    """Context manager: hide the exporter's warnings, such as those on missing torchvision and future versions."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)

"""The client half that graphs are made of and compared with, and the batches on which they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hosfl.edge.half import BASE, CHECK_STEP, HalfError
from hosfl.extras import require
from hosfl.halves.inputs import Inputs, call, evaluating, mask_of, restoring_state
from hosfl.halves.split import cast_floats
from hosfl.protocol.arrays import widened
from hosfl.protocol.weights import as_file
from hosfl.tasks.padding import TOKEN_INPUTS
from hosfl_kernels import perturb_

TRACE_SAMPLES = 3  # samples that a graph is made of: a batch of one would be taken for a size that never changes
MAX_COMPARED_SAMPLES = 256  # samples of a batch on which it is tried, at most
TOLERANCE = 1e-4  # of the output's largest number
WHERE_MOVED = " where its weights have moved"  # for errors


class ExportError(ValueError):
    """A client half that cannot be run without torch."""


@dataclass(frozen=True)
class Original:
    """A half that graphs are made of and compared with, and a sample of what it takes, both in float32.

    base: the bytes of its base file, in the dtypes that it is stored in. named: the sample by its names in a graph.
    any_length: whether it takes texts of other lengths.
    """

    half: nn.Module
    sample: Inputs
    base: bytes
    named: dict[str, Tensor]
    any_length: bool

    @property
    def kind(self) -> str:
        """The half's class, for errors."""
        return type(self.half).__name__

    @property
    def moving(self) -> dict[str, nn.Parameter]:
        """The weights that move, by name."""
        return {name: p for name, p in self.half.named_parameters() if p.requires_grad}

    def cut(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The half's output for named inputs."""
        output: Tensor = call(self.half, as_half_inputs(self.sample, inputs))
        return output

    def traced(self) -> dict[str, Tensor]:
        """The inputs that a graph is made of."""
        return resize_batch(self.named, TRACE_SAMPLES, shorter=self.any_length)

    def batches(self, most: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Batches on which graph and half are compared: at the ends of what clients send. The last is the smallest.

        Where a model's code looks at sizes, an export takes the way of the sizes that it sees, and says nothing of
        others. most: see `export_half`.
        """
        given, (rows, tokens) = len(next(iter(self.named.values()))), most
        batches = [resize_batch(self.named, given), resize_batch(self.named, TRACE_SAMPLES + 1, self.any_length)]
        if rows > given:
            batches.append(resize_batch(self.named, min(rows, MAX_COMPARED_SAMPLES), self.any_length))
        if self.any_length:
            longest = max(tokens, *(x.shape[1] for name, x in self.named.items() if is_text(name, x)), 2)
            others = [resize_batch(self.named, TRACE_SAMPLES + 1, tokens=length) for length in (longest, 1)]
            batches += [inputs for inputs in others if _accepts(self.half, as_half_inputs(self.sample, inputs))]
        return [*batches, resize_batch(self.named, 1, self.any_length)]

    @contextmanager
    def moved_weights(self, tensors: Sequence[NDArray[Any]]) -> Iterator[None]:
        """Context manager: move the half's trainable weights and those of a session, `tensors`, by the same step.

        Only then does a comparison see what is behind a factor that starts at zero, such as that of a residual branch.
        """
        weights = list(self.moving.values())
        kept = [p.detach().clone() for p in weights]
        perturb_(tensors, 0, CHECK_STEP)
        try:
            _assign(weights, [torch.from_numpy(widened(tensor)) for tensor in tensors])
            yield
        finally:
            _assign(weights, kept)

    @contextmanager
    def graph_folder(self, what: str, graphs: Mapping[str, bytes]) -> Iterator[Path]:
        """A folder with these graphs and the base file. what: how an ExportError calls a graph that does not run."""
        with TemporaryDirectory() as name:
            folder = Path(name)
            for file, data in {**graphs, BASE: self.base}.items():
                (folder / file).write_bytes(data)
            try:
                yield folder
            except HalfError as error:
                way = "; let the layer compute in float32 there" * ("NOT_IMPLEMENTED" in str(error))  # as of bfloat16
                raise ExportError(f"{what} does not run: {error}{way}") from error


@torch.no_grad()
def _assign(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


@contextmanager
def original(half: nn.Module, sample: Inputs) -> Iterator[Original]:
    """The half as `Original`, in eval mode and without a graph. Raises what `export_half` raises of half and sample."""
    for module in ("onnx", "onnxscript"):
        require(module, "the export of a client half", "export")
    _check_half(half)
    base, half, sample = as_file(half.state_dict()), _as_float32(half), _inputs_as_float32(sample)
    named = _named_inputs(sample)
    with evaluating(half), restoring_state(half.modules()):
        _check_cut(half, sample)
        any_length = _accepts(half, as_half_inputs(sample, resize_batch(named, TRACE_SAMPLES, shorter=True)))
        yield Original(half, sample, base, named, any_length)


def _check_half(half: nn.Module) -> None:
    for name, tensor in (*half.named_parameters(), *half.named_buffers()):
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.bfloat16)):
            raise ExportError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}: make the half float32, half.float()"
            )
        if tensor.device.type != "cpu":
            raise ExportError(f"{name} is on {tensor.device}: move the half to the CPU, half.cpu()")


def _as_float32(half: nn.Module) -> nn.Module:
    """The half in float32; its own copy, where it is bfloat16. A graph computes in float32, of weights as they are
    stored: runtimes for processors have few operators in bfloat16."""
    floats = [t for t in (*half.parameters(), *half.buffers()) if t.is_floating_point()]
    return half if all(t.dtype == torch.float32 for t in floats) else cast_floats(copy.deepcopy(half), torch.float32)


def _inputs_as_float32(sample: Inputs) -> Inputs:
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, sample)


def _check_cut(half: nn.Module, sample: Inputs) -> None:
    try:
        cut = call(half, sample)
    except Exception as error:  # whatever a model raises
        raise ExportError(f"the {type(half).__name__} does not take the sample: {error}") from error
    if not isinstance(cut, Tensor):
        raise ExportError(f"the cut must be one tensor, and the half makes a {type(cut).__name__}")
    if cut.dtype != torch.float32 or not cut.isfinite().all():
        found = f"{cut.dtype}, and {'all' if cut.isfinite().all() else 'not all'} of it is finite"
        raise ExportError(f"the cut of the sample must be finite and float32: it is {found}; cut the model elsewhere")


def _named_inputs(sample: Inputs) -> dict[str, Tensor]:
    """The inputs by the names that they have in the graph."""
    named: dict[str, Any] = dict(sample) if isinstance(sample, Mapping) else {"input": sample}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ExportError(
                f"{name} is a {type(x).__name__}: a half is exported for a tensor, or for tensors by name"
            )
        if not x.dim() or not len(x):
            raise ExportError(
                f"{name} is {[*x.shape]}: its first dimension must be that of samples, of which one is needed"
            )
    return named


def resize_batch(named: Mapping[str, Tensor], rows: int, shorter: bool = False, tokens: int = 0) -> dict[str, Tensor]:
    """So many samples, the given ones over and over; shorter: texts of fewer tokens, or of two for one; tokens: of so
    many, theirs over and over."""
    found = {}
    for name, x in named.items():
        x = x[torch.arange(rows) % len(x)]
        if (shorter or tokens) and is_text(name, x):
            x = x[:, torch.arange(tokens or max(2, x.shape[1] - 1 - x.shape[1] // 4)) % x.shape[1]]
        found[name] = x
    mask = mask_of(found)
    if mask is not None and mask.dim() == 2:
        mask[~mask.bool().any(1)] = 1  # of a text that lies where no token is left
    return found


def describe_batch(inputs: Mapping[str, Tensor]) -> str:
    """Of a batch, for errors."""
    name, first = next(iter(inputs.items()))
    return f"{len(first)} samples" + (f" of {first.shape[1]} tokens" if is_text(name, first) else "")


def is_text(name: str, x: Tensor) -> bool:
    """Whether an input is of tokens in its second dimension."""
    return x.dim() > 1 if name in TOKEN_INPUTS else x.dim() == 2 and not x.is_floating_point()


def as_half_inputs(sample: Inputs, named: Mapping[str, Tensor]) -> Inputs:
    """Named inputs as the half takes them."""
    return named if isinstance(sample, Mapping) else named["input"]


def _accepts(half: nn.Module, inputs: Inputs) -> bool:
    try:
        call(half, inputs)
    except Exception:  # whatever a model raises
        return False
    return True

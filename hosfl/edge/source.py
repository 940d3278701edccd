"""A client half prepared for export, and the batches on which its graphs are compared with it."""

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

TRACE_SAMPLES = 3  # batch size of the trace; the exporter would take a batch of 1 for a size that never changes
MAX_COMPARED_SAMPLES = 256  # the largest batch size on which graph and half are compared
TOLERANCE = 1e-4  # relative to the output's largest absolute value
WHERE_MOVED = " where its weights have moved"  # a part of error messages


class ExportError(ValueError):
    """A client half that cannot be exported to ONNX."""


@dataclass(frozen=True)
class ExportSource:
    """The half to export and a sample of its inputs, both in float32. Graphs are traced from it and compared with it.

    base: the bytes of its base file, in the dtypes that it is stored in. named: the sample's tensors by the names that
    they have in a graph. any_length: whether the half takes texts of any length.
    """

    half: nn.Module
    sample: Inputs
    base: bytes
    named: dict[str, Tensor]
    any_length: bool

    @property
    def kind(self) -> str:
        """The name of the half's class, for error messages."""
        return type(self.half).__name__

    @property
    def moving(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by name."""
        return {name: p for name, p in self.half.named_parameters() if p.requires_grad}

    def cut(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The half's output for named inputs."""
        output: Tensor = call(self.half, as_half_inputs(self.sample, inputs))
        return output

    def trace_inputs(self) -> dict[str, Tensor]:
        """The inputs with which the half is traced."""
        return resize_batch(self.named, TRACE_SAMPLES, shorter=self.any_length)

    def batches(self, max_sizes: tuple[int, int]) -> list[dict[str, Tensor]]:
        """The batches on which graph and half are compared: the smallest and largest sizes, and some between.

        Several sizes are needed because a model's code may branch on sizes. An export takes the branch of the traced
        sizes, without a warning. The last batch is the smallest. max_sizes: see `export_half`.
        """
        rows, (max_rows, max_tokens) = len(next(iter(self.named.values()))), max_sizes
        batches = [resize_batch(self.named, rows), resize_batch(self.named, TRACE_SAMPLES + 1, self.any_length)]
        if max_rows > rows:
            batches.append(resize_batch(self.named, min(max_rows, MAX_COMPARED_SAMPLES), self.any_length))
        if self.any_length:
            longest = max(max_tokens, *(x.shape[1] for name, x in self.named.items() if is_text(name, x)), 2)
            extremes = [resize_batch(self.named, TRACE_SAMPLES + 1, tokens=length) for length in (longest, 1)]
            batches += [inputs for inputs in extremes if _accepts(self.half, as_half_inputs(self.sample, inputs))]
        return [*batches, resize_batch(self.named, 1, self.any_length)]

    @contextmanager
    def shifted_weights(self, tensors: Sequence[NDArray[Any]]) -> Iterator[None]:
        """Context manager: shift the half's trainable weights and those of a session, `tensors`, by the same step.

        A comparison with shifted weights also covers layers whose output is multiplied by a weight that starts at zero,
        such as a residual branch. The half's weights are restored on exit; `tensors` are not.
        """
        weights = list(self.moving.values())
        saved = [p.detach().clone() for p in weights]
        perturb_(tensors, 0, CHECK_STEP)
        try:
            _assign(weights, [torch.from_numpy(widened(tensor)) for tensor in tensors])
            yield
        finally:
            _assign(weights, saved)

    @contextmanager
    def graph_folder(self, title: str, graphs: Mapping[str, bytes]) -> Iterator[Path]:
        """Context manager: a temporary folder with these graphs, by file name, and the base file.

        Turns a HalfError of the block into an ExportError that begins with `title`, a name for the graphs.
        """
        with TemporaryDirectory() as name:
            folder = Path(name)
            for file, data in {**graphs, BASE: self.base}.items():
                (folder / file).write_bytes(data)
            try:
                yield folder
            except HalfError as error:
                not_implemented = "NOT_IMPLEMENTED" in str(error)  # for example an operator in bfloat16
                hint = "; let the layer compute in float32 there" if not_implemented else ""
                raise ExportError(f"{title} does not run: {error}{hint}") from error


@torch.no_grad()
def _assign(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Copy values into weights."""
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


@contextmanager
def export_source(half: nn.Module, sample: Inputs) -> Iterator[ExportSource]:
    """Context manager: check half and sample, and yield them as an `ExportSource`.

    Inside, the half is in eval mode and gradients are off; its state is restored on exit. Raises ExportError for a half
    or sample that cannot be exported, ImportError where onnx or onnxscript is missing.
    """
    for module in ("onnx", "onnxscript"):
        require(module, "the export of a client half", "export")
    _check_half(half)
    base, half, sample = as_file(half.state_dict()), _as_float32(half), _inputs_as_float32(sample)
    named = _named_inputs(sample)
    with evaluating(half), restoring_state(half.modules()):
        _check_cut(half, sample)
        any_length = _accepts(half, as_half_inputs(sample, resize_batch(named, TRACE_SAMPLES, shorter=True)))
        yield ExportSource(half, sample, base, named, any_length)


def _check_half(half: nn.Module) -> None:
    """Raise ExportError for tensors of other dtypes than float32 and bfloat16, or not on the CPU."""
    for name, tensor in (*half.named_parameters(), *half.named_buffers()):
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.bfloat16)):
            raise ExportError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}: make the half float32, half.float()"
            )
        if tensor.device.type != "cpu":
            raise ExportError(f"{name} is on {tensor.device}: move the half to the CPU, half.cpu()")


def _as_float32(half: nn.Module) -> nn.Module:
    """Return the half in float32; a copy unless it is float32 already.

    Graphs compute in float32, from weights in the dtype that they are stored in: CPU runtimes have few operators in
    bfloat16.
    """
    floats = [t for t in (*half.parameters(), *half.buffers()) if t.is_floating_point()]
    return half if all(t.dtype == torch.float32 for t in floats) else cast_floats(copy.deepcopy(half), torch.float32)


def _inputs_as_float32(sample: Inputs) -> Inputs:
    """Convert inputs in bfloat16 to float32."""
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, sample)


def _check_cut(half: nn.Module, sample: Inputs) -> None:
    """Raise ExportError unless the half makes one finite float32 tensor from the sample."""
    try:
        cut = call(half, sample)
    except Exception as error:  # whatever a model raises
        raise ExportError(f"the {type(half).__name__} does not take the sample: {error}") from error
    if not isinstance(cut, Tensor):
        raise ExportError(f"the cut must be one tensor, and the half makes a {type(cut).__name__}")
    if cut.dtype != torch.float32 or not cut.isfinite().all():
        actual = f"{cut.dtype}, and {'all' if cut.isfinite().all() else 'not all'} of it is finite"
        raise ExportError(f"the cut of the sample must be finite and float32: it is {actual}; cut the model elsewhere")


def _named_inputs(sample: Inputs) -> dict[str, Tensor]:
    """The inputs by their names in the graph. Raises ExportError for anything but tensors [samples, ...]."""
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
    """Return a batch of `rows` samples, made by repeating those of `named`.

    shorter: cut texts to about 3/4 of their length, but at least 2 tokens. tokens: give texts this length, repeating
    their tokens; 0: leave it. Every row of a mask keeps at least one 1.
    """
    resized = {}
    for name, x in named.items():
        x = x[torch.arange(rows) % len(x)]
        if (shorter or tokens) and is_text(name, x):
            x = x[:, torch.arange(tokens or max(2, x.shape[1] - 1 - x.shape[1] // 4)) % x.shape[1]]
        resized[name] = x
    mask = mask_of(resized)
    if mask is not None and mask.dim() == 2:
        mask[~mask.bool().any(1)] = 1  # the cut may have left a text nothing but padding
    return resized


def describe_batch(inputs: Mapping[str, Tensor]) -> str:
    """The sizes of a batch, for error messages: "4 samples of 12 tokens"."""
    name, first = next(iter(inputs.items()))
    return f"{len(first)} samples" + (f" of {first.shape[1]} tokens" if is_text(name, first) else "")


def is_text(name: str, x: Tensor) -> bool:
    """Whether an input's second dimension is tokens."""
    return x.dim() > 1 if name in TOKEN_INPUTS else x.dim() == 2 and not x.is_floating_point()


def as_half_inputs(sample: Inputs, named: Mapping[str, Tensor]) -> Inputs:
    """Return named inputs in the form of `sample`: a mapping, or the one tensor."""
    return named if isinstance(sample, Mapping) else named["input"]


def _accepts(half: nn.Module, inputs: Inputs) -> bool:
    """Whether the half computes these inputs without an error."""
    try:
        call(half, inputs)
    except Exception:  # whatever a model raises
        return False
    return True

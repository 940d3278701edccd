"""Narrow storage of frozen weights: bfloat16, or integers and scales. A layer's weights are dequantized while it runs.

int8, int4, int2: each row of a weight, such as an output channel's or a token's vector, is cut into groups of 64
elements or a little fewer. weight = scale * q, with scale = max|weight| of the group / L, L = 2^(bits - 1) - 1, and
q = weight / scale rounded to the nearest integer, ties to even, -L <= q <= L. So the error is half a scale at most.

int4 is packed two to a byte and int2, which is {-1, 0, 1}, four to a byte: lowest bits first, as q + 2^(bits - 1). All
steps are exact or round once, so that every machine stores the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

BITS = {"bfloat16": 16, "int8": 8, "int4": 4, "int2": 2}
FROZEN = ("float32", *BITS)
GROUP = 64


def narrow_weights(half: nn.Module, frozen: str) -> nn.Module:
    """Store the frozen weights of a half in fewer bits. Returns the half, changed in place.

    frozen: one of FROZEN; "float32" changes nothing. Narrowed are parameters that do not require grad and have at least
    two dimensions longer than 1, except those of normalisations, of nn.LSTM, GRU and RNN, which hold their weights
    twice, and of embeddings with max_norm, which write into theirs. Other parameters are small.

    A narrow parameter keeps its name and its position among the parameters, and so its stream of noise. In
    `_parameters` it is integers, which no cast changes, beside the buffer `<name>_scale`. Reading the attribute makes a
    new tensor in the scale's dtype: the layer's original dtype, or the one that the half was cast to since. Writes to
    that tensor are lost, such as merging adapters into it. An nn.Embedding dequantizes only the rows that it looks up.

    Backpropagation keeps dequantized weights until it has run, except under `recompute_wide_weights`. The module can be
    copied and its state dict stored, but it cannot be pickled.

    Raises ValueError if there is nothing to narrow, and for weights that are infinite or NaN.
    """
    if frozen == "float32":
        return half
    narrowed: dict[int, tuple[nn.Parameter, Tensor]] = {}  # by the wide parameter's id, so that tied ones stay tied
    for path, module in half.named_modules():
        wide = {name: p for name, p in module._parameters.items() if p is not None and _is_narrowable(module, p)}
        for name, p in wide.items():
            if id(p) not in narrowed:
                if not torch.isfinite(p).all():
                    where = f"{path}.{name}".lstrip(".")
                    raise ValueError(f"{where} has infinite or NaN weights, which cannot be stored as {frozen}")
                stored, scale = _quantize(p.detach(), BITS[frozen])
                narrowed[id(p)] = nn.Parameter(stored, requires_grad=False), scale
            module._parameters[name], scale = narrowed[id(p)]
            module.register_buffer(f"{name}_scale", scale)
        if wide:
            kind: Any = type(module)
            module.__dict__["narrow"] = {name: (p.shape, BITS[frozen]) for name, p in wide.items()}
            module.__class__ = _narrow_class(kind, tuple(wide))
    if not narrowed:
        raise ValueError(
            f"frozen={frozen!r} finds nothing to store: every weight of the client half is trainable, or of a kind that"
            " is not narrowed; choose what is trained by trains"
        )
    return half


def narrow_names(half: nn.Module) -> list[str]:
    """The names in the state dict of the weights that are stored narrow; all names of tied ones."""
    modules = half.named_modules(remove_duplicate=False)
    return [f"{path}.{name}" if path else name for path, m in modules for name in vars(m).get("narrow", ())]


@contextmanager
def narrow_bfloat16_as_floats(half: nn.Module) -> Iterator[None]:
    """Context manager: give weights stored as bfloat16 that dtype instead of int16.

    torch's ONNX exporter has no operator that reinterprets bits.
    """
    parameters: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for module in half.modules():
        own: dict[str, Any] = module._parameters
        narrow = vars(module).get("narrow", {})
        parameters += [(own, name, own[name]) for name, (_, bits) in narrow.items() if bits == 16]
    # By id, so that tied ones stay tied.
    floats = {id(p): nn.Parameter(p.view(torch.bfloat16), requires_grad=False) for *_, p in parameters}
    try:
        for own, name, stored in parameters:
            own[name] = floats[id(stored)]
        yield
    finally:
        for own, name, stored in parameters:
            own[name] = stored


def _is_narrowable(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether `narrow_weights` stores a module's parameter in fewer bits."""
    excluded = isinstance(module, (nn.RNNBase, torch.jit.ScriptModule)) or "norm" in type(module).__name__.lower()
    writes = getattr(module, "max_norm", None) is not None
    is_matrix = parameter.is_floating_point() and sum(n > 1 for n in parameter.shape) > 1
    return is_matrix and not (parameter.requires_grad or excluded or writes)


def _quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight [n, ...]. Returns (stored, scales [n, groups, 1] in the weight's dtype).

    stored: [n, groups, bytes of a group], uint8 or, for 8 bits, int8. For 16 bits it is the bits of bfloat16 as int16,
    [n, 1, elements], and the scale is 1, [1, 1, 1].
    """
    rows = weight.reshape(len(weight), -1)
    if bits == 16:
        return rows.bfloat16().view(torch.int16).unsqueeze(1), torch.ones(1, 1, 1, dtype=weight.dtype)
    groups, per_byte, top = math.ceil(rows.shape[1] / GROUP), 8 // bits, 2 ** (bits - 1) - 1
    size = math.ceil(rows.shape[1] / groups / per_byte) * per_byte  # of a group; the last one is padded with zeros
    padded = nn.functional.pad(rows, (0, groups * size - rows.shape[1])).view(-1, groups, size)
    scale = padded.abs().amax(-1, keepdim=True) / top
    quotients = padded.float() / torch.where(scale > 0, scale, 1.0).float()
    levels = quotients.round().clamp(-top, top).to(torch.int8)
    if per_byte == 1:
        return levels, scale
    parts = (levels + (top + 1)).to(torch.uint8).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(per_byte, dtype=torch.uint8) * bits
    return (parts << shifts).sum(-1).to(torch.uint8), scale


def _dequantize(stored: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Undo `_quantize`: stored [..., groups, bytes of a group] and scale [..., groups, 1] -> weights [..., elements].

    The last group's padding is still there.
    """
    if bits == 16:
        floats = stored if stored.is_floating_point() else stored.view(torch.bfloat16)
        return floats.to(scale.dtype).flatten(-2)
    if bits == 8:
        return stored.to(scale.dtype).mul_(scale).flatten(-2)
    if torch.compiler.is_exporting():
        parts = _unpack_by_division(stored.to(scale.dtype), bits)
    else:
        parts = [(stored >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2).to(scale.dtype).sub_(2 ** (bits - 1)).mul_(scale).flatten(-2)


def _unpack_by_division(packed: Tensor, bits: int) -> list[Tensor]:
    """Unpack the numbers of each byte by division: torch's ONNX exporter writes shifts with types that do not match."""
    parts = []
    for _ in range(0, 8, bits):
        quotient = (packed / 2**bits).floor()
        parts.append(packed - quotient * 2**bits)
        packed = quotient
    return parts


def _read_wide(name: str, module: Any) -> Tensor:
    """Dequantize a module's parameter into a new tensor of its original shape."""
    shape, bits = module.narrow[name]
    rows = _dequantize(module._parameters[name], module._buffers[f"{name}_scale"], bits)
    wide = rows[:, : math.prod(shape[1:])].reshape(shape)
    if _recorded_reads:
        _recorded_reads[-1][wide.untyped_storage().data_ptr()] = ref(wide), name, module
    return wide


# For each active `recompute_wide_weights`: (dequantized weight, its name, its module) by the address of its storage.
_recorded_reads: list[dict[int, tuple[ref[Tensor], str, Any]]] = []


@contextmanager
def recompute_wide_weights() -> Iterator[None]:
    """Context manager: autograd saves no dequantized weights; the backward pass dequantizes each layer's again."""
    reads: dict[int, tuple[ref[Tensor], str, Any]] = {}

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        read = reads.get(saved.untyped_storage().data_ptr())
        if read is None or read[0]() is None:  # the memory of a freed weight may be another tensor's now
            return saved
        geometry = saved.shape, saved.stride(), saved.storage_offset()
        return lambda: _read_wide(*read[1:]).as_strided(*geometry)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    _recorded_reads.append(reads)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _recorded_reads.pop()


class NarrowEmbedding(nn.Embedding):
    """An nn.Embedding with a narrow table. It dequantizes only the rows that it looks up."""

    narrow: dict[str, tuple[torch.Size, int]]

    def forward(self, input: Tensor) -> Tensor:
        (_, width), bits = self.narrow["weight"]
        stored, scale = self._parameters["weight"], self._buffers["weight_scale"]
        assert stored is not None
        assert scale is not None
        return _dequantize(_table_rows(stored, input), scale if bits == 16 else _table_rows(scale, input), bits)[
            ..., :width
        ]


def _table_rows(table: Tensor, tokens: Tensor) -> Tensor:
    """The rows of a table [n, ...], one per token.

    Negative tokens raise as in any embedding; indexing would count them from the end.
    """
    return nn.functional.embedding(tokens, table.flatten(1)).unflatten(-1, table.shape[1:])


@cache
def _narrow_class(kind: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `kind` with the same forward pass, in which reading these attributes dequantizes the parameters."""
    bases: tuple[type, ...] = (kind,)
    if issubclass(kind, nn.Embedding) and "weight" in names:
        bases = (NarrowEmbedding,) if kind is nn.Embedding else (kind, NarrowEmbedding)
    properties = {name: property(partial(_read_wide, name)) for name in names}
    return type(kind.__name__, bases, {"__module__": kind.__module__, **properties})

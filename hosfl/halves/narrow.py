"""Frozen weights in fewer bits: bfloat16, or integers and scales. A layer's are dequantized while it uses them.

int8, int4, int2: a row of a weight, such as those of one output channel or the vector of one token, is cut into groups
of 64 or a little fewer. weight = scale * q; scale = max|weight| of the group / L, q = weight / scale rounded to the
nearest, ties to even; -L <= q <= L and L = 2^(bits - 1) - 1. So the error is half a scale at most. int4 lies two to a
byte and int2, which is {-1, 0, 1}, four, lowest bits first and 2^(bits - 1) above zero. Only exact steps and single
roundings: every machine stores the same bits.
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
    """Store every weight that does not require grad as `frozen` says; returns the half, changed in place.

    frozen: of FROZEN; "float32" leaves all as it is. Weights are parameters with two dimensions or more that are longer
    than 1, of any module but normalisations, nn.LSTM, GRU and RNN, which hold theirs twice, and embeddings with
    max_norm, which write theirs. The rest is small and stays.

    A narrow parameter keeps its name and its place among the parameters, and so every stream of noise: in
    `_parameters` it is integers, which no cast touches, with the buffer `<name>_scale`. Reading the attribute makes a
    new tensor in the scale's dtype: the layer's original dtype, or the one that the half was cast to since. Of an
    nn.Embedding only the rows that are looked up are made. Writes to that tensor are lost, such as merging adapters
    into it. Backpropagation holds it until it has run, except under `recompute_wide_weights`. The module can be copied
    and its state dict stored, but it cannot be pickled.

    Raises ValueError where there is nothing to narrow, and for weights that are infinite or NaN.
    """
    if frozen == "float32":
        return half
    done: dict[int, tuple[nn.Parameter, Tensor]] = {}  # by the wide parameter: tied ones stay tied
    for path, module in half.named_modules():
        wide = {name: p for name, p in module._parameters.items() if p is not None and _is_narrowable(module, p)}
        for name, p in wide.items():
            if id(p) not in done:
                if not torch.isfinite(p).all():
                    where = f"{path}.{name}".lstrip(".")
                    raise ValueError(f"{where} has infinite or NaN weights, which cannot be stored as {frozen}")
                stored, scale = _quantize(p.detach(), BITS[frozen])
                done[id(p)] = nn.Parameter(stored, requires_grad=False), scale
            module._parameters[name], scale = done[id(p)]
            module.register_buffer(f"{name}_scale", scale)
        if wide:
            kind: Any = type(module)
            module.__dict__["narrow"] = {name: (p.shape, BITS[frozen]) for name, p in wide.items()}
            module.__class__ = _narrow_class(kind, tuple(wide))
    if not done:
        raise ValueError(
            f"frozen={frozen!r} finds nothing to store so: every weight of the client half moves, or is of a kind that"
            " stays as it is; choose what moves by trains"
        )
    return half


def narrow_names(half: nn.Module) -> list[str]:
    """The weights of a half that are stored narrow, by their names in its state dict; of tied ones all names."""
    modules = half.named_modules(remove_duplicate=False)
    return [f"{path}.{name}" if path else name for path, m in modules for name in vars(m).get("narrow", ())]


@contextmanager
def narrow_bfloat16_as_floats(half: nn.Module) -> Iterator[None]:
    """Context manager: weights stored as bfloat16 have that dtype inside, not int16.

    torch's ONNX exporter has no operator that reinterprets the bits.
    """
    held: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for module in half.modules():
        parameters: dict[str, Any] = module._parameters
        narrow = vars(module).get("narrow", {})
        held += [(parameters, name, parameters[name]) for name, (_, bits) in narrow.items() if bits == 16]
    floats = {id(p): nn.Parameter(p.view(torch.bfloat16), requires_grad=False) for *_, p in held}  # tied ones stay tied
    try:
        for parameters, name, stored in held:
            parameters[name] = floats[id(stored)]
        yield
    finally:
        for parameters, name, stored in held:
            parameters[name] = stored


def _is_narrowable(module: nn.Module, parameter: nn.Parameter) -> bool:
    kept = isinstance(module, (nn.RNNBase, torch.jit.ScriptModule)) or "norm" in type(module).__name__.lower()
    writes = getattr(module, "max_norm", None) is not None
    matrix = parameter.is_floating_point() and sum(n > 1 for n in parameter.shape) > 1
    return matrix and not (parameter.requires_grad or kept or writes)


def _quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[n, ...] -> integers [n, groups, bytes or numbers of a group], and scales [n, groups, 1] in its dtype."""
    rows = weight.reshape(len(weight), -1)
    if bits == 16:
        return rows.bfloat16().view(torch.int16).unsqueeze(1), torch.ones(1, 1, 1, dtype=weight.dtype)
    groups, per, top = math.ceil(rows.shape[1] / GROUP), 8 // bits, 2 ** (bits - 1) - 1
    size = math.ceil(rows.shape[1] / groups / per) * per  # groups as equal as can be; zeros fill up the last one
    padded = nn.functional.pad(rows, (0, groups * size - rows.shape[1])).view(-1, groups, size)
    scale = padded.abs().amax(-1, keepdim=True) / top
    quotients = padded.float() / torch.where(scale > 0, scale, 1.0).float()
    levels = quotients.round().clamp(-top, top).to(torch.int8)
    if per == 1:
        return levels, scale
    parts = (levels + (top + 1)).to(torch.uint8).unflatten(-1, (-1, per))
    shifts = torch.arange(per, dtype=torch.uint8) * bits
    return (parts << shifts).sum(-1).to(torch.uint8), scale


def _dequantize(stored: Tensor, scale: Tensor, bits: int) -> Tensor:
    """[..., groups, bytes or numbers], [..., groups, 1] -> scale * q, [..., groups * numbers of a group]."""
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


def _unpack_by_division(bytes_: Tensor, bits: int) -> list[Tensor]:
    """The numbers of each byte without a shift, which torch's exporter to ONNX writes with types that do not fit."""
    parts = []
    for _ in range(0, 8, bits):
        rest = (bytes_ / 2**bits).floor()
        parts.append(bytes_ - rest * 2**bits)
        bytes_ = rest
    return parts


def _read_wide(name: str, module: Any) -> Tensor:
    shape, bits = module.narrow[name]
    rows = _dequantize(module._parameters[name], module._buffers[f"{name}_scale"], bits)
    wide = rows[:, : math.prod(shape[1:])].reshape(shape)
    if _recorded_reads:
        _recorded_reads[-1][wide.untyped_storage().data_ptr()] = ref(wide), name, module
    return wide


_recorded_reads: list[
    dict[int, tuple[ref[Tensor], str, Any]]
] = []  # wide weights by their address, of each `recompute_wide_weights`


@contextmanager
def recompute_wide_weights() -> Iterator[None]:
    """Context manager: autograd saves no dequantized weights; the backward pass dequantizes each layer's again."""
    made: dict[int, tuple[ref[Tensor], str, Any]] = {}

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        found = made.get(saved.untyped_storage().data_ptr())
        if found is None or found[0]() is None:  # an address is a weight's for as long as the weight is there
            return saved
        place = saved.shape, saved.stride(), saved.storage_offset()
        return lambda: _read_wide(*found[1:]).as_strided(*place)

    _recorded_reads.append(made)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held if isinstance(held, Tensor) else held()):
            yield
    finally:
        _recorded_reads.pop()


class NarrowEmbedding(nn.Embedding):
    """An nn.Embedding with a quantized table: only the rows that are looked up are dequantized."""

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
    """Of a table [n, ...]. A negative token is the error that it is in a wide one: an index counts it from the end."""
    return nn.functional.embedding(tokens, table.flatten(1)).unflatten(-1, table.shape[1:])


@cache
def _narrow_class(kind: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `kind` with the same forward pass, whose attributes of these names dequantize the parameters."""
    bases: tuple[type, ...] = (kind,)
    if issubclass(kind, nn.Embedding) and "weight" in names:
        bases = (NarrowEmbedding,) if kind is nn.Embedding else (kind, NarrowEmbedding)
    properties = {name: property(partial(_read_wide, name)) for name in names}
    return type(kind.__name__, bases, {"__module__": kind.__module__, **properties})

"""Baselines of the GPU kernels: Triton's own normal numbers, `tl.randn` and `tl.randn4x`, in simple kernels.

The numbers are Triton's, which differ from ours and between devices. Needs triton, and a GPU or Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _new(out, n, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.randn(seed, at.to(tl.uint32)), at < n)


@triton.jit
def _add(x, n, seed, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    old = tl.load(x + at, at < n).to(tl.float32)
    tl.store(x + at, (old + scale * tl.randn(seed, at.to(tl.uint32))).to(x.dtype.element_ty), at < n)


@triton.jit
def _add_four(x, n, seed, scale, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    numbers = tl.randn4x(seed, program * BLOCK + tl.arange(0, BLOCK))
    for part in tl.static_range(4):
        at = (program.to(tl.int64) * 4 + part) * BLOCK + tl.arange(0, BLOCK)
        old = tl.load(x + at, at < n).to(tl.float32)
        tl.store(x + at, (old + scale * numbers[part]).to(x.dtype.element_ty), at < n)


def randn(n: int, seed: int = 1, device: str = "cuda") -> Tensor:
    """Return `tl.randn` of the numbers 0 to n - 1, float32 [n]."""
    out = torch.empty(n, device=device)
    _new[(triton.cdiv(n, BLOCK),)](out, n, seed, BLOCK)
    return out


def add_(x: Tensor, scale: float, seed: int = 1) -> None:
    """Add scale * `tl.randn` in place. x: contiguous, of any floating dtype."""
    _add[(triton.cdiv(x.numel(), BLOCK),)](x, x.numel(), seed, scale, BLOCK)


def add_four_(x: Tensor, scale: float, seed: int = 1) -> None:
    """Do the same with `tl.randn4x`, which uses all of the four words that Philox makes at a time."""
    _add_four[(triton.cdiv(x.numel(), 4 * BLOCK),)](x, x.numel(), seed, scale, BLOCK)

"""Compile every kernel variant without a GPU: `python -m hosfl_kernels.gpu.offline DIRECTORY 80 90`.

Kernels, constants and options are those of launches. Nothing is specialised on an argument's value, so these are the
same binaries that a launch compiles.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import choices, rows
from .launch import INTERPRETED, OPTIONS, Variant


def variants(capability: int | None = None) -> dict[str, Variant]:
    """Every variant that a call can use, by name.

    These are the defaults and, as NAME@SIZE, those with the shapes of choices.json for this compute capability; and
    those of perturb_rows_, which has one shape.
    """
    kernels = choices.kernels()
    result = {name: kernel.variant(kind, kernel.default(kind)) for name, (kernel, kind) in kernels.items()}
    result |= {f"rows-{kind}": variant for kind, variant in rows.VARIANTS.items()}
    for size in choices.SIZES:
        for name, shape in choices.shapes_for(capability, size).items():
            kernel, kind = kernels[name]
            result[f"{name}@{size}"] = kernel.variant(kind, shape)
    return result


def compile_variant(variant: Variant, capability: int) -> Any:
    """Compile a variant for compute capability 80, 90, ... The result's `asm` holds ptx and cubin."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it to compile")
    parameters = inspect.signature(variant.kernel.fn).parameters
    arguments = {name: _type(name, p) for name, p in parameters.items() if name not in variant.constants}
    if list(arguments) != list(variant.kernel.do_not_specialize):
        raise AssertionError(f"{variant.kernel.fn.__name__}: an argument is missing in do_not_specialize")
    signature = {name: arguments.get(name, "constexpr") for name in parameters}
    constants = {(list(signature).index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(variant.kernel, signature, constants, {})
    options = {**OPTIONS, "num_warps": variant.num_warps}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _type(name: str, parameter: inspect.Parameter) -> str:
    """Triton's name of an argument's type. Integers have annotations; tables are int64, except `row_of_program`."""
    if parameter.annotation is inspect.Parameter.empty:
        return "*i32" if name == "row_of_program" else "*i64"
    return str(parameter.annotation.name).replace("uint", "u").replace("int", "i")


def compile_all(capability: int) -> dict[str, Any]:
    """Compile every variant. Returns the compiled kernels by name."""
    return {name: compile_variant(variant, capability) for name, variant in variants(capability).items()}


def main(directory: str, *capabilities: str) -> None:
    """Write the ptx and cubin of every variant to DIRECTORY/sm_CAPABILITY."""
    for capability in capabilities:
        target = Path(directory) / f"sm_{capability}"
        target.mkdir(parents=True, exist_ok=True)
        for name, compiled in compile_all(int(capability)).items():
            (target / f"{name}.ptx").write_text(compiled.asm["ptx"])
            (target / f"{name}.cubin").write_bytes(compiled.asm["cubin"])


if __name__ == "__main__":
    main(*sys.argv[1:])

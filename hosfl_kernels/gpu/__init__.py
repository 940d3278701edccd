"""The Triton backend: kernels for CUDA, and for CPU tensors in Triton's interpreter (TRITON_INTERPRET=1).

This package can be imported without triton and without a GPU; calls then raise RuntimeError. Arguments are validated by
ops.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any


def module(name: str) -> Any:
    """Import a module of this package. It needs triton, which takes a second to import, so this happens at first use.

    Raises RuntimeError without triton.
    """
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise RuntimeError("the Triton backend needs the package triton") from error


def describe() -> str | None:
    """What this backend runs on, or None if it cannot run here."""
    try:
        launch = module("launch")
    except RuntimeError:
        return None
    if launch.INTERPRETED:
        return "interpreter"
    cuda = launch.torch.cuda
    if not cuda.is_available():
        return None
    major, minor = cuda.get_device_capability()
    return f"cuda sm_{major}{minor} ({cuda.get_device_name()})"


def each_size() -> Iterator[str]:
    """Yield the size classes. Until the next one, launches of any size take the shapes of the current one.

    Yields only "all" if this GPU's table does not distinguish them.
    """
    launch, choices = module("launch"), module("choices")
    capability = launch.capability(launch.torch.device("cpu" if launch.INTERPRETED else "cuda"))
    shapes = {size: choices.shapes_for(capability, size) for size in choices.SIZES}
    if all(shape == shapes["small"] for shape in shapes.values()):
        shapes = {"all": shapes["small"]}
    for size, shape in shapes.items():
        with launch.override_shapes(shape):
            yield size


def philox_words(key: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Four words, as spec.py's `philox` makes them."""
    words: tuple[int, ...] = module("launch").philox_words(key, counter)
    return words


MODULES: list[str] = []  # the names of the ops' modules


def _op(name: str, module_name: str) -> Callable[..., Any]:
    """Return a function that calls an op of a module, which is imported at the first call."""
    MODULES.append(module_name)

    def call(*arguments: Any) -> Any:
        return getattr(module(module_name), name)(*arguments)

    return call


noise_ = _op("noise_", "noise")
perturb_ = _op("perturb_", "perturb")
perturb_rows_ = _op("perturb_rows_", "rows")
replay_ = _op("replay_", "replay")
update_ = _op("update_", "update")
project = _op("project", "projection")

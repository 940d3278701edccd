"""torchvision and timm for the tests, also where torchvision's wheel does not fit torch's.

The wheels of PyPI go with torch's for CUDA: beside torch's for the CPU they do not load, because operators of theirs
are missing that no classifier needs. `make` therefore puts both packages into a folder of their own, which only these
tests read.
"""

import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(sys.prefix) / "pictures"
MISSING = ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")


@lru_cache(maxsize=1)
def packages() -> tuple[ModuleType, ModuleType]:
    """torchvision.models, and timm. The folder is left out of the path again, which processes that tests start have
    from this one: there transformers would find a torchvision that it cannot load."""
    sys.path.append(str(FOLDER))
    try:
        return _imported()
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [n for n in sys.modules if n.partition(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in MISSING:
            for operator in (name, f"_{name}_backward"):
                library.define(f"{operator}(Tensor x) -> Tensor")
        packages.library = library  # type: ignore[attr-defined]  # which goes with the object
        return _imported()
    finally:
        sys.path.remove(str(FOLDER))


def _imported() -> tuple[ModuleType, ModuleType]:
    return import_module("torchvision.models"), import_module("timm")

"""The parameter shapes of common models, and of adapters for them; weights are not needed."""

from __future__ import annotations

from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def resnet18() -> Shapes:
    """Return the shapes of torchvision's ResNet-18 for ImageNet (He et al., 2016): 11,689,512 numbers, 62 tensors."""

    def convolution(width: int, out: int, size: int) -> Shapes:
        return [(out, width, size, size), (out,), (out,)]  # with its normalisation's weight and bias

    shapes = convolution(3, 64, 7)
    for width, out in ((64, 64), (64, 128), (128, 256), (256, 512)):
        shapes += convolution(width, out, 3) + convolution(out, out, 3)
        shapes += convolution(width, out, 1) if width != out else []
        shapes += convolution(out, out, 3) * 2
    return [*shapes, (1000, 512), (1000,)]


def opt_125m() -> Shapes:
    """Return the shapes of OPT-125M (Zhang et al., 2022): 125,239,296 numbers, 196 tensors; the head is tied."""
    width, hidden = 768, 3072
    linear = [(width, width), (width,)]
    layer = [*linear * 4, (width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,), (width,), (width,)]
    return [(50272, width), (2050, width), *layer * 12, (width,), (width,)]


def llama_3_2_1b() -> Shapes:
    """Return the shapes of Llama-3.2-1B (Meta, 2024): 1,235,814,400 numbers, 146 tensors; the head is tied."""
    width, key, hidden = 2048, 512, 8192
    attention = [(width, width), (key, width), (key, width), (width, width)]
    layer = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(128256, width), *layer * 16, (width,)]


def lora(linear: list[tuple[int, int]], layers: int, rank: int = 8) -> Shapes:
    """Return the shapes of adapters, A [rank, in] and B [out, rank], for linear modules (out, in) in every layer."""
    return [shape for out, width in linear * layers for shape in ((rank, width), (out, rank))]


LISTS: dict[str, Callable[[], Shapes]] = {
    "LoRA of OPT-125M": lambda: lora([(768, 768)] * 2, 12),
    "LoRA of Llama-3.2-1B": lambda: lora([(2048, 2048), (512, 2048)], 16),
    "ResNet-18": resnet18,
    "OPT-125M": opt_125m,
    "Llama-3.2-1B": llama_3_2_1b,
}

"""Adapters of a few numbers per layer, for clients that learn from forward passes: W + B R A, where only R moves.

A and B are found once, from the weight alone or from the layer's inputs as well, and stay: an r x r matrix R, zero at
first, is all that trains (LoRA-XS, Balazy et al., arXiv 2405.17604). So a run measures r^2 numbers per layer, where
LoRA of the same rank has r (in + out).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.halves.inputs import Inputs, call, clone_tensors, evaluating, mask_of, microbatches, restoring_state
from hosfl.halves.narrow import narrow_bfloat16_as_floats

BATCH_SIZE = 32  # public samples in one forward pass


class LoraXS(nn.Module):
    """A linear layer and its adapter: y = layer(x) + B R A x.

    layer: an nn.Linear, or a Conv1D of transformers. A: [r, in], B: [out, r], of the layer's dtype; they are buffers,
    and so part of a half's base file and of its hash, and never stored narrow. R: [r, r], zero: at first the output is
    the layer's, to the bit. Beside the layer's own activations a pass keeps [..., r] ones.

    The layer is `base_layer`, as in peft. Every other attribute that is asked for is the layer's, but `weight`, which
    is W + B R A, made anew: some modules read a layer's weight and never call it, such as nn.MultiheadAttention.
    """

    A: Tensor
    B: Tensor

    def __init__(self, layer: nn.Module, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.base_layer = layer
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.R = nn.Parameter(A.new_zeros(len(A), len(A)))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x)
        low = x.reshape(-1, x.shape[-1]) @ self.A.T @ self.R.T
        # One fused multiply-add, which needs no second tensor of the output's size.
        return torch.addmm(output.reshape(-1, output.shape[-1]), low, self.B.T).view(output.shape)

    @property
    def weight(self) -> Tensor:
        weight: Any = self.base_layer.weight
        moved = self.B @ self.R @ self.A
        return weight + (moved.T if _is_transposed(self.base_layer) else moved.view(weight.shape))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class LoraXSConv(LoraXS):
    """The same beside a convolution, whose weight is the matrix [out, in * kernel size].

    A is the kernel of a convolution to r channels, with the layer's own stride, padding and dilation; R and B are
    convolutions of kernel size 1 behind it.
    """

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.base_layer
        ones = (1,) * len(layer.kernel_size)
        pointwise = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(ones) - 1]
        output: Tensor = layer(x)
        low = layer._conv_forward(x, self.A.view(-1, layer.in_channels, *layer.kernel_size), None)
        return output + pointwise(pointwise(low, self.R.view(*self.R.shape, *ones)), self.B.view(*self.B.shape, *ones))


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_adaptable(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution that computes as torch's or transformers' own do.

    Not a convolution in groups: each of its groups has inputs of its own, which one A cannot span, and a filter per
    channel has fewer numbers than R.
    """
    forward = type(module).forward
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 and any(forward is kind.forward for kind in CONVOLUTIONS)
    return forward is nn.Linear.forward or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, a linear layer whose weight is [in, out]."""
    known = sys.modules.get("transformers.pytorch_utils")
    return known is not None and type(module).forward is known.Conv1D.forward


def largest_rank(layer: nn.Module) -> int:
    """The largest rank of an adapter for this layer: the smaller side of its weight as a matrix."""
    weight: Any = layer.weight
    return min(len(weight), weight[0].numel())


def _weight_matrix(layer: nn.Module) -> Tensor:
    """A layer's weight as a matrix [out, in], float64."""
    weight: Any = layer.weight
    return (weight.T if _is_transposed(layer) else weight.flatten(1)).detach().double()


def add_adapters(half: nn.Module, layers: Mapping[str, nn.Module], rank: int, public: Inputs | None = None) -> None:
    """Put an adapter of this rank beside these layers of a half, by their paths in it; nothing else moves then.

    public: unlabelled samples; A and B are computed from the layers' inputs on them, by `factors_from_inputs`. None:
    from the weights alone, by `factors_from_weight`. Both compute in float64, one layer at a time. The inputs take one
    pass over the samples, with a matrix [in, in] in float32 in memory for every layer.

    Raises ValueError, before anything is changed, for the half itself as a layer, for a rank above a layer's smaller
    side, and for samples that the half does not take, that do not reach a layer or span fewer than `rank` directions.
    """
    if "" in layers:
        raise ValueError(f"the client half is itself a {type(half).__name__}: put it into an nn.Sequential")
    smallest = min(layers, key=lambda path: largest_rank(layers[path]))
    if rank > (most := largest_rank(layers[smallest])):
        raise ValueError(f"rank {rank} is too large for {smallest}: {most} at most, or leave that layer out")
    moments = None if public is None else second_moments(half, layers, public)
    made = {}
    for path, layer in layers.items():
        try:
            matrix, weight = _weight_matrix(layer), next(layer.parameters())
            found = (
                factors_from_weight(matrix, rank)
                if moments is None
                else factors_from_inputs(matrix, moments.pop(path), rank)
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        kind = LoraXSConv if isinstance(layer, CONVOLUTIONS) else LoraXS
        made[id(layer)] = kind(layer, *(factor.to(weight).contiguous() for factor in found))
    half.requires_grad_(False)
    for module in list(half.modules()):
        for name, child in module._modules.items():  # at every place, where a layer has several
            if id(child) in made:
                module._modules[name] = made[id(child)]


def fixed_factors(half: nn.Module) -> dict[str, Tensor]:
    """What is fixed in a half's adapters, by its names in the half's state dict. What is written there, is written.

    Of adapters of this file and of peft's alike, which both hold the layer that they adapt as `base_layer`.
    """
    owners = [f"{path}." for path, module in half.named_modules() if "base_layer" in module._modules]
    return {
        name: tensor
        for name, tensor in half.state_dict(keep_vars=True).items()
        if not tensor.requires_grad
        and any(name.startswith(owner) for owner in owners)
        and not any(name.startswith(f"{owner}base_layer.") for owner in owners)
    }


def refuse_idle_adapters(half: nn.Module, inputs: Inputs) -> None:
    """Raises ValueError for an adapter that does nothing: its layer's weight is read, and the layer is never called.

    inputs: of a few samples. A layer whose weight has no part in their output either, such as an expert that none of
    them goes to, says nothing. Nothing is changed.
    """
    layers = {path: m for path, m in half.named_modules() if "base_layer" in m._modules}
    moving = {
        path: [p for name, p in m.named_parameters() if p.requires_grad and not name.startswith("base_layer.")]
        for path, m in layers.items()
    }
    if not any(moving.values()):
        return
    reached = _ids_with_gradient(half, inputs, [p for ps in moving.values() for p in ps])
    idle = [path for path, ps in moving.items() if ps and not any(id(p) in reached for p in ps)]
    if not idle:
        return
    with narrow_bfloat16_as_floats(half):
        own = {path: _float_tensors(layers[path].get_submodule("base_layer")) for path in idle}
        reached = _ids_with_gradient(half, inputs, [t for ts in own.values() for t in ts])
    for path, tensors in own.items():
        if any(id(t) in reached for t in tensors):
            name = next(name for name, p in half.named_parameters() if p is moving[path][0])
            raise ValueError(
                f"{name} would do nothing: the client half reads the weight of {path} and never calls that layer."
                " Leave it out, by naming the layers that are to have adapters, or take xs, whose adapters are a part"
                " of the weight"
            )


def _float_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


def _ids_with_gradient(half: nn.Module, inputs: Inputs, tensors: Sequence[Tensor]) -> set[int]:
    """The ids of the tensors for which the half's output has a gradient. Meanwhile nothing else requires grad, since
    torch chooses fused operations by that, and clients' passes record no graph."""
    wanted = {id(t) for t in tensors}
    before = [(t, t.requires_grad) for t in {id(t): t for t in (*half.parameters(), *tensors)}.values()]
    try:
        for t, _ in before:
            t.requires_grad_(id(t) in wanted)
        with restoring_state(half.modules()), evaluating(half), torch.enable_grad():
            output: Tensor = call(half, clone_tensors(inputs))
            if not output.requires_grad:
                return set()
            gradients = torch.autograd.grad(output.sum(), tensors, allow_unused=True)
    finally:
        for t, required in before:
            t.requires_grad_(required)
    return {id(t) for t, gradient in zip(tensors, gradients, strict=True) if gradient is not None}


# --- A and B ------------------------------------------------------------------------------------------------------


def factors_from_weight(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) from the singular value decomposition W = U S V^T: A = V^T[:r], B = U[:, :r] mean(S[:r]).

    weight: float64 [out, in]. As LoRA-XS, but for the scale: one for all numbers of R, so that a step of one size along
    any of them moves the weight as far.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return fix_signs(right[:rank]), fix_signs(left[:, :rank].T).T * values[:rank].mean()


def factors_from_inputs(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) from a layer's inputs x as well.

    weight: W, float64 [out, in]; moment: C = sum x x^T, [in, in], not centred. A = the top r eigenvectors of C, the
    directions in which inputs are largest. B = the left singular vectors of W C^(1/2), which are the eigenvectors of
    W C W^T, times the mean of |W a_i|. Raises ValueError where C has fewer than r directions.
    """
    moment = moment.double()
    values, right = _top_eigenvectors(moment, rank)
    known = int((values > values[0].clamp(min=0) * len(moment) * torch.finfo(torch.float32).eps).sum())
    if known < rank:
        raise ValueError(f"rank {rank} is too large for the public samples: its inputs have {known} directions")
    _, left = _top_eigenvectors(weight @ moment @ weight.T, rank)
    return right, left.T * (weight @ right.T).norm(dim=0).mean()


def _top_eigenvectors(symmetric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The r largest eigenvalues, in descending order, and their eigenvectors [r, n]."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values[-rank:].flip(0), fix_signs(vectors[:, -rank:].T.flip(0))


def fix_signs(rows: Tensor) -> Tensor:
    """Rows with the sign that makes their largest element positive, which a decomposition leaves undetermined."""
    return rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()


# --- inputs of layers ---------------------------------------------------------------------------------------------


def second_moments(half: nn.Module, layers: Mapping[str, nn.Module], samples: Inputs) -> dict[str, Tensor]:
    """C = sum x x^T, float32 [in, in], over the inputs of each of these layers; of a convolution over its patches.

    samples: as the half takes them; where they have an attention mask, inputs [batch, length, in] count where it is 1.
    The half runs in eval mode and is left as it was. Raises ValueError for samples that it does not take and for a
    layer that it does not call.
    """
    moments: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def watching(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(layer: nn.Module, given: tuple[Any, ...]) -> None:
            rows = input_rows(layer, given[0], mask).float()
            moments[path] = moments.get(path, torch.zeros(())) + rows.T @ rows

        return add

    hooks = [layer.register_forward_pre_hook(watching(path)) for path, layer in layers.items()]
    try:
        with evaluating(half):
            for part in microbatches(samples, BATCH_SIZE):
                mask = mask_of(part)
                call(half, part)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        raise ValueError(f"the client half does not take the public samples: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    for path in layers:
        if path not in moments:
            raise ValueError(f"{path} is never called, and so nothing is known of its inputs: leave that layer out")
    return moments


def input_rows(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """A layer's inputs as rows [n, in], without those that an attention mask [batch, length] leaves out."""
    if isinstance(layer, CONVOLUTIONS):
        size = layer.in_channels * torch.Size(layer.kernel_size).numel()
        identity = torch.eye(size, dtype=x.dtype, device=x.device).view(size, -1, *layer.kernel_size)
        convolve: Any = layer._conv_forward  # with the identity for a kernel: what each place sees, padding and all
        patches: Tensor = convolve(x, identity, None)
        return patches.movedim(-len(layer.kernel_size) - 1, -1).flatten(0, -2)
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])

"""Adapters with few trainable numbers, for clients that learn from forward passes: W + B R A, where only R is trained.

A and B are fixed. They are computed once, from the weight alone or also from the layer's inputs. R is an r x r matrix,
zero at first (LoRA-XS, Balazy et al., arXiv 2405.17604). So a layer has r^2 trainable numbers, where LoRA of the same
rank has r (in + out).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.halves.inputs import Inputs, call, clone_tensors, evaluating, mask_of, microbatches, restoring_state
from hosfl.halves.narrow import narrow_bfloat16_as_floats

BATCH_SIZE = 32  # public samples per forward pass


class LoraXS(nn.Module):
    """A linear layer with an adapter: y = layer(x) + B R A x.

    layer: an nn.Linear, or a Conv1D of transformers. A: [r, in], B: [out, r], in the layer's dtype. They are buffers,
    and so part of a half's base file and of its hash, and never stored narrow. R: [r, r], zero: at first the output is
    the layer's, to the bit. A pass needs activations [..., r] beside the layer's own.

    The layer is `base_layer`, as in peft. Other attributes are the layer's, except `weight`, which is a new tensor
    W + B R A: some modules, such as nn.MultiheadAttention, read a layer's weight and never call the layer.
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
        # One fused operation, which needs no second tensor of the output's size.
        return torch.addmm(output.reshape(-1, output.shape[-1]), low, self.B.T).view(output.shape)

    @property
    def weight(self) -> Tensor:
        """The adapted weight, in the shape of the layer's."""
        weight: Any = self.base_layer.weight
        delta = self.B @ self.R @ self.A
        return weight + (delta.T if _is_transposed(self.base_layer) else delta.view(weight.shape))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class LoraXSConv(LoraXS):
    """A convolution with an adapter. The weight as a matrix is [out, in * kernel size].

    A is the kernel of a convolution to r channels, with the layer's own stride, padding and dilation. R and B are
    kernels of size 1 that follow it.
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
    """Whether a module is a linear layer or a convolution with the forward pass of torch's or transformers' own.

    Grouped convolutions are not: each group has its own inputs, which one A cannot span, and a depthwise filter has
    fewer numbers than R.
    """
    forward = type(module).forward
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 and any(forward is kind.forward for kind in CONVOLUTIONS)
    return forward is nn.Linear.forward or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, a linear layer whose weight is [in, out]."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and type(module).forward is utils.Conv1D.forward


def largest_rank(layer: nn.Module) -> int:
    """The largest rank of an adapter for this layer: the smaller side of its weight as a matrix."""
    weight: Any = layer.weight
    return min(len(weight), weight[0].numel())


def _weight_matrix(layer: nn.Module) -> Tensor:
    """A layer's weight as a matrix [out, in], float64."""
    weight: Any = layer.weight
    return (weight.T if _is_transposed(layer) else weight.flatten(1)).detach().double()


def add_adapters(half: nn.Module, layers: Mapping[str, nn.Module], rank: int, public: Inputs | None = None) -> None:
    """Give layers of a half adapters of this rank, and freeze everything else.

    layers: by their paths in the half. public: unlabelled samples, on which the layers' inputs are measured: A and B
    are then computed by `factors_from_inputs`. None: by `factors_from_weight`. Both compute in float64, one layer at a
    time. The inputs take one pass over the samples, with a float32 matrix [in, in] in memory for every layer.

    Raises ValueError, before anything is changed, if the half itself is a layer, for a rank above a layer's smaller
    side, and for samples that the half does not take, that do not reach a layer or span fewer than `rank` directions.
    """
    if "" in layers:
        raise ValueError(f"the client half is itself a {type(half).__name__}: put it into an nn.Sequential")
    smallest = min(layers, key=lambda path: largest_rank(layers[path]))
    if rank > (limit := largest_rank(layers[smallest])):
        raise ValueError(f"rank {rank} is too large for {smallest}: {limit} at most, or leave that layer out")
    moments = None if public is None else second_moments(half, layers, public)
    adapters = {}
    for path, layer in layers.items():
        try:
            matrix, weight = _weight_matrix(layer), next(layer.parameters())
            factors = (
                factors_from_weight(matrix, rank)
                if moments is None
                else factors_from_inputs(matrix, moments.pop(path), rank)
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        kind = LoraXSConv if isinstance(layer, CONVOLUTIONS) else LoraXS
        adapters[id(layer)] = kind(layer, *(factor.to(weight).contiguous() for factor in factors))
    half.requires_grad_(False)
    for module in list(half.modules()):
        for name, child in module._modules.items():  # a layer may have several places
            if id(child) in adapters:
                module._modules[name] = adapters[id(child)]


def fixed_factors(half: nn.Module) -> dict[str, Tensor]:
    """The fixed tensors of a half's adapters, by their names in its state dict. Writing to them changes the half.

    Both the adapters of this file and peft's hold the layer that they adapt as `base_layer`.
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
    """Raise ValueError for an adapter that does nothing, because its layer's weight is read but the layer never called.

    inputs: a few samples. Adapters of layers whose weights do not influence the output of these samples are accepted,
    such as those of an expert that no token is routed to. Nothing is changed.
    """
    layers = {path: m for path, m in half.named_modules() if "base_layer" in m._modules}
    trainable = {
        path: [p for name, p in m.named_parameters() if p.requires_grad and not name.startswith("base_layer.")]
        for path, m in layers.items()
    }
    if not any(trainable.values()):
        return
    used = _ids_with_gradient(half, inputs, [p for ps in trainable.values() for p in ps])
    idle = [path for path, ps in trainable.items() if ps and not any(id(p) in used for p in ps)]
    if not idle:
        return
    with narrow_bfloat16_as_floats(half):
        weights = {path: _float_tensors(layers[path].get_submodule("base_layer")) for path in idle}
        used = _ids_with_gradient(half, inputs, [t for ts in weights.values() for t in ts])
    for path, tensors in weights.items():
        if any(id(t) in used for t in tensors):
            name = next(name for name, p in half.named_parameters() if p is trainable[path][0])
            raise ValueError(
                f"{name} would do nothing: the client half reads the weight of {path} and never calls that layer."
                " Leave it out, by naming the layers that are to have adapters, or take xs, whose adapters are a part"
                " of the weight"
            )


def _float_tensors(module: nn.Module) -> list[Tensor]:
    """A module's floating-point parameters and buffers."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


def _ids_with_gradient(half: nn.Module, inputs: Inputs, tensors: Sequence[Tensor]) -> set[int]:
    """The ids of the tensors for which the half's output has a gradient.

    Meanwhile nothing else requires grad: torch chooses fused operations by that, and a client's passes have no graph.
    """
    ids = {id(t) for t in tensors}
    before = [(t, t.requires_grad) for t in {id(t): t for t in (*half.parameters(), *tensors)}.values()]
    try:
        for t, _ in before:
            t.requires_grad_(id(t) in ids)
        with restoring_state(half.modules()), evaluating(half), torch.enable_grad():
            output: Tensor = call(half, clone_tensors(inputs))
            if not output.requires_grad:
                return set()
            gradients = torch.autograd.grad(output.sum(), tensors, allow_unused=True)
    finally:
        for t, requires_grad in before:
            t.requires_grad_(requires_grad)
    return {id(t) for t, gradient in zip(tensors, gradients, strict=True) if gradient is not None}


# --- A and B ------------------------------------------------------------------------------------------------------


def factors_from_weight(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (A, B) from the singular value decomposition W = U S V^T: A = V^T[:r], B = U[:, :r] mean(S[:r]).

    weight: W, float64 [out, in]. LoRA-XS scales each column of B by its singular value. Here they have one scale, so
    that a step of a given size in any number of R changes the weight by the same distance.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return fix_signs(right[:rank]), fix_signs(left[:, :rank].T).T * values[:rank].mean()


def factors_from_inputs(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (A, B) from a layer's weight and its inputs x.

    weight: W, float64 [out, in]. moment: C = sum x x^T, [in, in], not centred. A = the top r eigenvectors of C, the
    directions in which inputs are largest. B = the left singular vectors of W C^(1/2), which are the eigenvectors of
    W C W^T, times the mean of |W a_i|. Raises ValueError if C has a rank below r.
    """
    moment = moment.double()
    values, right = _top_eigenvectors(moment, rank)
    directions = int((values > values[0].clamp(min=0) * len(moment) * torch.finfo(torch.float32).eps).sum())
    if directions < rank:
        raise ValueError(f"rank {rank} is too large for the public samples: its inputs have {directions} directions")
    _, left = _top_eigenvectors(weight @ moment @ weight.T, rank)
    return right, left.T * (weight @ right.T).norm(dim=0).mean()


def _top_eigenvectors(symmetric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues, in descending order, and their eigenvectors [rank, n]."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values[-rank:].flip(0), fix_signs(vectors[:, -rank:].T.flip(0))


def fix_signs(rows: Tensor) -> Tensor:
    """Make each row's largest element positive by the row's sign, which a decomposition leaves undetermined."""
    return rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()


# --- inputs of layers ---------------------------------------------------------------------------------------------


def second_moments(half: nn.Module, layers: Mapping[str, nn.Module], samples: Inputs) -> dict[str, Tensor]:
    """Return C = sum x x^T, float32 [in, in], for each of these layers: over its inputs, or a convolution's patches.

    samples: as the half takes them. With an attention mask, inputs [batch, length, in] count where it is 1. The half
    runs in eval mode and is left as it was. Raises ValueError for samples that it does not take and for a layer that it
    does not call.
    """
    moments: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def hook_for(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            rows = input_rows(layer, args[0], mask).float()
            moments[path] = moments.get(path, torch.zeros(())) + rows.T @ rows

        return hook

    hooks = [layer.register_forward_pre_hook(hook_for(path)) for path, layer in layers.items()]
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
    """Return a layer's inputs as rows [n, in], without those that an attention mask [batch, length] leaves out."""
    if isinstance(layer, CONVOLUTIONS):
        size = layer.in_channels * torch.Size(layer.kernel_size).numel()
        identity = torch.eye(size, dtype=x.dtype, device=x.device).view(size, -1, *layer.kernel_size)
        convolve: Any = layer._conv_forward
        patches: Tensor = convolve(x, identity, None)  # with the identity as kernel: the patches, padding included
        return patches.movedim(-len(layer.kernel_size) - 1, -1).flatten(0, -2)
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])

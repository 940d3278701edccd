"""A model cut in two: the client half makes the cut tensor, the server half makes the output from it.

    halves = split(model, at=4)  # the first four layers go to the client
    halves.client(**inputs)  # the cut
    halves(inputs)  # the whole model's output, to the bit

Models that can be cut: `nn.Sequential`, residual networks built like torchvision's and timm's, and the families of
Hugging Face's transformers that `hosfl.families` lists. For all else build a `SplitModel` of two modules of your own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.displaced import Inputs, call
from hosfl.families import FAMILIES, behind_layers, copied, cut_transformer, present, replaced, transformer_layers

# The stages of torchvision's and timm's residual networks in the order of their forward pass.
RESNET = ("conv1", "bn1", "relu", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4")
RESNET_HEAD = ("avgpool", "global_pool", "fc")


@dataclass(frozen=True)
class SplitModel:
    """Two modules whose composition is the model: output = server(client(x)).

    Where inputs are named and have an attention mask, the server half takes it as well: server(cut, attention_mask=m).
    """

    client: nn.Module
    server: nn.Module

    def __call__(self, inputs: Inputs) -> Tensor:
        cut = call(self.client, inputs)
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        masks = {} if mask is None else {"attention_mask": mask}
        output: Tensor = self.server(cut.to(dtype_of(self.server)), **masks)
        return output


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a module computes in: the dtype of its first parameter that is no integer."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


@dataclass(frozen=True)
class CutPoint:
    """A place to cut: `name` is the first module of the server half, `at` how many layers the client half has.

    client_parameters, server_parameters: numbers of elements on either side. With example inputs also, in bytes, for
    these inputs: cut: what travels. client_activations, server_activations: the outputs of all modules that have no
    modules inside, which is about what backpropagation through that side would keep.
    """

    at: int
    name: str
    client_parameters: int
    server_parameters: int
    cut: int | None = None
    client_activations: int | None = None
    server_activations: int | None = None


def split(model: nn.Module, at: int | str) -> SplitModel:
    """Cut a model before a layer. In eval mode the halves' composition gives the model's output, to the bit.

    at: the layer's number, which is how many layers the client half gets, or its name; `cut_points` lists both. With
    all layers at the client, the server half is the model's head.

    The halves share the model's weights. Only weights tied across the cut, such as an embedding and the output layer
    that shares it, become two: a client moves its own, the server trains its own.

    Raises: TypeError for a model that cannot be cut, ValueError for a cut that is none of its cut points, which it
    names.
    """
    model = _without_adapters(model)
    places = _places(model)
    at = _number(places, at)
    if isinstance(model, nn.Sequential):
        halves = SplitModel(model[:at], model[at:])
    elif transformer_layers(model) is not None:
        halves = SplitModel(*cut_transformer(model, at))
    else:
        layers = list(_resnet_layers(model))
        halves = SplitModel(nn.Sequential(*layers[:at]), nn.Sequential(*layers[at:], *_resnet_head(model)))
    return SplitModel(halves.client, _untied(halves.client, halves.server))


def cut_points(model: nn.Module, inputs: Inputs | None = None) -> list[CutPoint]:
    """Every place where `split` can cut a model. inputs: an example; model and example may be on the meta device.

    Raises TypeError for a model that cannot be cut.
    """
    model = _without_adapters(model)
    points = []
    for name, number in _places(model).items():
        halves = split(model, number)
        client, server = (sum(p.numel() for p in half.parameters()) for half in (halves.client, halves.server))
        points.append(CutPoint(number, name, client, server, *(() if inputs is None else _activations(halves, inputs))))
    return points


@torch.no_grad()
def _activations(halves: SplitModel, inputs: Inputs) -> tuple[int, int, int]:
    """Bytes of the cut, and of all that the client half and the server half make on the way."""
    sizes = {"client": 0, "server": 0}
    cuts: list[int] = []

    def add(side: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            sizes[side] += _nbytes(output)

        return hook

    leaves = [(side, m) for side in sizes for m in getattr(halves, side).modules() if not m._modules]
    hooks = [module.register_forward_hook(add(side)) for side, module in leaves]
    hooks.append(halves.client.register_forward_hook(lambda module, given, output: cuts.append(_nbytes(output))))
    try:
        halves(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return cuts[0], sizes["client"], sizes["server"]


def _nbytes(output: Any) -> int:
    return output.nbytes if isinstance(output, Tensor) else 0


def _without_adapters(model: nn.Module) -> nn.Module:
    """The model inside peft's wrapper: its adapters are part of its layers."""
    inside: Any = getattr(model, "get_base_model", None)
    return inside() if hasattr(model, "peft_config") and inside else model


def _places(model: nn.Module) -> dict[str, int]:
    """The names and numbers of the modules before which a model can be cut: its layers, and what follows the last."""
    if isinstance(model, nn.Sequential):
        return {name: number for number, name in enumerate(model._modules) if number}
    found = transformer_layers(model)
    if found is not None:
        path, layers = found
        places = {f"{path}.{number}": number for number in range(len(layers))}
        head = behind_layers(model)
        return places if head is None else {**places, head: len(layers)}
    if all(hasattr(model, name) for name in ("conv1", "bn1", "layer1", "fc")):
        names = [*_resnet_names(model), present(model, RESNET_HEAD)[0]]
        return {name: number for number, name in enumerate(names) if number}
    raise TypeError(
        f"cannot cut a {type(model).__name__}: known are nn.Sequential, residual networks with conv1, bn1, layer1"
        f" and on, and fc; and transformers' {', '.join(FAMILIES)}; for all else build a SplitModel of two modules"
    )


def _number(places: Mapping[str, int], at: int | str) -> int:
    number = places.get(at, -1) if isinstance(at, str) else at
    if isinstance(at, bool) or number not in places.values():
        names = ", ".join(f"{n} ({name})" for name, n in places.items())
        raise ValueError(f"cannot cut at {at!r}; the cut points are {names}")
    return number


def _resnet_names(model: nn.Module) -> Iterator[str]:
    for name in RESNET:
        stage = getattr(model, name, None)
        if isinstance(stage, nn.Sequential):
            yield from (f"{name}.{block}" for block in stage._modules)
        elif stage is not None:
            yield name


def _resnet_layers(model: nn.Module) -> Iterator[nn.Module]:
    return map(model.get_submodule, _resnet_names(model))


def _resnet_head(model: nn.Module) -> Iterator[nn.Module]:
    """What follows the layers. Flatten leaves alone what is flat: timm's pooling flattens, torchvision's does not."""
    for name in RESNET_HEAD:
        stage = getattr(model, name, None)
        if name == "fc":
            yield nn.Flatten(1)
        if stage is not None:
            yield stage


def _untied(client: nn.Module, server: nn.Module) -> nn.Module:
    """The server half with its own copy of every parameter and buffer that the client half has as well."""
    mine = {id(t) for t in (*client.parameters(), *client.buffers())}
    clones: dict[int, Any] = {}
    for path, module in list(server.named_modules()):
        held = {"_parameters": module._parameters, "_buffers": module._buffers}
        shared = [(kind, name, t) for kind, ts in held.items() for name, t in ts.items() if id(t) in mine]
        if not shared:
            continue
        own = copied(module)
        own._parameters, own._buffers = dict(module._parameters), dict(module._buffers)
        for kind, name, tensor in shared:
            if id(tensor) not in clones:
                clones[id(tensor)] = copy.deepcopy(tensor)  # of a parameter it is a parameter
            getattr(own, kind)[name] = clones[id(tensor)]
        server = replaced(server, path, own)
    return server

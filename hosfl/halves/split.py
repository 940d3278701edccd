"""A model cut in two: the client half computes the cut tensor, the server half the output from it.

    halves = split(model, at=4)  # the first four layers go to the client
    halves.client(**inputs)  # the cut
    halves(inputs)  # the whole model's output, to the bit

The kind of model decides where it can be cut: an `nn.Sequential` between its modules; a Hugging Face transformer of the
families that `families` lists between its layers; any other model of one input tensor, such as those of torchvision and
timm, wherever only one tensor crosses (`chain`). Then the halves are compared with the model (`verify`). For any other
model `split` raises CutError: build a `SplitModel` of two modules of your own.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hosfl.halves.chain import trace_chain
from hosfl.halves.families import (
    FAMILIES,
    cut_transformer,
    example_inputs,
    head_path,
    layer_ancestors,
    sine_input,
    transformer_layers,
)
from hosfl.halves.follow import CutError, refuse_overridden_methods
from hosfl.halves.inputs import Inputs, call, mask_of, restoring_state
from hosfl.halves.modules import copy_module, has_submodule, replace_submodule
from hosfl.halves.verify import ExampleError, has_meta_tensors, verify_halves


class SplitModel(nn.Module):
    """Two modules whose composition is the model: output = server(client(x)). It unpacks: `client, server = halves`.

    If the inputs are a mapping with an attention mask, the server half gets it, too: server(cut, attention_mask=m).
    """

    def __init__(self, client: nn.Module, server: nn.Module) -> None:
        super().__init__()
        self.client, self.server = client, server

    def __iter__(self) -> Iterator[nn.Module]:
        yield self.client
        yield self.server

    def forward(self, inputs: Inputs) -> Tensor:
        """Compute the whole model's output. inputs: a tensor, a tuple of arguments or a mapping of names."""
        cut = call(self.client, inputs)
        if not isinstance(cut, Tensor):
            raise CutError(f"the cut must be one tensor, and the client half makes a {type(cut).__name__}")
        mask = mask_of(inputs)
        masks = {} if mask is None else {"attention_mask": mask}
        output: Tensor = self.server(self.cast_cut(cut), **masks)
        return output

    def cast_cut(self, cut: Tensor) -> Tensor:
        """Convert the cut for the server half; here it is returned unchanged."""
        return cut


class RunHalves(SplitModel):
    """The halves of a run. The client half may compute in another dtype: the cut is cast to the server half's."""

    def cast_cut(self, cut: Tensor) -> Tensor:
        return cut.to(dtype_of(self.server))


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: that of its first floating-point parameter; float32 if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def cast_floats(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast floating-point parameters and buffers in place, and return the module.

    Unlike `Module.to`, complex tensors stay as they are: `to` would drop their imaginary part.
    """
    return module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


@dataclass(frozen=True)
class CutPoint:
    """A place to cut a model.

    Attributes:
        at: the number of layers in the client half.
        name: the first module of the server half.
        client_parameters, server_parameters: the numbers of parameters' elements on either side.
        cut: bytes of the cut tensor; None without example inputs.
        client_activations, server_activations: bytes of the outputs of all modules without submodules, which is about
            what backpropagation through that side would keep; None without example inputs.
    """

    at: int
    name: str
    client_parameters: int
    server_parameters: int
    cut: int | None = None
    client_activations: int | None = None
    server_activations: int | None = None


def split(model: nn.Module, at: int | str, *, example: Inputs | None = None, verify: bool = True) -> SplitModel:
    """Cut a model in two before a layer. The halves share its weights; in eval mode they make its output, to the bit.

        halves = hosfl.split(model, at=4)  # the first four layers go to the client
        cut = halves.client(x)  # the cut: [batch, ...]
        output = halves.server(cut)  # equals model(x)

    Args:
        model: an nn.Sequential, a transformer of a known family, or another model of one input tensor.
        at: the number of layers in the client half, or the name of the first module of the server half; `cut_points`
            lists both. With all layers in the client half, the server half is the model's head. The name may also be
            that of a module inside a layer, if only one tensor crosses there.
        example: a few samples as the model takes them: a tensor, a tuple of arguments, or a mapping of names. The
            halves are compared with the model on them: outputs, gradients and buffers, in a few passes. None: an
            nn.Sequential is not compared; for other models the library makes samples, texts or pictures for
            transformers, pictures for all else. On the meta device nothing is compared.
        verify: whether to compare the halves with the model.

    Returns a `SplitModel`. Only weights that are tied across the cut, such as an embedding and the output layer that
    shares it, become two copies, which client and server train separately.

    Raises:
        CutError: the model cannot be cut, or the halves are not the model; it is a TypeError.
        ValueError: there is no such cut point, and the message names those that there are; or an example is needed, or
            the model does not take it.
    """
    inner = _unwrap(model)
    cutter = find_cutter(inner)
    if isinstance(at, str) and at not in cutter.cut_points and cutter.accepts_inner_names and has_submodule(inner, at):
        chain = trace_chain(inner, at)
        _refuse_hooks(chain.model, chain.opened)
        halves = _make_halves(*chain.cut(at))
    else:
        halves = _make_halves(*cutter.cut(_layer_number(cutter.cut_points, at)))
    if not verify or has_meta_tensors(inner):
        return halves
    if example is not None:
        verify_halves(model, halves, example)
    elif not _is_plain_sequential(inner):
        _verify_on_default_example(model, inner, halves)
    return halves


def cut_points(model: nn.Module, inputs: Inputs | None = None) -> list[CutPoint]:
    """List the places where `split` can cut a model, in order: a `CutPoint` each, with the sizes of both sides.

        for point in hosfl.cut_points(model, example):
            print(point.at, point.name, point.client_parameters, point.cut)

    Args:
        model: as for `split`; it may be on the meta device, where it has no weights.
        inputs: an example, as the model takes it. With one, points also have sizes in bytes for it: `cut`,
            `client_activations` and `server_activations`.

    Raises:
        CutError: the model cannot be cut; it is a TypeError.
    """
    cutter = find_cutter(_unwrap(model))
    points = []
    for name, number in cutter.cut_points.items():
        parts = cutter.cut(number)
        if _shared_normalisation(*parts) is not None:
            continue
        halves = _make_halves(*parts)
        parameters = [sum(p.numel() for p in half.parameters()) for half in halves]
        sizes = () if inputs is None else _activation_bytes(halves, inputs)
        points.append(CutPoint(number, name, *parameters, *sizes))
    return points


@torch.no_grad()
def _activation_bytes(halves: SplitModel, inputs: Inputs) -> tuple[int, int, int]:
    """Run the halves, and return the bytes of (the cut, the client's activations, the server's)."""
    sizes = {"client": 0, "server": 0}
    cuts: list[int] = []

    def add_to(side: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            sizes[side] += _nbytes(output)

        return hook

    leaves = [(side, m) for side in sizes for m in getattr(halves, side).modules() if not m._modules]
    hooks = [module.register_forward_hook(add_to(side)) for side, module in leaves]
    hooks.append(halves.client.register_forward_hook(lambda module, args, output: cuts.append(_nbytes(output))))
    try:
        with restoring_state(halves.modules()):
            halves(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return cuts[0], sizes["client"], sizes["server"]


def _nbytes(output: Any) -> int:
    """Bytes of a tensor; 0 for anything else."""
    return output.nbytes if isinstance(output, Tensor) else 0


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # attributes of modules
# Classes that wrap a model, and where the model is, for error messages.
WRAPPERS = {
    "OptimizedModule": "_orig_mod, and compile the halves",
    **dict.fromkeys(("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"), "module"),
}


# --- what can be cut, and how -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cutter:
    """How to cut one model.

    Attributes:
        cut_points: the number of layers in the client half, by the name of the server half's first module.
        cut: cuts at such a number, and returns (client half, server half). They share all weights with the model, also
            tied ones.
        accepts_inner_names: whether `split` also takes the name of a module inside a layer.
    """

    cut_points: dict[str, int]
    cut: Callable[[int], tuple[nn.Module, nn.Module]]
    accepts_inner_names: bool = True


def find_cutter(model: nn.Module) -> Cutter:
    """Return the `Cutter` for a model. Raises CutError if the model cannot be cut."""
    if transformer_layers(model) is not None:
        _refuse_hooks(model, layer_ancestors(model))
        return Cutter(_transformer_cut_points(model), partial(cut_transformer, model), accepts_inner_names=False)
    if _is_plain_sequential(model):
        _refuse_hooks(model, [model])
        names = list(model._modules)
        return Cutter({name: number for number, name in enumerate(names) if number}, partial(_cut_sequence, model))
    config = getattr(model, "config", None)
    if hasattr(config, "model_type"):
        raise CutError(
            f"cannot cut a {type(model).__name__}: of transformers' families known are {', '.join(FAMILIES)}; for all "
            "else build a SplitModel of two modules"
        )
    try:
        chain = trace_chain(model)
        if not chain.cut_points:
            raise CutError("there is no place in its forward pass where a single tensor goes from module to module")
    except CutError as error:
        raise CutError(
            f"cannot cut a {type(model).__name__}: {error}; build a SplitModel of two modules of your own"
            f"{_submodule_hint(model)}"
        ) from error
    _refuse_hooks(model, chain.opened)
    by_number = {number: name for name, number in chain.cut_points.items()}
    return Cutter(chain.cut_points, lambda number: chain.cut(by_number[number]))


def _transformer_cut_points(model: nn.Module) -> dict[str, int]:
    """The cut points of a known transformer: its layers, and its head."""
    path, layers = transformer_layers(model) or ("", nn.ModuleList())
    points = {f"{path}.{number}": number for number in range(len(layers))}
    head = head_path(model)
    return points if head is None else {**points, head: len(layers)}


def _is_plain_sequential(model: nn.Module) -> bool:
    """Whether a model is an nn.Sequential that does not override its forward pass."""
    kind = type(model)
    is_inherited = (kind.forward, kind.__call__) == (nn.Sequential.forward, nn.Module.__call__)
    return isinstance(model, nn.Sequential) and is_inherited


def _cut_sequence(model: nn.Module, at: int) -> tuple[nn.Module, nn.Module]:
    """Cut an nn.Sequential after `at` modules."""
    layers = list(model._modules.items())
    return nn.Sequential(OrderedDict(layers[:at])), nn.Sequential(OrderedDict(layers[at:]))  # type: ignore[arg-type]


def _make_halves(client: nn.Module, server: nn.Module) -> SplitModel:
    """Give the server half its own copies of shared tensors, and return both halves. Raises CutError."""
    shared = _shared_normalisation(client, server)
    if shared is not None:
        raise CutError(f"cannot cut here: {shared} runs on both sides, and its running statistics would become two")
    return SplitModel(client, _untie(client, server))


def _shared_normalisation(client: nn.Module, server: nn.Module) -> str | None:
    """The path of a normalisation whose running statistics both halves would write, or None."""
    buffers = {id(b) for m in client.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)}
    norms = ((path, m) for path, m in server.named_modules() if isinstance(m, _NormBase))
    return next((path for path, m in norms if any(id(b) in buffers for b in m.buffers(recurse=False))), None)


def _submodule_hint(model: nn.Module) -> str:
    """The end of an error message that names a submodule that can be cut, or ""."""
    for name, module in model.named_modules():
        if name and getattr(getattr(module, "config", None), "model_type", "") in FAMILIES:
            return f"; its {name}, a {type(module).__name__}, can be cut by itself"
    return ""


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside peft's wrapper, whose adapters stay in the layers; any other model is returned itself.

    Raises CutError for other wrappers, and for scripted, compiled or patched modules.
    """
    name = type(model).__name__
    if name in WRAPPERS:
        raise CutError(f"cannot cut through {name}: cut the model inside, its {WRAPPERS[name]}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CutError("cannot cut a scripted module: cut the module that it was scripted from")
    base: Any = getattr(model, "get_base_model", None)
    if hasattr(model, "peft_config") and base:
        adapters: Any = model.peft_config
        for adapter, settings in adapters.items():
            if getattr(settings, "is_prompt_learning", False):
                raise CutError(
                    f"virtual tokens do not cross a cut: {adapter!r} is {settings.peft_type.value}; take adapters that"
                    " go into layers, such as LORA"
                )
            if getattr(settings, "alora_invocation_tokens", None):
                raise CutError(
                    f"adapters that begin at certain tokens do not cross a cut: {adapter!r} has such; leave out its"
                    " alora_invocation_tokens"
                )
        model = base()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CutError(
                f"cannot cut a model with a scripted module, {path}: put the module that it was scripted from in its"
                " place"
            )
        if path and type(module).__name__ == "OptimizedModule":
            raise CutError(
                f"cannot cut a model with a compiled module, {path}: put the module inside in its place, its"
                f" {WRAPPERS['OptimizedModule']}"
            )
        patched = module.__dict__.get("forward")
        if patched is not None and not (isinstance(patched, MethodType) and patched.__self__ is module and path):
            raise CutError(
                f"the forward pass of {path or name} was replaced on the object, as device maps, offload and mixed "
                "precision do: the halves would go on with the old one. Take that off first (accelerate: "
                "remove_hook_from_module(model, recurse=True)), cut, and place the halves"
            )
    return model


def _refuse_hooks(model: nn.Module, divided: Iterable[nn.Module]) -> None:
    """Raise CutError for hooks, overridden methods or compiled calls of the modules that a cut divides.

    Neither half would be the right place for them.
    """
    names = {module: name for name, module in model.named_modules()}
    for module in divided:
        refuse_overridden_methods(module)
        kinds = [kind for kind in HOOKS if getattr(module, kind, None)]
        where = names[module] or type(module).__name__
        if kinds or module.__dict__.get("forward") is not None:
            raise CutError(
                f"cannot cut through {where}, which has {kinds[0].strip('_') if kinds else 'its own forward'}: take"
                " that off, cut, and put it on modules of the halves"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise CutError(f"cannot cut through {where}, which is compiled: cut first, and compile the halves")


def _verify_on_default_example(model: nn.Module, inner: nn.Module, halves: SplitModel) -> None:
    """Compare model and halves on the first of the library's default examples that the model accepts.

    Raises ValueError if there is none.
    """
    refused: ExampleError | None = None
    for inputs in _default_examples(inner):
        try:
            return verify_halves(model, halves, inputs)
        except ExampleError as error:
            refused = error
    raise ValueError(
        f"a few samples are needed to compare the halves with the model: split(model, at, example=...), or verify=False"
        f"{f' ({refused})' if refused else ''}"
    )


def _default_examples(model: nn.Module) -> Iterator[Inputs]:
    """Yield examples that a model may accept: texts or pictures for a transformer, pictures for a convolutional net."""
    if transformer_layers(model) is not None:
        yield example_inputs(model)
        return
    first = next((m for m in model.modules() if m._parameters and not m._modules), None)
    if not isinstance(first, nn.Conv2d):
        return
    # timm's models have the size in their configuration, some of torchvision's as an attribute; others take most sizes.
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    size = getattr(model, "image_size", None) or (config.get("fixed_input_size") and config["input_size"][-1])
    for side in [size] if size else [64, 224]:
        yield sine_input((2, first.in_channels, side, side), first.weight.device).to(first.weight.dtype)


def _layer_number(points: Mapping[str, int], at: int | str) -> int:
    """The number of a cut point, given by number or name. Raises ValueError if there is no such point."""
    number = points.get(at, -1) if isinstance(at, str) else at
    if isinstance(at, bool) or number not in points.values():
        names = ", ".join(f"{n} ({name})" for name, n in points.items())
        raise ValueError(f"cannot cut at {at!r}; the cut points are {names}")
    return number


def _untie(client: nn.Module, server: nn.Module) -> nn.Module:
    """Return the server half with its own copy of every parameter and buffer that it shares with the client half."""
    client_ids = {id(t) for t in (*client.parameters(), *client.buffers())}
    clones: dict[int, Any] = {}
    for path, module in list(server.named_modules()):
        tensors = {"_parameters": module._parameters, "_buffers": module._buffers}
        shared = [(kind, name, t) for kind, ts in tensors.items() for name, t in ts.items() if id(t) in client_ids]
        if not shared:
            continue
        untied = copy_module(module)
        untied._parameters, untied._buffers = dict(module._parameters), dict(module._buffers)
        for kind, name, tensor in shared:
            if id(tensor) not in clones:
                clones[id(tensor)] = copy.deepcopy(tensor)  # a parameter's copy is a parameter
            getattr(untied, kind)[name] = clones[id(tensor)]
        server = replace_submodule(server, path, untied)
    return server

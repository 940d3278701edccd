"""Cuts the transformers of Hugging Face: a table of the modules before and after each family's layers.

The server half is the model itself without the client's layers. It runs the model's forward pass, which makes masks and
position embeddings from the shape of the cut. What it computes before its first layer is discarded there, and replaced
by the cut: see `transformer_halves`. The client half is the model's trunk without the server's layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.halves.follow import CutError
from hosfl.halves.modules import copy_module, existing_submodules, has_submodule, replace_submodule
from hosfl.halves.transformer_halves import ClientHalf, ClientOnly, CutHolder, PassThrough, ServerHalf


@dataclass(frozen=True)
class Family:
    """The paths of a family's modules in its base model. Of alternatives, as in several versions, the first is taken.

    trunk: the module that runs the layers. layers: their list, in the trunk. before, after: the trunk's modules that
    run before the first layer and after the last. beside: modules outside the trunk that are the client's by another
    name. inputs: the name of the model's first argument. decoder: whether it predicts the next token.

    first: a module of the trunk that runs only after the first layer. shared: the part of the first layer that makes a
    tensor which each layer passes to the next; each half then has its own copy, as with tied weights. dropout: of the
    trunk, if it runs both before the first layer and after the last. through: whether the trunk needs at least one
    layer, so that an identity takes the place of none.
    """

    layers: tuple[str, ...] = ("layers",)
    before: tuple[str, ...] = ("embed_tokens",)
    after: tuple[str, ...] = ("norm",)
    trunk: str = ""
    beside: tuple[str, ...] = ()
    inputs: str = "input_ids"
    decoder: bool = False
    first: str = ""
    shared: str = ""
    dropout: str = ""
    through: bool = False


DECODER = Family(decoder=True)
DECODERS = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
    "starcoder2",
    "stablelm",
)
BERT = Family(layers=("encoder.layer",), before=("embeddings", "embeddings_project"), after=("pooler",))
FAMILIES = {
    "opt": Family(
        trunk="decoder",
        before=("embed_tokens", "embed_positions", "project_in"),
        after=("final_layer_norm", "project_out"),
        decoder=True,
    ),
    "gpt2": Family(layers=("h",), before=("wte", "wpe", "drop"), after=("ln_f",), decoder=True),
    "gpt_neox": Family(before=("embed_in", "emb_dropout"), after=("final_layer_norm",), decoder=True),
    **dict.fromkeys(DECODERS, DECODER),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), BERT),
    "distilbert": Family(layers=("transformer.layer",), before=("embeddings",), after=()),
    "modernbert": Family(before=("embeddings",), after=("final_norm",)),
    "deberta-v2": Family(
        layers=("encoder.layer",), before=("embeddings",), after=(), first="encoder.conv", through=True
    ),
    "t5": Family(
        layers=("block",),
        after=("final_layer_norm",),
        trunk="encoder",
        beside=("shared",),
        shared="layer.0.SelfAttention.relative_attention_bias",
        dropout="dropout",
    ),
    "resnet": Family(layers=("encoder.stages",), before=("embedder",), after=("pooler",), inputs="pixel_values"),
    "vit": Family(
        layers=("layers", "encoder.layer"),
        before=("embeddings",),
        after=("layernorm", "pooler"),
        inputs="pixel_values",
    ),
}


def transformer_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The path of a known transformer's list of layers, and the list; None for any other module.

    Raises CutError for a model with a decoder beside its encoder.
    """
    config = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        return None
    if getattr(config, "is_encoder_decoder", False):
        raise CutError(
            f"cannot cut a {type(model).__name__}, which has a decoder: cut the encoder alone, T5EncoderModel"
        )
    where = _trunk_path(model, family)
    trunk: Any = model.get_submodule(where)
    if getattr(trunk, "layerdrop", 0):  # the cut goes in at the server half's first layer
        raise CutError(
            f"cannot cut a {type(model).__name__} that leaves out layers at random in train mode: set its "
            f"{_join(where, 'layerdrop')} to 0"
        )
    path = _join(where, _first_present(trunk, family.layers))
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return path, layers


def head_path(model: nn.Module) -> str | None:
    """The path of the first module with weights after a known transformer's layers; None if there is none."""
    family = FAMILIES[model.config.model_type]  # type: ignore[union-attr, index]
    path = _trunk_path(model, family)
    after = existing_submodules(model.get_submodule(path), family.after)
    if after:
        return _join(path, after[0])
    inside = {path.partition(".")[0], *family.beside}
    outside = [name for name, module in model.named_children() if name not in inside and list(module.parameters())]
    return outside[0] if path and outside else None


def cut_transformer(model: nn.Module, at: int) -> tuple[nn.Module, nn.Module]:
    """(client half with the first `at` layers, server half, which may have no layer), with the model's own weights."""
    family = FAMILIES[model.config.model_type]  # type: ignore[union-attr, index]
    path = _trunk_path(model, family)
    trunk = model.get_submodule(path)
    where = _first_present(trunk, family.layers)
    layers = list(trunk.get_submodule(where))  # type: ignore[call-overload]
    count = len(layers)
    stand_in = [PassThrough()] if family.through else []

    mine = replace_submodule(trunk, where, nn.ModuleList(layers[:at] or stand_in))
    for name in existing_submodules(mine, family.after):
        mine = replace_submodule(mine, name, nn.Identity())
    if family.dropout:
        embedding, dropout = (trunk.get_submodule(name) for name in (family.before[0], family.dropout))
        mine = replace_submodule(mine, family.before[0], nn.Sequential(embedding, dropout))
        mine = replace_submodule(mine, family.dropout, nn.Identity())
    if family.first and not at:
        mine = replace_submodule(mine, family.first, None)
    mine.config = _config_of_layers(trunk, 0, at)

    holder = CutHolder()
    if family.shared and 0 < at < count:
        layers[at] = _with_shared_module(layers[at], layers[0], family.shared)
    theirs = replace_submodule(trunk, where, nn.ModuleList(layers[at:] or stand_in))
    for first in [f"{where}.0"] if layers[at:] or stand_in else existing_submodules(theirs, family.after)[:1]:
        theirs = replace_submodule(theirs, first, holder.feed(theirs.get_submodule(first), "hidden_states"))
    for name in existing_submodules(theirs, family.before):
        theirs = replace_submodule(theirs, name, ClientOnly(holder, name))
    if family.first and at:
        theirs = replace_submodule(theirs, family.first, None)
    if family.inputs == "input_ids":
        theirs = holder.feed(theirs, "inputs_embeds", instead_of="input_ids")
    rest = replace_submodule(model, path, theirs) if path else theirs
    owner = path.rpartition(".")[0]
    for name in existing_submodules(model.get_submodule(owner), family.beside):
        rest = replace_submodule(rest, _join(owner, name), ClientOnly(holder, name))
    for module in _modules_along(rest, path):
        module.config = _config_of_layers(module, at, count)
    pools = _pools_by_tokens(model, family)
    return ClientHalf(mine, family.inputs, pools), ServerHalf(rest, holder, family.inputs)


def layer_ancestors(model: nn.Module) -> list[nn.Module]:
    """The modules of a known transformer that contain its layers; both halves run their forward passes."""
    found = transformer_layers(model)
    assert found is not None
    parts = found[0].split(".")[:-1]
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Example inputs for a known transformer, on its device: a few short ones, padded on either side."""
    config: Any = model.config
    device = next(model.parameters()).device
    if FAMILIES[config.model_type].inputs == "pixel_values":
        size = getattr(config, "image_size", 64)
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": sine_input((2, getattr(config, "num_channels", 3), *sides), device)}
    length = min(8, getattr(config, "max_position_embeddings", 8))
    places = torch.arange(length, device=device)
    # Without a padding token a classifier takes one text at a time.
    starts = [2] if config.pad_token_id is None and _classifies(model) else [0, 2, -2]
    mask = torch.stack([places >= start if start >= 0 else places < length + start for start in starts]).long()
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    tokens = (7 * places + 3 + 5 * torch.arange(len(starts), device=device)[:, None]) % config.vocab_size
    tokens = torch.where(tokens == pad, (pad + 1) % config.vocab_size, tokens)
    return {"input_ids": torch.where(mask == 1, tokens, pad), "attention_mask": mask}


def sine_input(shape: Sequence[int], device: torch.device) -> Tensor:
    """Deterministic values between -1 and 1 that do not repeat."""
    count = torch.Size(shape).numel()
    angles = torch.arange(count, dtype=torch.float32, device=device) * 0.7
    return (angles + 1e-5 * angles * angles).sin().reshape(shape)


def _classifies(model: nn.Module) -> bool:
    return "ForSequenceClassification" in type(model).__name__


def _pools_by_tokens(model: nn.Module, family: Family) -> int | None:
    """The padding token by which a decoder's classifier finds a text's end; None if it does not."""
    pad: int | None = getattr(model.config, "pad_token_id", None)
    return pad if family.decoder and _classifies(model) else None


def _with_shared_module(layer: nn.Module, first: nn.Module, path: str) -> nn.Module:
    """A layer that also has the first layer's shared module."""
    where, _, name = path.rpartition(".")
    attention = copy_module(layer.get_submodule(where))
    attention._modules[name] = first.get_submodule(path)
    setattr(attention, f"has_{name}", True)
    return replace_submodule(layer, where, attention)


def _trunk_path(model: nn.Module, family: Family) -> str:
    # Gemma's language models say they have a language_model and have a model.
    names = (getattr(model, "base_model_prefix", ""), "model")
    path = _join(next((name for name in names if name in model._modules), ""), family.trunk)
    return path if has_submodule(model, path) else ""  # or it is the trunk itself


def _modules_along(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module and its submodules along a path."""
    yield module
    for name in filter(None, path.split(".")):
        module = module.get_submodule(name)
        yield module


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _first_present(module: nn.Module, paths: Sequence[str]) -> str:
    for path in filter(partial(has_submodule, module), paths):
        return path
    name = type(module).__name__
    if name == "PeftMixedModel":  # says it has what the model inside has
        raise CutError(f"cannot cut through {name}: cut the model inside, its base_model.model, adapters and all")
    raise CutError(f"{name} has none of {', '.join(paths)}: a version of transformers not known here")


def _config_of_layers(model: nn.Module, first: int, end: int) -> Any:
    """The model's configuration for some of its layers, if it lists their kinds by number."""
    config: Any = copy.deepcopy(model.config)
    config.num_hidden_layers = end - first
    config.use_cache = False
    config.return_dict = True
    if hasattr(config, "output_router_logits"):  # for a loss that no half computes, and of no layer there is none
        config.output_router_logits = False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[first:end]
    return config

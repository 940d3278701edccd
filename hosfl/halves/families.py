"""Cut the transformers of Hugging Face: a table of the modules before and after each family's layers.

The client half is the model's trunk without the server's layers. The server half is the model itself without the
client's layers. It runs the model's forward pass, which makes masks and position embeddings from the shape of the cut.
Its first layer gets the cut in place of what was computed before: see `transformer_halves`.
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
    """The paths of a family's modules in its base model.

    Attributes:
        layers: the list of layers, in the trunk. Of several paths, for versions of transformers, the first that exists.
        before: the trunk's modules that run before the first layer.
        after: the trunk's modules that run after the last layer.
        trunk: the module that runs the layers.
        aliases: modules outside the trunk that are the same as one of the client half's.
        inputs: the name of the model's first argument.
        decoder: whether it predicts the next token.
        after_first: a module of the trunk that runs only after the first layer.
        shared: a module of the first layer whose result each layer passes to the next. Each half then has its own copy
            of it, as with tied weights.
        dropout: the trunk's dropout, if it runs both before the first layer and after the last.
        needs_layer: whether the trunk needs at least one layer, so that an identity takes the place of none.
    """

    layers: tuple[str, ...] = ("layers",)
    before: tuple[str, ...] = ("embed_tokens",)
    after: tuple[str, ...] = ("norm",)
    trunk: str = ""
    aliases: tuple[str, ...] = ()
    inputs: str = "input_ids"
    decoder: bool = False
    after_first: str = ""
    shared: str = ""
    dropout: str = ""
    needs_layer: bool = False


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
        layers=("encoder.layer",), before=("embeddings",), after=(), after_first="encoder.conv", needs_layer=True
    ),
    "t5": Family(
        layers=("block",),
        after=("final_layer_norm",),
        trunk="encoder",
        aliases=("shared",),
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
    """Return (path of the list of layers, the list) for a transformer of a known family; None for any other module.

    Raises CutError for an encoder-decoder model, and for one that leaves out layers at random.
    """
    config = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        return None
    if getattr(config, "is_encoder_decoder", False):
        raise CutError(
            f"cannot cut a {type(model).__name__}, which has a decoder: cut the encoder alone, T5EncoderModel"
        )
    trunk_path = _trunk_path(model, family)
    trunk: Any = model.get_submodule(trunk_path)
    if getattr(trunk, "layerdrop", 0):  # the server half's first layer takes the cut, so it must always run
        raise CutError(
            f"cannot cut a {type(model).__name__} that leaves out layers at random in train mode: set its "
            f"{_join(trunk_path, 'layerdrop')} to 0"
        )
    path = _join(trunk_path, _first_present(trunk, family.layers))
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
    inside = {path.partition(".")[0], *family.aliases}
    outside = [name for name, module in model.named_children() if name not in inside and list(module.parameters())]
    return outside[0] if path and outside else None


def cut_transformer(model: nn.Module, at: int) -> tuple[nn.Module, nn.Module]:
    """Cut a known transformer after `at` layers, and return (client half, server half), which share its weights.

    The server half may have no layer, only the model's head.
    """
    family = FAMILIES[model.config.model_type]  # type: ignore[union-attr, index]
    return _cut_client(model, family, at), _cut_server(model, family, at)


def _cut_client(model: nn.Module, family: Family, at: int) -> ClientHalf:
    """The client half: the trunk with the first `at` layers, and nothing after them."""
    trunk = model.get_submodule(_trunk_path(model, family))
    path, layers = _trunk_layers(trunk, family)
    kept = layers[:at] or ([PassThrough()] if family.needs_layer else [])
    client = replace_submodule(trunk, path, nn.ModuleList(kept))
    for name in existing_submodules(client, family.after):
        client = replace_submodule(client, name, nn.Identity())
    if family.dropout:
        embedding, dropout = (trunk.get_submodule(name) for name in (family.before[0], family.dropout))
        client = replace_submodule(client, family.before[0], nn.Sequential(embedding, dropout))
        client = replace_submodule(client, family.dropout, nn.Identity())
    if family.after_first and not at:
        client = replace_submodule(client, family.after_first, None)
    client.config = _config_of_layers(trunk, 0, at)
    return ClientHalf(client, family.inputs, _classifier_pad(model, family))


def _cut_server(model: nn.Module, family: Family, at: int) -> ServerHalf:
    """The server half: the model without the first `at` layers. The first module that it still has takes the cut."""
    trunk_path = _trunk_path(model, family)
    trunk = model.get_submodule(trunk_path)
    path, layers = _trunk_layers(trunk, family)
    holder, count = CutHolder(), len(layers)
    if family.shared and 0 < at < count:
        layers[at] = _with_shared_module(layers[at], layers[0], family.shared)
    kept = layers[at:] or ([PassThrough()] if family.needs_layer else [])
    server = replace_submodule(trunk, path, nn.ModuleList(kept))
    for first in [f"{path}.0"] if kept else existing_submodules(server, family.after)[:1]:
        server = replace_submodule(server, first, holder.feed(server.get_submodule(first), "hidden_states"))
    for name in existing_submodules(server, family.before):
        server = replace_submodule(server, name, ClientOnly(holder, name))
    if family.after_first and at:
        server = replace_submodule(server, family.after_first, None)
    if family.inputs == "input_ids":
        server = holder.feed(server, "inputs_embeds", instead_of="input_ids")
    if trunk_path:
        server = replace_submodule(model, trunk_path, server)
    owner = trunk_path.rpartition(".")[0]
    for name in existing_submodules(model.get_submodule(owner), family.aliases):
        server = replace_submodule(server, _join(owner, name), ClientOnly(holder, name))
    for module in _modules_along(server, trunk_path):
        module.config = _config_of_layers(module, at, count)
    return ServerHalf(server, holder, family.inputs)


def layer_ancestors(model: nn.Module) -> list[nn.Module]:
    """The modules of a known transformer that contain its layers, from the model itself on.

    Both halves run their forward passes.
    """
    path_and_layers = transformer_layers(model)
    assert path_and_layers is not None
    parts = path_and_layers[0].split(".")[:-1]
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Example inputs for a known transformer, on its device: two pictures, or a few short texts.

    Texts are padded on either side.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    if FAMILIES[config.model_type].inputs == "pixel_values":
        size = getattr(config, "image_size", 64)
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": sine_input((2, getattr(config, "num_channels", 3), *sides), device)}
    length = min(8, getattr(config, "max_position_embeddings", 8))
    positions = torch.arange(length, device=device)
    # Tokens of padding in each text, on the left if positive. Without a padding token a classifier takes single texts.
    paddings = [2] if config.pad_token_id is None and _is_classifier(model) else [0, 2, -2]
    mask = torch.stack([positions >= n if n >= 0 else positions < length + n for n in paddings]).long()
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    tokens = (7 * positions + 3 + 5 * torch.arange(len(paddings), device=device)[:, None]) % config.vocab_size
    tokens = torch.where(tokens == pad, (pad + 1) % config.vocab_size, tokens)
    return {"input_ids": torch.where(mask == 1, tokens, pad), "attention_mask": mask}


def sine_input(shape: Sequence[int], device: torch.device) -> Tensor:
    """A tensor of deterministic values between -1 and 1 that do not repeat."""
    count = torch.Size(shape).numel()
    angles = torch.arange(count, dtype=torch.float32, device=device) * 0.7
    return (angles + 1e-5 * angles * angles).sin().reshape(shape)


def _is_classifier(model: nn.Module) -> bool:
    """Whether a model is one of transformers' sequence classifiers."""
    return "ForSequenceClassification" in type(model).__name__


def _classifier_pad(model: nn.Module, family: Family) -> int | None:
    """The padding token by which a decoder's classifier finds a text's end; None for any other model."""
    pad: int | None = getattr(model.config, "pad_token_id", None)
    return pad if family.decoder and _is_classifier(model) else None


def _with_shared_module(layer: nn.Module, first: nn.Module, path: str) -> nn.Module:
    """A copy of a layer that also has the first layer's shared module. path: that module's, in the layer."""
    owner, _, name = path.rpartition(".")
    attention = copy_module(layer.get_submodule(owner))
    attention._modules[name] = first.get_submodule(path)
    setattr(attention, f"has_{name}", True)
    return replace_submodule(layer, owner, attention)


def _trunk_path(model: nn.Module, family: Family) -> str:
    """The path of a model's trunk; "" if the model is the trunk."""
    # Gemma's language models have a "model", and "language_model" as prefix.
    names = (getattr(model, "base_model_prefix", ""), "model")
    path = _join(next((name for name in names if name in model._modules), ""), family.trunk)
    return path if has_submodule(model, path) else ""


def _trunk_layers(trunk: nn.Module, family: Family) -> tuple[str, list[nn.Module]]:
    """(path of the list of layers in the trunk, the layers in a new list)."""
    path = _first_present(trunk, family.layers)
    return path, list(trunk.get_submodule(path))  # type: ignore[call-overload]


def _modules_along(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module and its submodules along a path."""
    yield module
    for name in filter(None, path.split(".")):
        module = module.get_submodule(name)
        yield module


def _join(*names: str) -> str:
    """Join parts of a path; empty ones are left out."""
    return ".".join(name for name in names if name)


def _first_present(module: nn.Module, paths: Sequence[str]) -> str:
    """The first of these paths at which there is a submodule. Raises CutError if there is none."""
    for path in filter(partial(has_submodule, module), paths):
        return path
    name = type(module).__name__
    if name == "PeftMixedModel":  # has the configuration of the model inside, and so seems to be of its family
        raise CutError(f"cannot cut through {name}: cut the model inside, its base_model.model, adapters and all")
    raise CutError(f"{name} has none of {', '.join(paths)}: a version of transformers not known here")


def _config_of_layers(model: nn.Module, first: int, end: int) -> Any:
    """A copy of the model's configuration for a half with the layers from `first` to `end`, the latter excluded."""
    config: Any = copy.deepcopy(model.config)
    config.num_hidden_layers = end - first
    config.use_cache = False
    config.return_dict = True
    if hasattr(config, "output_router_logits"):  # needed for a loss that no half computes
        config.output_router_logits = False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[first:end]
    return config

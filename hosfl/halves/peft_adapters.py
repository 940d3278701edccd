"""Adapters of peft, by name or by their configuration file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hosfl.files import read_small
from hosfl.halves.adapters import input_rows
from hosfl.halves.inputs import Inputs, call, mask_of


def import_peft() -> Any:
    """Import peft. Raises ImportError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'hosfl[hf]'") from error
    return peft


def peft_config(told: str) -> Any:
    """peft's configuration of a type by its name in any case, with peft's defaults, or of a file "....json".

    The file is what peft's save_pretrained calls adapter_config.json. Raises ValueError for names and files that are
    none, and for adapters that do not go into layers.
    """
    import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KINDS

    given: Mapping[str, Any] = {}
    if told.lower().endswith(".json"):
        try:
            given = json.loads(read_small(Path(told)))
        except OSError as error:
            raise ValueError(f"{told} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{told} is no JSON: {error}") from None
        if not isinstance(given, dict) or not isinstance(given.get("peft_type"), str):
            raise ValueError(f"{told} is no configuration of peft: it has no peft_type")
    name = given["peft_type"] if given else told
    kinds = {str(getattr(kind, "value", kind)): made for kind, made in KINDS.items()}
    if name.upper() not in kinds:
        raise ValueError(f"peft has no {name!r}: it has {', '.join(sorted(kinds)).lower()}, or give a FILE.json")
    rest = {key: value for key, value in given.items() if key != "peft_type"}
    # peft writes into its files that adapters are there to be used, not to be trained
    rest |= {"inference_mode": False} if given else {}
    try:
        config = kinds[name.upper()](**rest)
    except Exception as error:  # whatever peft raises
        raise ValueError(f"peft refuses the configuration: {error}") from error
    _refuse_unsupported(config, name)
    return config


def _refuse_unsupported(config: Any, name: str) -> None:
    """Raises ValueError, with the reason, for methods of peft that are not adapters inside layers."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    reason = ""
    if config.is_prompt_learning:
        reason = "it learns virtual tokens, which do not cross a cut"
    elif config.is_adaption_prompt:
        reason = "it learns prompts inside the attention of whole models"
    elif name.upper() in ("XLORA", "POLY"):
        reason = "its layers need to be told the task or the mixture in every forward pass"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "adapters that begin at certain tokens do not cross a cut"
    else:
        kind = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
        if kind is None or not issubclass(kind, BaseTuner):
            reason = "it puts no adapters into layers"
    if reason:
        raise ValueError(f"{name} cannot be used: {reason}")


def add_peft(half: nn.Module, config: Any, seed: int, public: Inputs | None) -> None:
    """Put adapters into a half's layers by peft's `config`. Only the parameters that peft trains stay trainable.

    Layers are named as in the transformer inside the half; without one as in the half, where a configuration without
    layers means all linear ones. seed: for random numbers that peft draws from torch's generator. Fixed tensors become
    buffers: see `hosfl.halves.adapters.fixed_factors`. public: samples for LoRA with EVA, from whose activations A is
    made; A is then fixed, and only B trains.

    Raises ValueError for what peft refuses, for adapters without trainable parameters and for EVA without public
    samples, before anything is changed.
    """
    _inject(copy.deepcopy(half), copy.deepcopy(config), seed, public)  # peft stops half way when it refuses
    _inject(half, config, seed, public)


def _inject(half: nn.Module, config: Any, seed: int, public: Inputs | None) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    path, inside = next(
        ((path, m) for path, m in half.named_modules() if hasattr(getattr(m, "config", None), "model_type")), ("", half)
    )
    if inside is half and getattr(config, "target_modules", "") is None:
        config.target_modules = [name for name, m in half.named_modules() if isinstance(m, nn.Linear)]
        if getattr(config, "feedforward_modules", "") is None:
            config.feedforward_modules = []
    own = {id(t) for t in (*half.parameters(), *half.buffers())}
    half.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        found = _eva_factors(half, path, inside, config, public)
        try:
            # What inject_adapter_in_model does. That refuses adapters that share tensors, for which peft's own wrapper
            # has to be kept where they are merged or saved; their layers hold these tensors as well.
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](inside, config, "default")
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"peft refuses: {error}") from error
        if found is not None:
            _load_eva(tuner, found)
    if not any(p.requires_grad and p.numel() for p in half.parameters()):
        raise ValueError("nothing of these adapters moves: choose others")
    disable_fused_encoder(half)
    _register_fixed_tensors(half, own)


def disable_fused_encoder(half: nn.Module) -> None:
    """Make torch's encoder layers with adapters call their sublayers in eval mode too.

    By default a fused operation reads the sublayers' weights in eval mode, so that adapters would do nothing. torch
    decides by these two attributes; nested tensors, which only the fused operation takes, stop working.
    """
    for module in half.modules():
        if not any("base_layer" in inner._modules for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _register_fixed_tensors(half: nn.Module, own: set[int]) -> None:
    """Register the fixed tensors of adapters, such as random projections, as buffers, so that base files have them.

    own: ids of the half's tensors before the adapters. Raises ValueError for tensors in plain attributes of a module,
    which no base file would have, and of which another machine might compute others.
    """
    for path, module in half.named_modules():
        for name, p in list(module._parameters.items()):
            if p is not None and id(p) not in own and not p.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, p.detach())
        new = {name for name, b in module._buffers.items() if b is not None and id(b) not in own}
        module._non_persistent_buffers_set -= new
        for name, value in vars(module).items() if "base_layer" in module._modules else ():
            held = value.values() if isinstance(value, dict) and name not in ("_parameters", "_buffers") else [value]
            if any(isinstance(one, Tensor) for one in held):
                raise ValueError(f"{path}.{name} holds tensors outside of the state dict: no base file would have them")


def _eva_factors(
    half: nn.Module, path: str, inside: nn.Module, config: Any, public: Inputs | None
) -> dict[str, Tensor] | None:
    """peft's A of every layer, by name, computed from inputs; None if the configuration needs none."""
    if getattr(config, "init_lora_weights", None) != "eva":
        return None
    if public is None:
        raise ValueError("EVA needs public samples, and the task has none: give it some, Task(public=...)")
    from peft import get_eva_state_dict

    mask = mask_of(public)
    rows = next(len(x) for x in tree_leaves(public) if isinstance(x, Tensor)) if mask is None else int(mask.sum())
    needed = max([config.r, *config.rank_pattern.values()]) * config.eva_config.rho
    if rows < needed:  # peft would wait for more of them for ever
        raise ValueError(f"EVA with this rank needs {needed:g} public tokens or samples, and there are {rows}")
    # peft runs the module whose layers it names: what the half hands to it stands for its inputs
    try:
        return get_eva_state_dict(
            inside,
            [public],
            peft_config=config,
            forward_fn=lambda _, inputs: call(half, inputs),
            prepare_model_inputs_fn=lambda inputs, _: mask_of(inputs),
            prepare_layer_inputs_fn=lambda given, mask, _: input_rows(nn.Identity(), given[0], mask),
            show_progress_bar=False,
        )
    except (ValueError, TypeError, RuntimeError, LookupError) as error:
        raise ValueError(f"EVA from the public samples: {error}") from error


def _load_eva(tuner: nn.Module, found: dict[str, Tensor]) -> None:
    from peft import initialize_lora_eva_weights

    named = {f"model.{name}": factor for name, factor in found.items()}
    initialize_lora_eva_weights(tuner, eva_state_dict=named)
    for name, p in tuner.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
